"""Merging: several finished adapters into one.

`merge` is the driver (checks, sites one by one, truncation, report); a method is a pure function of
one site, one file in `methods/`, found by listing that folder.
"""

from plait.merging.driver import merge
from plait.merging.method import MergeMethod, get_merge_method, merge_method_names

__all__ = ["MergeMethod", "get_merge_method", "merge", "merge_method_names"]
