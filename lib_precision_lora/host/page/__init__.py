"""What people and programs set: settings, the accordion, X/Y/Z, the API."""
