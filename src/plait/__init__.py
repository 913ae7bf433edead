"""Plait: one library for the whole life of low-rank adapters."""

__version__ = "0.1.0"
