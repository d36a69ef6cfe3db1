"""Image data sets: read, cut into splits, made worse on purpose, augmented."""
