"""Merge methods, one paper a file, named after it; each ends in a `METHOD` record."""
