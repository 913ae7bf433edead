"""RandLoRA, VB-LoRA, DeLoRA and HiRA both ways, with PEFT itself as the oracle."""

import warnings

import pytest
import torch
from peft import DeloraConfig, HiraConfig, RandLoraConfig, VBLoRAConfig
from peft_models import (
    check_both_ways,
    check_in_peft,
    close,
    gpt2,
    llama,
    logits,
    saved_by_peft,
)
from torch import nn

import plait

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NARROW = {"num_vectors": 12, "vector_length": 8, "init_vector_bank_bound": 0.5}

CASES = {
    "randlora": RandLoraConfig(r=6, randlora_alpha=3, target_modules=ALL),
    "randlora of one shape": RandLoraConfig(r=8, randlora_alpha=3, target_modules=["down_proj"]),
    "randlora, sparse": RandLoraConfig(r=6, randlora_alpha=3, sparse=True, target_modules=ALL),
    "vblora": VBLoRAConfig(r=3, target_modules=ALL, **NARROW),
    "vblora of three": VBLoRAConfig(r=3, topk=3, target_modules=["k_proj"], **NARROW),
    "delora": DeloraConfig(r=4, target_modules=ALL),
    "delora by pattern": DeloraConfig(
        r=4,
        delora_lambda=3,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        module_dropout=0.1,
    ),
    "hira": HiraConfig(r=4, target_modules=ALL),
    "hira on the embedding": HiraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("name", CASES)
def test_llama(tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown keys")
        check_both_ways(llama(), CASES[name], tmp_path)


GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


@pytest.mark.parametrize(
    "config",
    [
        RandLoraConfig(r=6, randlora_alpha=3, **GPT2),
        VBLoRAConfig(r=3, **NARROW, **GPT2),
        HiraConfig(r=4, **GPT2),
    ],
    ids=["randlora", "vblora", "hira"],
)
def test_gpt2_with_its_transposed_linears(tmp_path, config):
    check_both_ways(gpt2(), config, tmp_path)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("randlora", {"rank": 5, "alpha": 3.0}),
        ("randlora", {"rank": 5, "alpha": 3.0, "bases": "very-sparse"}),
        ("vblora", {"rank": 3, "vectors": 12, "length": 8, "bound": 0.5}),
        ("delora", {"rank": 3, "start": "zero", "overrides": {"q_proj": {"rank": 2}}}),
        ("hira", {"rank": 3}),
    ],
)
def test_ours_in_peft(tmp_path, method, options):
    check_in_peft(tmp_path / "a", method, options, targets=["q_proj", "v_proj", "up_proj"])


def test_hira_of_two_ranks_is_refused_because_peft_has_one(tmp_path):
    base = llama()
    adapter = plait.attach(base, "hira", rank=3, overrides={"q_proj": {"rank": 2}})
    with pytest.raises(plait.PlaitError, match="one rank"):
        adapter.save(tmp_path / "a", format="peft")


def test_the_bank_of_a_folder_goes_on_training(tmp_path):
    base = llama()
    saved_by_peft(base, CASES["vblora"], tmp_path)
    adapter = plait.load(base, tmp_path).requires_grad_()
    bank = adapter.shared["bank"]
    assert bank.requires_grad and bank.shape == (12, 8)
    base(torch.arange(8)[None]).logits.square().sum().backward()
    assert bank.grad is not None and bank.grad.any()


def test_vblora_in_its_short_form(tmp_path):
    base = llama()
    config = VBLoRAConfig(r=3, target_modules=ALL, save_only_topk_weights=True, **NARROW)
    expected = saved_by_peft(base, config, tmp_path)
    adapter = plait.load(base, tmp_path)
    close(logits(base), expected)
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_projections_that_peft_did_not_save_are_asked_for(tmp_path):
    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = RandLoraConfig(r=6, target_modules=["q_proj"], save_projection=False)
        saved_by_peft(base, config, tmp_path)
    with pytest.raises(plait.PlaitError, match="randlora_A"):
        plait.load(base, tmp_path)


def test_hira_on_convolutions_in_peft(tmp_path):
    import peft

    def model():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 1))

    x, base = torch.randn(2, 3, 8, 8), model()
    theirs = peft.get_peft_model(model(), HiraConfig(r=2, target_modules=["0", "2"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "hira" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    plait.load(base, tmp_path)
    close(base(x), theirs(x))
    assert (base(x) - model()(x)).abs().max() > 1e-2
