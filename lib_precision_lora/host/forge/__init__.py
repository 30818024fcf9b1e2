"""Forge: what is swapped in it, and what it must have."""
