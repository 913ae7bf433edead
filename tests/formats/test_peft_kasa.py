"""PEFT's KaSA folders, both ways, with PEFT itself as the oracle."""

import pytest
import torch
from peft import KasaConfig, LoraConfig
from peft_models import check_both_ways, gpt2, llama, peft_model

import plait

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**more):
    given = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "kasa_config": KasaConfig(), **more}
    return LoraConfig(**given)


CASES = {
    "all": config(),
    "weights": config(kasa_config=KasaConfig(beta=0.1, gamma=0.2)),
    "two ranks": config(rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 3}),
    "rslora and dropout": config(use_rslora=True, lora_dropout=0.1, target_modules=["q_proj"]),
    "a head": config(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", CASES)
def test_llama(tmp_path, name, recwarn):
    adapter = check_both_ways(llama(), CASES[name], tmp_path)
    assert adapter.method.name == "kasa"
    assert not [w for w in recwarn if "unknown keys" in str(w.message)]
    given = CASES[name].kasa_config
    assert adapter.options.beta == given.beta and adapter.options.gamma == given.gamma


def test_the_penalty_is_pefts_averaged_over_sites(tmp_path):
    base, settings = llama(), config(kasa_config=KasaConfig(beta=0.1, gamma=0.2))
    theirs = peft_model(base, settings)
    theirs.save_pretrained(tmp_path)
    adapter = plait.load(base, tmp_path)
    want = theirs.base_model._get_kasa_loss() / len(adapter.deltas)
    torch.testing.assert_close(plait.auxiliary_loss(base), want)


def test_the_cut_cannot_be_made_without_the_base(tmp_path):
    peft_model(llama(), config()).save_pretrained(tmp_path)
    with pytest.raises(plait.PlaitError, match=r"plait\.load"):
        plait.read_adapter(tmp_path)
    assert plait.read_adapter(tmp_path, model=llama()).deltas


def test_what_peft_lacks_is_refused(tmp_path):
    model = gpt2()
    adapter = plait.attach(model, "kasa", rank=2, targets=["c_fc"])
    with pytest.raises(plait.PlaitError, match=r"nn\.Linear"):
        adapter.save(tmp_path / "a", format="peft")
    adapter.to_lora().save(tmp_path / "b", format="peft")
    plain = plait.attach(llama(), "kasa", rank=2, truncate=False)
    with pytest.raises(plait.PlaitError, match="always cuts"):
        plain.save(tmp_path / "c", format="peft")
