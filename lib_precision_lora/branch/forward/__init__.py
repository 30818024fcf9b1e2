"""What runs beside a module."""
