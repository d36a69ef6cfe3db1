"""Recipes: found, read, checked key by key; ``l2t recipes``."""
