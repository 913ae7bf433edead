"""Pruning: heads and channels that matter least taken out, as a smaller dense model."""

from plait.compression.pruning.cutting import Pruned
from plait.compression.pruning.importance import (
    Importance,
    LoraGradient,
    Magnitude,
    Random,
    Taylor,
)
from plait.compression.pruning.prune import prune
from plait.compression.pruning.stored import load_pruned

__all__ = [
    "Importance",
    "LoraGradient",
    "Magnitude",
    "Pruned",
    "Random",
    "Taylor",
    "load_pruned",
    "prune",
]
