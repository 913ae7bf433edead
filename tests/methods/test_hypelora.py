"""HypeLoRA: the network against torch's own layers, silent start, one network for all sites."""

import dataclasses

import pytest
import torch
from torch import nn

import plait
import tiny
from plait.adapter import bind, install
from plait.errors import PlaitError
from plait.methods import _hypernet
from plait.testing import check_method

METHOD = plait.get_method("hypelora")
SMALL = {"rank": 2, "embedding": 8, "hidden": 10, "heads": 2}
FORMS = {
    "fixed": {},
    "generated": {"factor_a": "generated", "depth": 2},
    "transformer": {"network": "transformer", "depth": 2},
}


def llama(form="fixed", size=0.3, **more):
    model = tiny.llama()
    options = {**SMALL, **FORMS[form], **more}
    adapter = plait.attach(model, "hypelora", targets=["q_proj", "v_proj"], seed=1, **options)
    if size:
        tiny.scramble(adapter, size)
    return model, adapter


@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_base_model_and_heads_have_a_gradient(form):
    model, adapter = llama(form, size=0.0)
    got = tiny.logits(model)
    plait.activate(model, {})
    assert torch.equal(tiny.logits(model), got)
    plait.activate(model, "default")
    model(**tiny.batch()).loss.backward()
    for delta in adapter.deltas.values():
        assert adapter.shared[f"B_{delta.site.out_features}_weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_embedding_of_every_slot(form):
    model, adapter = llama(form)
    model(**tiny.batch()).loss.backward()
    assert (adapter.shared["slots"].grad.abs().sum(1) > 0).all()
    assert len(adapter.shared["slots"]) == len(adapter.deltas) == 4


@pytest.mark.parametrize("form", ["fixed", "generated"])
def test_factors_are_the_networks_formula(form):
    _, adapter = llama(form)
    shared, o = adapter.shared, adapter.options
    for slot, delta in enumerate(adapter.deltas.values()):
        hidden = shared["slots"][slot]
        for i in range(o.depth):
            hidden = nn.functional.gelu(shared[f"{i}_weight"] @ hidden + shared[f"{i}_bias"])
        size = delta.site.out_features
        B = (shared[f"B_{size}_weight"] @ hidden + shared[f"B_{size}_bias"]).view(2, size).T
        A = delta.A
        if form == "generated":
            A = A + (shared["A_32_weight"] @ hidden + shared["A_32_bias"]).view(2, 32)
        torch.testing.assert_close(delta.dense(), 2.0 * B @ A, rtol=1e-4, atol=1e-5)


def test_the_encoder_is_torchs_encoder_layer():
    _, adapter = llama("transformer")
    shared, o = adapter.shared, adapter.options
    tokens = shared["slots"].detach()[None]
    for i in range(o.depth):
        layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
        named = {
            "self_attn.in_proj": "read",
            "self_attn.out_proj": "mix",
            "linear1": "wide",
            "linear2": "back",
        }
        state = {}
        for theirs, ours in named.items():
            joint = "_" if theirs.endswith("in_proj") else "."
            for kind in ("weight", "bias"):
                state[f"{theirs}{joint}{kind}"] = shared[f"{i}_{ours}_{kind}"]
        for theirs, ours in {"norm1": "first", "norm2": "second"}.items():
            state[f"{theirs}.weight"] = shared[f"{i}_{ours}_scale"]
            state[f"{theirs}.bias"] = shared[f"{i}_{ours}_shift"]
        layer.load_state_dict(state)
        tokens = layer(tokens)
    for slot in range(4):
        got = _hypernet.features(shared, o, slot)
        torch.testing.assert_close(got, tokens[0, slot], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_lora_has_the_same_logits(form):
    model, adapter = llama(form)
    wanted = tiny.logits(model)
    lora = adapter.to_lora()
    fresh = tiny.llama()
    assert (tiny.logits(fresh) - wanted).abs().max() > 1e-2
    install(fresh, bind(lora, fresh))
    torch.testing.assert_close(tiny.logits(fresh), wanted, rtol=1e-5, atol=1e-5)
    assert all(d.rank == 2 for d in lora.deltas.values())


def test_a_fixed_draw_has_no_gradient_and_comes_from_the_seed(tmp_path):
    model, adapter = llama()
    assert not any(name.endswith(".A") for name, _ in adapter.named_parameters())
    assert not any(name.endswith(".A") for name in adapter.state_dict())
    adapter.save(tmp_path / "a")
    fresh = tiny.llama()
    again = plait.load(fresh, tmp_path / "a")
    for path, delta in adapter.deltas.items():
        assert torch.equal(again.deltas[path].A, delta.A)
    torch.testing.assert_close(tiny.logits(fresh), tiny.logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_count_grows_by_an_embedding_a_slot(form):
    counts = []
    for layers in (2, 5):
        model = tiny.llama(num_hidden_layers=layers)
        options = {**SMALL, **FORMS[form]}
        adapter = plait.attach(model, "hypelora", targets=["q_proj", "v_proj"], **options)
        sites = [d.site for d in adapter.deltas.values()]
        assert adapter.num_parameters() == METHOD.count(sites, adapter.options)
        counts.append(adapter.num_parameters())
    assert counts[1] - counts[0] == 6 * SMALL["embedding"]


@pytest.mark.parametrize("form", ["generated", "transformer"])
def test_the_kit_holds_for_the_other_forms(form):
    example = {**SMALL, **FORMS[form]}
    other = dataclasses.replace(METHOD, name="hypelora-other", example=example)
    check_method(other, kinds=["linear"], dtypes=[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_training(form):
    model, adapter = llama(form, size=0.0)
    losses = tiny.losses(model, adapter, lr=3e-2)
    assert losses[-1] < 0.95 * losses[0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(PlaitError, match="one network"):
        llama(overrides={"q_proj": {"rank": 4}})
    for wrong in (
        {"network": "cnn"},
        {"factor_a": "random"},
        {"depth": 0},
        {"network": "transformer", "embedding": 10, "heads": 4},
    ):
        with pytest.raises(PlaitError):
            METHOD.options(**wrong)
