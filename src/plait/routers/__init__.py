"""Routers: which deltas act, for which token."""
