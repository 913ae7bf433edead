"""The seam for a device's own kernels: a registered implementation is called, then withdrawn."""

import pytest
import torch
from kernel_cases import make_case

from plait.kernels import dispatch, lora_linear


def test_a_registered_implementation_takes_over_and_can_be_withdrawn():
    case = make_case()
    seen = []

    def mine(x, weight, bias, A, B, scale, drop):
        seen.append((scale, drop))
        return x.new_zeros(())

    dispatch.register("lora_linear", "cpu", mine)
    try:
        lora_linear(case.x, case.weight, case.bias, case.A, case.B, 0.7, dropout=0.5, seed=4)
    finally:
        dispatch.unregister("lora_linear", "cpu")
    assert seen == [(0.7, (0.5, 4))]
    y = lora_linear(case.x, case.weight, case.bias, case.A, case.B, 0.7)
    assert y.shape == torch.Size([3, 5, 7])
    assert len(seen) == 1


def test_unknown_operations_are_refused():
    with pytest.raises(ValueError, match="no kernel operation"):
        dispatch.register("lora_cubic", "cpu", lambda: None)
