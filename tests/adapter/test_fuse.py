"""fuse and unfuse: into the weights and out of them, bit for bit, and what is refused between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import plait
from plait import PlaitError
from plait.testing import make_model, perturb, tiny_llama

TARGETS = {"conv": "all-conv", "embedding": "embeddings", "parameter": "experts"}


def added(model: nn.Module, name: str, seed: int, **options: object) -> plait.Adapter:
    adapter = plait.attach(model, "lora", name=name, seed=seed, rank=2, **options)
    perturb(adapter, seed)
    return adapter


def tokens() -> Tensor:
    return torch.arange(10).reshape(2, 5)


def test_fusing_writes_the_weighted_sum_into_the_weights() -> None:
    model = make_model("linear")
    base = {n: p.clone() for n, p in model.named_parameters()}
    a, b = added(model, "a", 1), added(model, "b", 2, targets=["up"], bias=True)
    plait.activate(model, {"a": 0.5, "b": -2.0})
    plait.fuse(model)
    up = model.layers[0].up
    wanted = base["layers.0.up.weight"].double()
    for weight, adapter in ((0.5, a), (-2.0, b)):
        delta = adapter.deltas["layers.0.up"]
        wanted = wanted + weight * delta.scaling * delta.B.double() @ delta.A.double()
    torch.testing.assert_close(up.weight.double(), wanted, atol=1e-6, rtol=1e-6)
    change = b.deltas["layers.0.up"].bias()
    torch.testing.assert_close(up.bias, base["layers.0.up.bias"] - 2.0 * change)
    assert not up.weight.requires_grad and up.__dict__["_plait_plan"] is None


def test_a_bias_is_created_where_there_was_none_and_taken_away_again() -> None:
    model = make_model("linear")
    adapter = added(model, "a", 1, targets=["down"], bias=True)
    plait.fuse(model)
    down = model.layers[0].down
    torch.testing.assert_close(down.bias, adapter.deltas["layers.0.down"].bias())
    plait.unfuse(model)
    assert down.bias is None


def test_a_half_precision_base_keeps_its_dtype_with_biases() -> None:
    model = make_model("linear", torch.bfloat16)
    added(model, "a", 1, bias=True)
    plait.fuse(model)
    assert {p.dtype for p in (model.head.weight, model.head.bias)} == {torch.bfloat16}
    model(torch.randn(2, 12, dtype=torch.bfloat16))


def test_fuse_unties_a_tied_embedding_only_at_the_fused_module() -> None:
    model = tiny_llama(tie_word_embeddings=True).eval()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    tied = embedding.weight
    base = model(tokens()).logits
    adapter = added(model, "a", 1, targets="embeddings")
    assert list(adapter.deltas) == ["model.embed_tokens"]
    adapted = model(tokens()).logits
    plait.fuse(model)
    assert head.weight is tied, "the head was not targeted, so it must stay the base's"
    assert embedding.weight is not tied
    torch.testing.assert_close(model(tokens()).logits, adapted, atol=1e-5, rtol=1e-5)
    plait.unfuse(model)
    assert embedding.weight is tied and head.weight is tied
    plait.detach(model)
    assert torch.equal(model(tokens()).logits, base)


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone() -> None:
    model = tiny_llama(tie_word_embeddings=True).eval()
    rows = model.get_input_embeddings()(tokens())
    adapter = added(model, "a", 1, targets=["lm_head"])
    assert torch.equal(model.get_input_embeddings()(tokens()), rows)
    adapted = model(tokens()).logits
    plait.fuse(model)
    assert torch.equal(model.get_input_embeddings()(tokens()), rows)
    torch.testing.assert_close(model(tokens()).logits, adapted, atol=1e-5, rtol=1e-5)
    assert adapter.num_parameters() == 2 * (16 + 32)


def test_while_fused_everything_that_would_mix_things_up_is_refused() -> None:
    model = make_model("linear")
    added(model, "a", 1)
    plait.fuse(model)
    for call in (
        lambda: plait.fuse(model),
        lambda: plait.activate(model, {}),
        lambda: plait.detach(model),
        lambda: plait.attach(model, "lora", name="b"),
        lambda: plait.per_row(model, ["a"]).__enter__(),
    ):
        with pytest.raises(PlaitError, match="fused"):
            call()
    plait.unfuse(model)
    plait.detach(model)
    with pytest.raises(PlaitError):
        plait.unfuse(model)


def test_nothing_fused_says_so() -> None:
    model = make_model("linear")
    added(model, "a", 1)
    with pytest.raises(PlaitError, match="nothing is fused"):
        plait.unfuse(model)


def test_without_the_old_base_there_is_no_way_back() -> None:
    model = make_model("linear")
    added(model, "a", 1)
    x = torch.randn(3, 12)
    out = model(x).logits
    plait.fuse(model, keep_base=False)
    torch.testing.assert_close(model(x).logits, out, atol=1e-5, rtol=1e-5)
    with pytest.raises(PlaitError, match="keep_base=False"):
        plait.unfuse(model)


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "conv", "embedding", "parameter"])
def test_fused_weights_keep_their_stored_layout(kind: str) -> None:
    model = make_model(kind)
    before = {n: (p.shape, p.is_contiguous()) for n, p in model.named_parameters()}
    added(model, "a", 1, targets=TARGETS.get(kind, "all-linear"))
    plait.fuse(model)
    after = {
        n: (p.shape, p.is_contiguous()) for n, p in model.named_parameters() if "plait" not in n
    }
    assert after == before


def test_a_fused_model_saves_as_a_plain_base() -> None:
    model = make_model("linear")
    added(model, "a", 1)
    x = torch.randn(3, 12)
    plait.fuse(model)
    fresh = make_model("linear")
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(x).logits, model(x).logits)


def test_a_quantised_base_is_not_fused_into() -> None:
    class Integer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bias = 3, 4, None
            self.register_buffer("weight", torch.randint(4, (4, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.float().t()

    model = nn.Sequential(Integer())
    plait.attach(model, "lora", rank=2)
    with pytest.raises(PlaitError, match="quantised"):
        plait.fuse(model)
    plait.detach(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_change_is_written_into_the_weight_itself_and_taken_back_bit_for_bit(
    dtype,
) -> None:
    model = make_model("linear", dtype)
    sparse = [plait.attach(model, "shira", name=n, seed=s, density=0.1) for s, n in enumerate("ab")]
    for adapter in sparse:
        perturb(adapter, 3)
    plait.activate(model, {"a": 1.0, "b": 0.5})
    base = {n: p.clone() for n, p in model.named_parameters()}
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    plait.fuse(model)
    for path, delta in sparse[0].deltas.items():
        weight = model.get_submodule(path).weight
        assert weight.data_ptr() == storage[f"{path}.weight"]
        change = delta.dense() + 0.5 * sparse[1].deltas[path].dense()
        wanted = base[f"{path}.weight"].double() + change.double()
        close = (
            {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
        )
        torch.testing.assert_close(weight.double(), wanted, **close)
    plait.unfuse(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_a_sparse_change_of_a_tied_weight_goes_to_the_fused_module_alone() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    model.two.weight = model.one.weight
    tied = model.two.weight.clone()
    perturb(plait.attach(model, "shira", targets=["one"], seed=0, density=0.2))
    plait.fuse(model)
    assert torch.equal(model.two.weight, tied) and not torch.equal(model.one.weight, tied)
    plait.unfuse(model)
    assert torch.equal(model.one.weight, tied)
