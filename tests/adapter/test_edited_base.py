"""An active adapter that rewrites W must stay invisible to every other adapter."""

import torch
from torch import nn

import plait


def edited():
    """A linear layer, its own weight, and an active adapter that has changed columns of it."""
    model = nn.Sequential(nn.Linear(12, 8))
    weight = model[0].weight.detach().clone()
    adapter = plait.attach(model, "paca", name="columns", rank=3)
    with torch.no_grad():
        adapter.deltas["0"].P.normal_()
    model(torch.randn(1, 12))
    assert not torch.equal(model[0].weight, weight)
    return model, weight


def test_what_is_derived_from_W_is_derived_from_the_base():
    model, weight = edited()
    live = model[0].weight.detach().clone()
    salt = plait.attach(model, "salt", name="b", activate=False).deltas["0"]
    torch.testing.assert_close(salt.U @ torch.diag(salt.S) @ salt.Vh, weight)
    assert torch.equal(model[0].weight, live)  # the active adapter is in W again
    plait.activate(model, "b")
    assert torch.equal(model[0].weight, weight)


def test_rows_of_other_adapters_run_on_the_base():
    model, weight = edited()
    plait.attach(model, "lora", name="b", rank=2, activate=False)
    x = torch.randn(2, 12)
    live = model(x)
    with plait.per_row(model, [None, "b"]):
        wanted = torch.nn.functional.linear(x, weight, model[0].bias)
        torch.testing.assert_close(model(x), wanted)
    assert torch.equal(model(x), live)


def test_a_statistics_pass_between_runs_through_the_active_adapter():
    model, weight = edited()
    x = torch.randn(4, 12)
    live = model(x)
    model[0].get_submodule("plait_deltas")["columns"].deactivated()
    assert torch.equal(model[0].weight, weight)
    torch.testing.assert_close(model(x), live)
