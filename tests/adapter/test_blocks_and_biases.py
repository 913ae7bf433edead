"""What shared code hands to deltas on whole blocks, and the dtype of a fused bias."""

import pytest
import torch
from torch import nn

import plait
from plait.adapter import Delta, Method, Options, Traits


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x)


class FromInput(Delta):
    """Adds w times the block's input."""

    kinds = frozenset({"module"})
    traits = Traits(linear_in_x=False, reads_input=True, zero_start=False)

    def build(self):
        self.parameter("w", 1)

    def reset(self):
        self.w.fill_(2.0)

    def forward(self, x, y=None):
        return self.w * x


class FromOutput(FromInput):
    traits = Traits(linear_in_x=False, zero_start=False)


def method(delta):
    return Method("own", "own", "own", "parameterisation", Options, delta)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("delta", [FromInput, FromOutput])
def test_a_delta_on_a_block_sees_what_its_trait_asks_for(delta, weight):
    model = nn.Sequential(Block())
    plait.attach(model, method(delta), targets=["0"], name="a")
    plait.activate(model, {"a": weight})
    x = torch.randn(3, 6)
    y = model[0].linear(x)
    seen = x if delta is FromInput else y
    torch.testing.assert_close(model(x), y + weight * 2 * seen)


def test_rows_of_a_block_see_their_own_input():
    model = nn.Sequential(Block())
    plait.attach(model, method(FromInput), targets=["0"], name="a")
    x = torch.randn(3, 6)
    wanted = model[0].linear(x)
    wanted[1] += 2 * x[1]
    with plait.per_row(model, [None, "a", None]):
        torch.testing.assert_close(model(x), wanted)


def test_a_fused_bias_keeps_the_base_dtype():
    model = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    adapter = plait.attach(model, "lora", rank=2, bias=True)
    with torch.no_grad():
        adapter.deltas["0"].c.fill_(1.0)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    wanted = model(x)
    plait.fuse(model)
    assert model[0].bias.dtype == torch.bfloat16
    torch.testing.assert_close(model(x), wanted, rtol=0.02, atol=0.02)
