"""Folders, files and processes: what a run leaves and how it survives."""
