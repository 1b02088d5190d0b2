"""Data sources, one file each, named as in a recipe."""
