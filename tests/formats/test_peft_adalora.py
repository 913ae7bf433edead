"""PEFT's AdaLoRA folders, both ways, with PEFT itself as the oracle: even ranks and pruned ones."""

import copy
import warnings

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft_models import IDS, check_both_ways, close, gpt2, llama, loaded_by_peft, logits
from torch import nn

import plait
from plait.rules.adalora import Adalora

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**changes):
    return AdaLoraConfig(**{"init_r": 6, "target_r": 3, "total_step": 10, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ALL},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5, "lora_dropout": 0.1},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["all", "two and a dropout", "a head"],
)
def test_llama(tmp_path, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no key of PEFT's is unknown
        adapter = check_both_ways(llama(), config(**changes), tmp_path)
    assert adapter.method.name == "adalora"


def test_gpt2_with_its_transposed_linears(tmp_path):
    made = config(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    check_both_ways(gpt2(), made, tmp_path)


def pruned_by_peft(base, path):
    """A few steps of PEFT's own training and pruning, saved; the logits it has then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config(target_modules=ALL, tfinal=2))
        optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if ".lora_" in n])
        for step in range(1, 11):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(path)
        expected = loaded_by_peft(base, path)
        assert torch.allclose(logits(model), expected, atol=1e-5)
    return expected


def test_what_peft_pruned_is_read_with_the_ranks_that_are_left(tmp_path):
    base = llama()
    expected = pruned_by_peft(base, tmp_path / "theirs")
    adapter = plait.load(base, tmp_path / "theirs")
    close(logits(base), expected)
    ranks = [d.rank for d in adapter.deltas.values()]
    assert sum(ranks) == 3 * len(ranks) and max(ranks) > min(ranks)
    bare = plait.read_adapter(tmp_path / "theirs")
    assert all(bare.deltas[path].rank == d.rank for path, d in adapter.deltas.items())
    adapter.save(tmp_path / "ours", format="peft")
    plait.detach(base)
    close(loaded_by_peft(base, tmp_path / "ours"), expected)


def test_what_plait_pruned_loads_in_peft(tmp_path):
    base = llama()
    adapter = plait.attach(base, "adalora", rank=4, alpha=7, seed=0)
    run = plait.RuleStack(base, [Adalora(target_rank=1.5)], lr=3e-3, total_steps=10)
    for _ in range(10):
        (base(input_ids=IDS, labels=IDS).loss + run.extra_loss()).backward()
        run.step()
    run.finish()
    assert len({d.rank for d in adapter.deltas.values()}) > 1
    plain = logits_without(base)
    expected = logits(base)
    adapter.save(tmp_path / "a", format="peft")
    plait.detach(base)
    assert (expected - plain).abs().max() > 1e-3
    close(loaded_by_peft(base, tmp_path / "a"), expected, 2e-5)
    plait.load(base, tmp_path / "a")
    close(logits(base), expected)


def logits_without(base):
    plait.activate(base, {})
    found = logits(base)
    plait.activate(base, "default")
    return found


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1))
    x = torch.randn(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), config(target_modules=["0", "2"]))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(x)
    adapter = plait.load(base, tmp_path / "theirs")
    torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-4)
    adapter.save(tmp_path / "ours", format="peft")
    plait.detach(base)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)


def test_scalings_that_differ_have_no_form_in_peft(tmp_path):
    adapter = plait.attach(llama(), "adalora", overrides={"q_proj": {"alpha": 3.0}}, rank=2)
    with pytest.raises(plait.PlaitError, match="one scaling for all sites"):
        adapter.save(tmp_path / "a", format="peft")


def test_a_type_that_nobody_reads_is_told_the_types_of_every_room(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NOTHING"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(plait.PlaitError, match="ADALORA"):
        plait.read_adapter(tmp_path)
