"""Merging networks whose hidden units stand in different orders: match, merge in part, fit.

    find_groups ──► match ──► split_units ──► partial_merge ──► least_squares       (PLeaS)
    which units     a permutation   alike or kept   one network,       every layer solved
    may move        a group         apart           d (1 + ratio) wide anew on data

`merge_networks` is all of it. Adapters of one base need none of this but on their rank axis: there
it is the merge method "pleas".
"""

from plait.merging.permutations.budget import budget_ratios
from plait.merging.permutations.finding import chain_groups, find_groups
from plait.merging.permutations.fit import least_squares
from plait.merging.permutations.groups import Group, Slot, check_groups, permute
from plait.merging.permutations.matching import Matching, match
from plait.merging.permutations.moments import joint_moments
from plait.merging.permutations.network import MergedNetwork, merge_networks
from plait.merging.permutations.partial import (
    Split,
    partial_merge,
    refresh_batch_norms,
    split_units,
)

__all__ = [
    "Group",
    "Matching",
    "MergedNetwork",
    "Slot",
    "Split",
    "budget_ratios",
    "chain_groups",
    "check_groups",
    "find_groups",
    "joint_moments",
    "least_squares",
    "match",
    "merge_networks",
    "partial_merge",
    "permute",
    "refresh_batch_norms",
    "split_units",
]
