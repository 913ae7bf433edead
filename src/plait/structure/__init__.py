"""Structure: which rows and columns of a model's weights are one unit of its computation.

`find_structure` runs a model once and follows every axis of its weights through the operations;
axes that meet become one group, whose units (attention heads, hidden channels) can be switched off
(`Masks`) or taken out of all tensors together. No names of layers or architectures are known here.
"""

from plait.structure.groups import Group, Slot, Structure
from plait.structure.masks import Masks
from plait.structure.trace import find_structure

__all__ = ["Group", "Masks", "Slot", "Structure", "find_structure"]
