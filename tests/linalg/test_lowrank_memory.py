"""The algebra of LowRank never forms the out x in product."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plait.linalg import LowRank

SIDE, RANK = 4096, 4


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def factored(seed):
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(SIDE, RANK, generator=g)
    return LowRank(B, torch.randn(RANK, SIDE, generator=g), 0.5)


OPERATIONS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "weighted_sum": lambda x, y: LowRank.weighted_sum([x, y, x], [0.2, 3.0, -1.0]),
    "inner": lambda x, y: x.inner(y),
    "norm": lambda x, y: x.norm(),
    "norm after cancellation": lambda x, y: (x - x).norm(),
    "cosine": lambda x, y: x.cosine(y),
    "svd": lambda x, y: x.svd(),
    "singular_values": lambda x, y: x.singular_values(),
    "effective_rank": lambda x, y: x.effective_rank(),
    "truncate by rank": lambda x, y: x.truncate(rank=2),
    "truncate by energy": lambda x, y: (x + y).truncate(energy=0.9),
    "balanced": lambda x, y: x.balanced(),
    "matmul": lambda x, y: x.matmul(torch.ones(3, SIDE)),
    "rows": lambda x, y: x.rows([1, 2]),
    "transpose": lambda x, y: x.transpose(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_product_is_never_formed(name):
    x, y = factored(0), factored(1)
    with LargestTensor() as largest:
        OPERATIONS[name](x, y)
    # Three concatenated factors are the largest thing that any of them needs.
    assert largest.numel <= 4 * SIDE * RANK < SIDE * SIDE // 100


def test_the_recorder_sees_a_dense_product():
    with LargestTensor() as largest:
        factored(0).dense()
    assert largest.numel == SIDE * SIDE
