"""Quantisers: what a base weight reads back as when it is stored in a few bits.

`Quantizer` is the seam: whatever answers `quantize(W)` serves the initialisers and rules that look
at quantisation errors. `BlockQuantizer` is the reference, in plain PyTorch.
"""

from plait.quantization.blocks import BlockQuantizer, normal_codes, uniform_codes
from plait.quantization.dynamic import dynamic_codes
from plait.quantization.quantizer import Quantizer
from plait.quantization.signs import SignQuantizer

__all__ = [
    "BlockQuantizer",
    "Quantizer",
    "SignQuantizer",
    "dynamic_codes",
    "normal_codes",
    "uniform_codes",
]
