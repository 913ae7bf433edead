"""In which precision the room computes: half types are raised, float64 is kept."""

import torch
from torch import Tensor


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if any input has it, else float32 (also for integers)."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The widest real dtype of a device: float64, or float32 on Apple's MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def all_finite(value: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity.

    A sum of finite numbers can only overflow, so a finite one spares the mask over all of them.
    """
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def require_finite(value: Tensor, name: str, where: str) -> None:
    """Raise ValueError naming `name` if it holds NaN or infinity.

    LAPACK answers a NaN with a convergence failure or with a whole result of NaN, neither of which
    tells the reader what was wrong.
    """
    if not all_finite(value):
        raise ValueError(
            f"{where}: {name} of shape {tuple(value.shape)} contains NaN or infinity; "
            "check the tensor it was loaded or trained from"
        )
