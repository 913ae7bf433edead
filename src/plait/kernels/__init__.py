"""Floor 1: the products that adapters are made of, fused where that saves time or memory.

Each entry point computes exactly what its namesake in `reference` computes in plain PyTorch, takes
that path by itself where fusing does not apply (compilers, functorch, a trained base), and takes it
everywhere inside `use_reference()`. Nothing here knows of modules, sites or methods.
"""

from plait.kernels._gate import use_reference
from plait.kernels.dropout import dropout_mask, keep_probability
from plait.kernels.lora_group import lora_linear_group
from plait.kernels.lora_linear import lora_linear

__all__ = [
    "dropout_mask",
    "keep_probability",
    "lora_linear",
    "lora_linear_group",
    "use_reference",
]
