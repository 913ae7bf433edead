"""A model that runs its children in turn is not disturbed by those that Plait adds."""

from __future__ import annotations

import torch
from torch import nn

import plait


def test_sequential_as_the_model_itself() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(3, 6)
    base = model(x)
    adapter = plait.attach(model, "lora", rank=2)
    assert torch.equal(model(x), base)
    adapter.deltas["2"].B.data.normal_()
    hidden = model[1](model[0](x))
    torch.testing.assert_close(model(x), base + hidden @ adapter.deltas["2"].dense().t())
    plait.detach(model)
    assert torch.equal(model(x), base) and len(model) == 3
