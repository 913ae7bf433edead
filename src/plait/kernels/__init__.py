"""Floor 1: the products that adapters are made of, fused where that saves time or memory.

Each entry point computes exactly what its namesake in `reference` computes in plain PyTorch, takes
that path by itself where fusing does not apply (compilers, functorch, a trained base), and takes it
everywhere inside `use_reference()`. Nothing here knows of modules, sites or methods.
"""

from plait.kernels._gate import use_reference
from plait.kernels.dropout import dropout_mask, keep_probability
from plait.kernels.lora_add import lora_add
from plait.kernels.lora_group import lora_linear_group
from plait.kernels.lora_linear import lora_linear
from plait.kernels.multi import PackedFactors, RowPlan, multi_lora_, pack_factors, plan_rows

__all__ = [
    "PackedFactors",
    "RowPlan",
    "dropout_mask",
    "keep_probability",
    "lora_add",
    "lora_linear",
    "lora_linear_group",
    "multi_lora_",
    "pack_factors",
    "plan_rows",
    "use_reference",
]
