"""Weights by row and by column act as dW scaled by hand does, in every plan and when fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.errors import PlaitError

SITE = "0"
"""A linear of 5 outputs and 6 inputs."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def attach(net: nn.Module, method: str, name: str, seed: int, **options) -> plait.Adapter:
    adapter = plait.attach(net, method, name=name, targets=[SITE], seed=seed, **options)
    draw = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    net.double()
    return adapter


def x() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def weight(kind: str, seed: int = 3) -> Tensor:
    shape = {"rows": (5, 1), "columns": (1, 6), "number": (1,)}[kind]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(net: nn.Module, parts: list[tuple[plait.Adapter, Tensor]]) -> Tensor:
    plain = network()
    with torch.no_grad():
        for adapter, w in parts:
            plain[0].weight += adapter.deltas[SITE].dense() * w
    return plain(x())


@pytest.mark.parametrize("kind", ["rows", "columns", "number"])
@pytest.mark.parametrize("method", ["lora", "shira", "dora", "loha"])
def test_one_adapter_answers_as_its_scaled_matrix(method: str, kind: str) -> None:
    net = network()
    adapter = attach(net, method, "one", seed=1)
    plait.activate(net, {"one": {SITE: weight(kind)}})
    wanted = by_hand(net, [(adapter, weight(kind))])
    torch.testing.assert_close(net(x()), wanted)
    plait.fuse(net)
    torch.testing.assert_close(net(x()), wanted)
    plait.unfuse(net)
    torch.testing.assert_close(net(x()), wanted)


@pytest.mark.parametrize("other", ["lora", "shira"])
def test_rows_of_one_and_columns_of_another(other: str) -> None:
    net = network()
    one, two = attach(net, "lora", "one", seed=1), attach(net, other, "two", seed=2)
    plait.activate(net, {"one": {SITE: weight("rows")}, "two": {SITE: weight("columns")}})
    wanted = by_hand(net, [(one, weight("rows")), (two, weight("columns"))])
    torch.testing.assert_close(net(x()), wanted)
    plait.fuse(net)
    torch.testing.assert_close(net(x()), wanted)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_gradients_reach_the_weights(kind: str) -> None:
    net = network()
    adapter = attach(net, "lora", "one", seed=1)
    w = weight(kind).requires_grad_()
    plait.activate(net, {"one": {SITE: w}})
    (found,) = torch.autograd.grad(net(x()).square().sum(), w)
    plain = copy.deepcopy(network())
    dense = adapter.deltas[SITE].dense().detach()
    v = weight(kind).requires_grad_()
    out = torch.func.functional_call(plain, {"0.weight": plain[0].weight + v * dense}, (x(),))
    (wanted,) = torch.autograd.grad(out.square().sum(), v)
    torch.testing.assert_close(found, wanted)


def test_a_float_model_stays_float_under_wide_weights() -> None:
    net = network().float()
    plait.attach(net, "lora", name="one", targets=[SITE])
    plait.activate(net, {"one": {SITE: weight("rows")}})
    assert net(x().float()).dtype == torch.float32


def test_rows_scale_a_bias_too_and_columns_of_one_are_refused() -> None:
    net = network()
    adapter = attach(net, "lora", "one", seed=1, bias=True)
    plait.activate(net, {"one": {SITE: weight("rows")}})
    plain = network()
    with torch.no_grad():
        plain[0].weight += adapter.deltas[SITE].dense() * weight("rows")
        plain[0].bias += adapter.deltas[SITE].bias() * weight("rows")[:, 0]
    torch.testing.assert_close(net(x()), plain(x()))
    plait.fuse(net)
    torch.testing.assert_close(net(x()), plain(x()))
    plait.unfuse(net)
    with pytest.raises(PlaitError, match="has a bias, which has no columns"):
        plait.activate(net, {"one": {SITE: weight("columns")}})


def test_other_shapes_are_refused_by_site() -> None:
    net = network()
    attach(net, "lora", "one", seed=1)
    with pytest.raises(PlaitError, match=r"weight at '0' is \[5\]; give a number, \[5, 1\]"):
        plait.activate(net, {"one": {SITE: torch.ones(5)}})
    with pytest.raises(PlaitError, match=r"\[4, 1\]"):
        plait.activate(net, {"one": torch.ones(4, 1)})


def test_channels_of_a_convolution() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
    adapter = plait.attach(net, "lora", name="one", targets=["0"], rank=2)
    net.double()
    for p in adapter.parameters():
        p.data = torch.randn_like(p)
    w = torch.randn(4, 1, dtype=torch.float64)
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plait.activate(net, {"one": 0.0})
    base = net(image)
    plait.activate(net, {"one": 1.0})
    change = net(image) - base
    plait.activate(net, {"one": {"0": w}})
    torch.testing.assert_close(net(image), base + w.reshape(1, 4, 1, 1) * change)
    with pytest.raises(PlaitError, match="takes no weights by column"):
        plait.activate(net, {"one": {"0": torch.ones(1, 27)}})
