"""LoHa, LoKr and GraLoRA both ways, with PEFT itself as the oracle."""

import math
import warnings

import pytest
import torch
from peft import GraloraConfig, LoHaConfig, LoKrConfig
from peft_models import (
    check_both_ways,
    check_in_peft,
    close,
    gpt2,
    llama,
    logits,
    peft_model,
)
from torch import nn

import plait
from plait.errors import FormatError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {
    "loha": LoHaConfig(r=4, alpha=2, target_modules=ALL),
    "loha by low rank": LoHaConfig(r=2, alpha=4, target_modules=ALL),
    "loha with patterns": LoHaConfig(
        r=2, target_modules=ALL, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5}
    ),
    "loha with dropouts": LoHaConfig(
        r=2, target_modules=["q_proj"], rank_dropout=0.1, module_dropout=0.1
    ),
    "lokr": LoKrConfig(r=4, alpha=2, target_modules=ALL),
    "lokr, full": LoKrConfig(r=100, alpha=100, target_modules=ALL),
    "lokr, both low-rank": LoKrConfig(r=1, target_modules=ALL, decompose_both=True),
    "lokr by factor": LoKrConfig(r=2, target_modules=ALL, decompose_factor=5),
    "lokr with patterns": LoKrConfig(
        r=2, target_modules=ALL, rank_pattern={"q_proj": 1}, alpha_pattern={"up_proj": 5}
    ),
    "gralora": GraloraConfig(r=4, gralora_k=2, target_modules=ALL),
    "gralora, finer": GraloraConfig(r=8, gralora_k=4, alpha=3, target_modules=["q_proj"]),
    "gralora, hybrid": GraloraConfig(
        r=4, gralora_k=2, hybrid_r=3, gralora_dropout=0.1, target_modules=["v_proj", "up_proj"]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama(tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown keys.*")
        check_both_ways(llama(), CASES[name], tmp_path)


def test_gralora_on_gpt2_with_its_transposed_linears(tmp_path):
    config = GraloraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    check_both_ways(gpt2(), config, tmp_path)


def test_of_two_patterns_the_one_that_made_the_tensors_counts(tmp_path):
    patterns = {".*q_proj": 1, ".*0.self_attn.q_proj": 3}  # PEFT saves them in another order
    model = peft_model(llama(), LoHaConfig(r=2, target_modules=ALL, rank_pattern=patterns))
    model.save_pretrained(tmp_path)
    base = llama()
    plait.load(base, tmp_path)
    close(logits(base), logits(model))


class Pictures(nn.Module):
    """Two convolutions behind the call that `logits` makes."""

    def __init__(self, dimensions=2):
        super().__init__()
        torch.manual_seed(1)
        conv = nn.Conv1d if dimensions == 1 else nn.Conv2d
        self.shape = (2, 4, *[5] * dimensions)
        self.first = conv(4, 6, 3, padding=1)
        self.second = conv(6, 8, 1)

    def forward(self, ids):
        x = torch.sin(torch.arange(math.prod(self.shape)).view(self.shape).float())
        y = self.second(torch.tanh(self.first(x)))
        return type("Output", (), {"logits": y})


@pytest.mark.parametrize(
    ("config", "dimensions"),
    [
        (LoHaConfig(r=2, target_modules=["first", "second"]), 2),
        (LoHaConfig(r=2, target_modules=["first", "second"]), 1),
        (LoKrConfig(r=1, target_modules=["first", "second"]), 2),
        (LoKrConfig(r=1, target_modules=["first", "second"]), 1),
        (LoKrConfig(r=100, target_modules=["first", "second"]), 2),
    ],
    ids=["loha", "loha 1d", "lokr", "lokr 1d", "lokr full"],
)
def test_convolutions(tmp_path, config, dimensions):
    check_both_ways(Pictures(dimensions).eval(), config, tmp_path)


@pytest.mark.parametrize(
    ("config", "dimensions"), [(LoHaConfig, 1), (LoHaConfig, 2), (LoKrConfig, 2)]
)  # PEFT's own LoKr fails on a core over one dimension
def test_tucker_convolutions(tmp_path, config, dimensions):
    given = config(r=1, target_modules=["first", "second"], use_effective_conv2d=True)
    adapter = check_both_ways(Pictures(dimensions).eval(), given, tmp_path)
    cores = {p for p, d in adapter.deltas.items() if {"t1", "t2"} & {n for n, _ in d.own_tensors()}}
    assert cores == {"first"}  # a 1 x 1 kernel has none


def test_lokr_s_full_factor_in_one_dimension_is_another_change_there(tmp_path):
    given = LoKrConfig(r=100, target_modules=["first"])
    peft_model(Pictures(1), given).save_pretrained(tmp_path / "theirs")
    with pytest.raises(FormatError, match="one-dimensional"):
        plait.load(Pictures(1), tmp_path / "theirs")
    ours = plait.attach(Pictures(1), "lokr", targets=["first"], rank=100)
    with pytest.raises(FormatError, match="one-dimensional"):
        ours.save(tmp_path / "ours", format="peft")


def test_sites_are_read_without_the_model_where_the_tensors_tell(tmp_path):
    for name, config in (("gralora", CASES["gralora"]), ("lokr", CASES["lokr, full"])):
        check_both_ways(llama(), config, tmp_path / name)
        bare = plait.read_adapter(tmp_path / name / "theirs")
        whole = plait.read_adapter(tmp_path / name / "theirs", model=llama())
        assert set(bare.deltas) == set(whole.deltas)
        for path, delta in whole.deltas.items():
            assert bare.deltas[path].site.shape == delta.site.shape
            assert torch.equal(bare.deltas[path].dense(), delta.dense())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loha", {"rank": 2, "alpha": 5.0}),
        ("lokr", {"rank": 2, "overrides": {"q_proj": {"rank": 1, "alpha": 3.0}}}),
        ("gralora", {"rank": 4, "k": 4, "hybrid_rank": 2}),
    ],
)
def test_ours_in_peft(tmp_path, method, options):
    check_in_peft(tmp_path / "a", method, options)


def test_what_peft_lacks_is_refused(tmp_path):
    adapter = plait.attach(gpt2(), "loha", targets=["c_attn"], rank=2)
    with pytest.raises(FormatError, match="Conv1D"):
        adapter.save(tmp_path / "a", format="peft")
