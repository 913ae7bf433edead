"""FourierFT, WaveFT and C3A both ways, with PEFT itself as the oracle."""

import warnings

import pytest
from peft import C3AConfig, FourierFTConfig, WaveFTConfig
from peft_models import check_both_ways, check_in_peft, gpt2, llama

import plait

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {
    "fourierft": FourierFTConfig(n_frequency=40, scaling=60.0, target_modules=ALL),
    "fourierft by pattern": FourierFTConfig(
        n_frequency=30,
        scaling=60.0,
        random_loc_seed=5,
        target_modules=["q_proj", "down_proj"],
        n_frequency_pattern={"down_proj": 50},
    ),
    "waveft": WaveFTConfig(n_frequency=40, scaling=3.0, target_modules=ALL),
    "waveft db3": WaveFTConfig(
        n_frequency=60, scaling=3.0, wavelet_family="db3", target_modules=ALL
    ),
    "waveft without transform": WaveFTConfig(
        n_frequency=60, scaling=3.0, use_idwt=False, target_modules=["k_proj", "up_proj"]
    ),
    "waveft in proportion": WaveFTConfig(
        n_frequency=40, scaling=3.0, proportional_parameters=True, target_modules=ALL
    ),
    "c3a": C3AConfig(block_size=8, init_weights="gaussian", target_modules=ALL),
    "c3a by pattern": C3AConfig(
        block_size=16, target_modules=["q_proj", "k_proj"], block_size_pattern={"k_proj": 4}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama(tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown keys")
        check_both_ways(llama(), CASES[name], tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        FourierFTConfig(
            n_frequency=40, scaling=60.0, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
        ),
        WaveFTConfig(
            n_frequency=40, scaling=3.0, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
        ),
    ],
    ids=["fourierft", "waveft"],
)
def test_gpt2_with_its_transposed_linears(tmp_path, config):
    check_both_ways(gpt2(), config, tmp_path)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fourierft", {"coefficients": 30, "overrides": {"q_proj": {"coefficients": 20}}}),
        ("waveft", {"coefficients": 50, "wavelet": "db2", "location_seed": 3}),
        ("c3a", {"block": 16, "overrides": {"v_proj": {"block": 8}}}),
    ],
)
def test_ours_in_peft(tmp_path, method, options):
    check_in_peft(tmp_path / "a", method, options, targets=["q_proj", "v_proj", "up_proj"])


def test_what_peft_lacks_is_refused(tmp_path):
    base = gpt2()
    adapter = plait.attach(base, "c3a", targets=["c_attn"], block=8)
    with pytest.raises(plait.PlaitError, match=r"nn\.Linear"):
        adapter.save(tmp_path / "a", format="peft")


def test_a_wavelet_that_plait_lacks_is_refused(tmp_path):
    config = WaveFTConfig(n_frequency=40, wavelet_family="coif1", target_modules=["q_proj"])
    with pytest.raises(plait.PlaitError, match="coif1"):
        check_both_ways(llama(), config, tmp_path)
