"""Merging: several finished adapters into one.

`merge` is the driver (checks, sites one by one, truncation, report); a method is a dataclass of its
options that merges one site, one file in `methods/`, found by listing that folder.
"""

from plait.merging.driver import merge
from plait.merging.method import Merge, MergeMethod, get_merge_method, merge_method_names
from plait.merging.streamed import merge_checkpoints

__all__ = [
    "Merge",
    "MergeMethod",
    "get_merge_method",
    "merge",
    "merge_checkpoints",
    "merge_method_names",
]
