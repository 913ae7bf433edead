"""Initialisations: where the factors of an adapter start."""
