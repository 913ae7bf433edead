"""Every delta with a dropout option drops features of its input in training, whatever the site."""

import pytest
import torch
from torch import nn

import plait


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)], ids=["linear", "conv"])
def test_dropout_acts_in_training_only(layer: nn.Module):
    model = nn.Sequential(layer)
    x = torch.randn(5, 6) if isinstance(layer, nn.Linear) else torch.randn(5, 6, 3, 3)
    adapter = plait.attach(model, "lora", targets=["0"], rank=3, dropout=0.5, seed=0)
    nn.init.normal_(adapter.deltas["0"].B)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_dropout_keeps_the_mean_of_the_change():
    model = nn.Sequential(nn.Conv2d(6, 4, 1))
    x = torch.randn(1, 6, 2, 2).expand(4000, -1, -1, -1)
    adapter = plait.attach(model, "lora", targets=["0"], rank=3, dropout=0.3, seed=0)
    nn.init.normal_(adapter.deltas["0"].B, std=0.3)
    want = model.eval()(x[:1])
    torch.testing.assert_close(model.train()(x).mean(0, keepdim=True), want, atol=0.03, rtol=0.03)
