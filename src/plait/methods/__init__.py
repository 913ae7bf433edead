"""Parameterisations: one paper, one file, named after it."""
