"""Image models with their published sizes."""
