"""Linear algebra that adapters share: factored matrices, randomised SVD, solvers, transforms."""

from plait.linalg.allocate import allocate, best_components
from plait.linalg.canonical import canonical_svd, column_signs
from plait.linalg.counters import key_of, uniform_at
from plait.linalg.entanglement import cut_entropy, entropy_profile, page_entropy
from plait.linalg.gram import gram_directions, mapped_directions
from plait.linalg.lowrank import LowRank
from plait.linalg.precision import all_finite
from plait.linalg.rsvd import krylov_svd, low_rank_approximation, randomized_svd
from plait.linalg.solvers import (
    damped_inverse,
    principal_angles,
    procrustes,
    sylvester_symmetric,
)
from plait.linalg.thresholds import kth_magnitude, kth_magnitudes
from plait.linalg.transforms import kron_matvec, wht

__all__ = [
    "LowRank",
    "all_finite",
    "allocate",
    "best_components",
    "canonical_svd",
    "column_signs",
    "cut_entropy",
    "damped_inverse",
    "entropy_profile",
    "gram_directions",
    "key_of",
    "kron_matvec",
    "krylov_svd",
    "kth_magnitude",
    "kth_magnitudes",
    "low_rank_approximation",
    "mapped_directions",
    "page_entropy",
    "principal_angles",
    "procrustes",
    "randomized_svd",
    "sylvester_symmetric",
    "uniform_at",
    "wht",
]
