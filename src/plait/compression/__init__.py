"""Compression: finished weights and adapters in fewer numbers, or in fewer bits.

`extract`: a full fine-tune as an adapter of its base. `squeeze`: an adapter at lower ranks.
`pack`: an adapter's file in a few bits a number. `make_bank`, `joint_bank`: many adapters behind
shared bases. `prune`: a model without its least important heads and channels.
"""

from plait.compression.bank import Bank
from plait.compression.extraction import extract
from plait.compression.joint import joint_bank
from plait.compression.packing import Packed, pack
from plait.compression.positions import make_bank
from plait.compression.pruning import Pruned, load_pruned, prune
from plait.compression.squeezing import squeeze

__all__ = [
    "Bank",
    "Packed",
    "Pruned",
    "extract",
    "joint_bank",
    "load_pruned",
    "make_bank",
    "pack",
    "prune",
    "squeeze",
]
