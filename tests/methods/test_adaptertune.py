"""AdapterTune on a Llama's blocks: silent start, the formula, and a backbone that comes back."""

import math

import pytest
import torch

import plait
from plait.errors import PlaitError
from tiny_llama import assert_loss_falls, tiny_llama, tokens


def make(**options):
    model = tiny_llama()
    return model, plait.attach(model, "adaptertune", **{"rank": 4, "seed": 1, **options})


def perturb(adapter):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn_like(p))


def test_start_is_the_frozen_model_in_bits():
    model, adapter = make()
    got = model(tokens()).logits
    plait.activate(model, {})
    assert torch.equal(got, model(tokens()).logits)
    assert list(adapter.deltas) == ["model.layers.0", "model.layers.1"]


def test_only_the_up_projection_has_a_gradient_at_the_start():
    model, adapter = make()
    model(tokens(), labels=tokens()).loss.backward()
    for delta in adapter.deltas.values():
        assert delta.U.grad.abs().sum() > 0
        assert delta.b_u.grad.abs().sum() > 0
        assert delta.D.grad.abs().sum() == 0
        assert delta.b_d.grad.abs().sum() == 0


def test_output_of_a_block_is_the_formula():
    model, adapter = make(alpha=0.7)
    perturb(adapter)
    d = adapter.deltas["model.layers.0"]
    x = torch.randn(2, 5, 32)
    rotary = model.model.rotary_emb(x, torch.arange(5)[None])
    block = model.model.layers[0]
    got = block(x, position_embeddings=rotary)
    plait.activate(model, {})
    y = block(x, position_embeddings=rotary).double()
    hidden = y @ d.D.double().t() + d.b_d.double()
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    wanted = y + 0.7 * (hidden @ d.U.double().t() + d.b_u.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_count():
    _, adapter = make()
    sites = [d.site for d in adapter.deltas.values()]
    wanted = 2 * (2 * 4 * 32 + 4 + 32)
    assert adapter.num_parameters() == wanted
    assert plait.get_method("adaptertune").count(sites, adapter.options) == wanted


def test_small_start_is_close_to_the_model_but_not_equal():
    _, adapter = make(start="small")
    delta = adapter.deltas["model.layers.0"]
    assert not delta.traits.zero_start
    change = delta(torch.randn(50, 32))
    assert 0 < change.abs().max() < 1e-4 * math.sqrt(4 * 32)
    assert delta.U.std().item() == pytest.approx(1e-4, rel=0.3)


def test_detaching_restores_the_model_in_bits():
    model = tiny_llama()
    wanted = model(tokens()).logits
    adapter = plait.attach(model, "adaptertune", rank=4)
    perturb(adapter)
    assert not torch.equal(model(tokens()).logits, wanted)
    plait.detach(model)
    assert torch.equal(model(tokens()).logits, wanted)
    assert not any("plait" in name for name, _ in model.named_modules())


def test_every_second_block_by_layers():
    _, adapter = make(layers=[1])
    assert list(adapter.deltas) == ["model.layers.1"]


def test_it_can_be_neither_fused_nor_exported():
    model, adapter = make()
    with pytest.raises(PlaitError, match="not linear"):
        plait.fuse(model)
    with pytest.raises(PlaitError, match="not linear"):
        adapter.to_lora()


def test_impossible_options_are_refused():
    with pytest.raises(PlaitError, match="start"):
        make(start="large")
    with pytest.raises(PlaitError, match="rank"):
        make(rank=0)


def test_loss_falls_on_a_tiny_llama():
    assert_loss_falls("adaptertune", rank=8)
