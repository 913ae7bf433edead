"""Merging models whose hidden units stand in different orders: match them, then merge."""
