"""prune: from a base's folder to a smaller one that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import plait
from plait.compression import load_pruned
from tiny_language_model import tiny_model

TOKENS = torch.arange(20)[None]


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_smaller_model_and_its_tokenizer(run, base: Path, data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "--ratio", 0.5, "--samples", 3, "--max-length", 64)
    code, out, err = run("prune", base, *words, "-o", tmp_path / "small")
    assert code == 0, err
    assert "intermediate_size 24" in out and "from_pretrained loads it" in out
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    count = sum(p.numel() for p in small.parameters())
    assert f"{count:,} after" in out and small.config.num_key_value_heads == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert tokenizer("abc")["input_ids"] == AutoTokenizer.from_pretrained(base)("abc")["input_ids"]
    code, _, err = run("prune", base, *words, "-o", tmp_path / "small")
    assert code == 2 and "exists already" in err


def test_what_training_left_is_cut_from_base_and_adapter(run, base: Path, tmp_path: Path) -> None:
    model = tiny_model()
    adapter = plait.attach(model, "lora", name="p", rank=2)
    rule = {"lora-prune": {"interval": 1, "last": 0}}
    steps = plait.RuleStack(model, [rule], lr=1e-2, total_steps=6)
    for _ in range(6):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        steps.step()
    expected = answers(model)
    steps.finish()
    adapter.info["base"] = str(base)
    adapter.save(tmp_path / "p")
    code, _, err = run("prune", "--adapter", tmp_path / "p", "-o", tmp_path / "small")
    assert code == 0, err
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    plait.load(small, tmp_path / "small" / "adapters" / "p")
    torch.testing.assert_close(answers(small), expected, rtol=1e-4, atol=1e-4)
    code, _, err = run("prune", "--adapter", tmp_path / "p", "--fuse", "-o", tmp_path / "fused")
    assert code == 0, err
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(answers(fused), expected, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "fused" / "adapters").exists()


def test_uneven_widths_and_what_is_wrong(run, base: Path, data: Path, tmp_path: Path) -> None:
    words = ("--importance", "magnitude", "--scope", "global")
    code, _, err = run("prune", base, *words, "-o", tmp_path / "uneven")
    assert code == 2 and "loadable=False" in err
    code, out, err = run("prune", base, *words, "--any", "--ratio", 0.4, "-o", tmp_path / "uneven")
    assert code == 0, err
    assert "load_pruned" in out
    assert answers(load_pruned(tmp_path / "uneven")).shape == (1, 20, 258)
    code, _, err = run("prune", base, "-o", tmp_path / "none")
    assert code == 2 and "needs data=" in err
    code, _, err = run("prune", base, "--data", data, "--order", "frist", "-o", tmp_path / "none")
    assert code == 2 and "first" in err
    assert not (tmp_path / "none").exists()
