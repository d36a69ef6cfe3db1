"""What people see of a long run: console, progress, pictures."""
