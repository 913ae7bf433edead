"""PETL-AST: both blocks against torch's own modules, on a spectrogram transformer and a Llama."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import plait
import tiny
from plait.errors import PlaitError
from plait.testing import check_method

METHOD = plait.get_method("ast-petl")


def spectrogram_model():
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_length=48,
        num_mel_bins=32,
        num_labels=5,
    )
    torch.manual_seed(2)
    model = ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sounds(rows=3):
    g = torch.Generator().manual_seed(4)
    return torch.randn(rows, 48, 32, generator=g)


class Conformer(nn.Module):
    """The block of torch's modules, to which a delta's tensors are handed."""

    def __init__(self, delta):
        super().__init__()
        d, k, size = delta.site.out_features, delta.up.shape[1], delta.options.kernel
        self.norm, self.down, self.glu = nn.LayerNorm(d), nn.Linear(d, 2 * k), nn.GLU()
        self.conv = nn.Conv1d(k, k, size, padding="same", groups=k, bias=False)
        self.batch, self.silu, self.up = nn.BatchNorm1d(k), nn.SiLU(), nn.Linear(k, d)
        with torch.no_grad():
            for module, weight, bias in (
                (self.norm, delta.norm_scale, delta.norm_shift),
                (self.down, delta.down, delta.down_bias),
                (self.batch, delta.batch_scale, delta.batch_shift),
                (self.up, delta.up, delta.up_bias),
            ):
                module.weight.copy_(weight)
                module.bias.copy_(bias)
            self.conv.weight.copy_(delta.depthwise)
            self.batch.running_mean.copy_(delta.mean)
            self.batch.running_var.copy_(delta.variance)

    def forward(self, x):
        hidden = self.glu(self.down(self.norm(x))).transpose(1, 2)
        return self.up(self.silu(self.batch(self.conv(hidden))).transpose(1, 2))


@pytest.mark.parametrize("kernel", [3, 4, 8])
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_the_convolution_block_is_torchs_modules_in_a_row(kernel, placement):
    model = spectrogram_model()
    adapter = plait.attach(model, "ast-petl", rank=6, kernel=kernel, placement=placement)
    tiny.scramble(adapter, 0.3)
    path, delta = next(iter(adapter.deltas.items()))
    delta.variance.uniform_(0.5, 2.0)
    delta.mean.normal_()
    x = torch.randn(2, 9, 32)
    got = model.get_submodule(path)(x)
    plait.activate(model, {})
    y = model.get_submodule(path)(x)
    oracle = Conformer(delta).eval()
    seen = x if placement == "parallel" else y
    torch.testing.assert_close(got, y + oracle(seen), rtol=1e-4, atol=1e-5)


def test_the_bottleneck_is_its_formula():
    model = spectrogram_model()
    adapter = plait.attach(model, "ast-petl", block="bottleneck", rank=6, residual=True)
    tiny.scramble(adapter, 0.3)
    path, delta = next(iter(adapter.deltas.items()))
    x = torch.randn(2, 9, 32)
    got = model.get_submodule(path)(x)
    plait.activate(model, {})
    hidden = nn.functional.gelu(x @ delta.down.T + delta.down_bias)
    wanted = model.get_submodule(path)(x) + x + hidden @ delta.up.T + delta.up_bias
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not delta.traits.zero_start


def test_batch_statistics_are_those_of_batch_norm_and_are_saved(tmp_path):
    model = spectrogram_model()
    adapter = plait.attach(model, "ast-petl", rank=6, kernel=3)
    delta = next(iter(adapter.deltas.values()))
    oracle = Conformer(delta).train()
    delta.train()
    for _ in range(3):
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(delta(x), oracle(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(delta.mean, oracle.batch.running_mean)
    torch.testing.assert_close(delta.variance, oracle.batch.running_var)
    adapter.save(tmp_path / "a")
    again = plait.read_adapter(tmp_path / "a").deltas[delta.site.path]
    assert torch.equal(again.mean, delta.mean) and torch.equal(again.variance, delta.variance)


def test_gradient_checkpointing_counts_a_batch_once():
    adapter = plait.attach(spectrogram_model(), "ast-petl", rank=6, kernel=3)
    delta = next(iter(adapter.deltas.values()))
    delta.train()
    x = torch.randn(2, 9, 32, requires_grad=True)
    delta(x)
    once = delta.mean.clone()
    delta.mean.zero_(), delta.variance.fill_(1.0)
    checkpoint(delta, x, use_reentrant=False).sum().backward()
    assert once.any() and torch.equal(delta.mean, once)


@pytest.mark.parametrize("block", ["conformer", "bottleneck"])
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_starts_at_the_base_with_a_gradient_that_moves_the_weights(block, placement):
    model = spectrogram_model()
    before = model(sounds()).logits
    adapter = plait.attach(
        model, "ast-petl", block=block, placement=placement, rank=4, kernel=5, seed=1
    )
    assert torch.equal(model(sounds()).logits, before)
    model(sounds(), labels=torch.tensor([0, 1, 2])).loss.backward()
    for delta in adapter.deltas.values():
        assert delta.up.grad.abs().sum() > 0
    tiny.scramble(adapter)
    assert not torch.equal(model(sounds()).logits, before)
    plait.activate(model, {})
    assert torch.equal(model(sounds()).logits, before)


def test_convolution_moves_with_its_input_away_from_the_borders():
    model = spectrogram_model()
    adapter = plait.attach(model, "ast-petl", rank=6, kernel=5)
    tiny.scramble(adapter, 0.3)
    delta = next(iter(adapter.deltas.values()))
    x = torch.randn(1, 20, 32)
    shifted = torch.roll(x, 3, dims=1)
    torch.testing.assert_close(
        delta(shifted)[:, 5:-2], torch.roll(delta(x), 3, dims=1)[:, 5:-2], rtol=1e-4, atol=1e-5
    )
    changed = x.clone()
    changed[:, 10] = torch.randn(32)
    moved = (delta(changed) - delta(x)).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [8, 9, 10, 11, 12]  # two tokens each way


def test_houlsbys_placement_with_norms_and_head():
    model = spectrogram_model()
    names = ["layernorm_after", "classifier"]
    adapter = plait.attach(
        model, "ast-petl", targets=["attention", "mlp"], train_modules=names, rank=4, kernel=3
    )
    before = {n: p.clone() for n, p in model.named_parameters() if "plait" not in n}
    first = model(sounds()).logits
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model(sounds(), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert {path.rpartition(".")[2] for path in adapter.deltas} >= {"attention", "mlp"}
    assert not torch.equal(model.eval()(sounds()).logits, first)


@pytest.mark.parametrize(
    ("options", "per_site"),
    [
        ({"rank": 4, "kernel": 5}, 3 * 4 * 32 + 4 * 9 + 3 * 32),
        ({"block": "bottleneck", "reduction": 8}, 2 * 4 * 32 + 4 + 32),
    ],
)
def test_counts(options, per_site):
    adapter = plait.attach(spectrogram_model(), "ast-petl", **options)
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == METHOD.count(sites, adapter.options) == 2 * per_site
    assert next(iter(adapter.deltas)).endswith("layers.0.mlp")


def test_impossible_options_are_refused():
    for wrong in ({"block": "conv"}, {"kernel": 0}, {"reduction": 0}, {"rank": 0}):
        with pytest.raises(PlaitError):
            METHOD.options(**wrong)
    with pytest.raises(PlaitError, match="sequential"):
        METHOD.options(placement="sequential", residual=True)


@pytest.mark.parametrize(
    "example", [{"block": "bottleneck", "rank": 4}, {"placement": "sequential", "rank": 4}]
)
def test_the_kit_holds_for_the_other_forms(example):
    other = dataclasses.replace(METHOD, name="ast-petl-other", example=example)
    check_method(other, dtypes=[torch.float32])
