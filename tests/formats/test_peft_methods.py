"""PEFT's other types that Plait has too, both ways, with PEFT itself as the oracle."""

import pytest
from peft import IA3Config, MissConfig, ShiraConfig, VeraConfig
from peft_models import check_both_ways, check_in_peft, gpt2, llama

import plait

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {
    "vera": VeraConfig(r=6, target_modules=ALL),
    "vera on two": VeraConfig(r=6, target_modules=["k_proj", "down_proj"], vera_dropout=0.1),
    "vera and a head": VeraConfig(r=6, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "miss": MissConfig(r=8, target_modules=ALL),
    "miss with a remainder": MissConfig(r=5, target_modules=["q_proj", "down_proj"]),
    "mini": MissConfig(r=8, target_modules=["q_proj", "v_proj"], init_weights="mini", mini_r=8),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3 without feed-forward": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "ia3 by pattern": IA3Config(
        target_modules=r".*(k|up|down)_proj", feedforward_modules=r".*(down|up)_proj"
    ),
    "shira": ShiraConfig(r=2, target_modules=["q_proj", "up_proj"], random_seed=3),
    "bat": MissConfig(r=8, target_modules=ALL, init_weights="bat"),
}


@pytest.mark.parametrize("name", CASES)
def test_llama(tmp_path, name):
    check_both_ways(llama(), CASES[name], tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ],
    ids=["vera", "ia3"],
)
def test_gpt2_with_its_transposed_linears(tmp_path, config):
    check_both_ways(gpt2(), config, tmp_path)


def test_what_only_the_model_can_say_asks_for_it(tmp_path):
    check_both_ways(llama(), CASES["vera on two"], tmp_path)
    with pytest.raises(plait.PlaitError, match="pass model="):
        plait.read_adapter(tmp_path / "theirs")
    assert plait.read_adapter(tmp_path / "theirs", model=llama()).deltas


@pytest.mark.parametrize(
    ("method", "options", "targets"),
    [
        ("dora", {"rank": 3}, "all-linear"),
        ("vera", {"rank": 5}, ["q_proj", "down_proj"]),
        ("bone", {"rank": 4}, "all-linear"),
        ("ia3", {}, None),
        ("shira", {"rank": 2}, ["q_proj"]),
        ("shira", {"rank": 1, "mask": "wm"}, ["q_proj"]),
        ("salt", {"rank": 2}, ["q_proj", "up_proj"]),
    ],
)
def test_ours_in_peft(tmp_path, method, options, targets):
    check_in_peft(tmp_path / "a", method, options, targets=targets)
