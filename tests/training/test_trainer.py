"""Training: the Trainer goes where the bare loop goes, and writes what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bare_loop import run
from safetensors.torch import load_file
from tiny_run import make_base, make_recipe, make_tokenizer, rows

import plait
from plait.adapter import Rule
from plait.errors import PlaitError
from plait.rules._base_weights import FullTraining, base_parameters
from plait.training.data import Collator, encode_all, read_examples
from plait.training.dryrun import dry_run, make_rules
from plait.training.report import read_log


def test_the_output_holds_the_adapter_the_log_and_the_recipe_and_no_base_weight(
    tmp_path: Path,
) -> None:
    recipe = make_recipe(tmp_path, export=["peft"])
    result = run(recipe, eval_data=rows(6, 1))
    adapter = plait.read_adapter(tmp_path / "adapter")
    for name, value in result.adapter.state_dict().items():
        assert torch.equal(adapter.state_dict()[name], value)
    log = read_log(tmp_path / "log.jsonl")
    wanted = {"step", "total", "loss", "lr", "tokens_per_second", "elapsed", "remaining"}
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 9))
    assert all(wanted | {"peak_memory"} <= set(r) for r in log if "loss" in r)
    assert log[-1]["eval_loss"] == result.eval_loss
    base = {n.rpartition(".")[0] for n in base_parameters(result.model)}
    for file in tmp_path.rglob("*.safetensors"):
        assert all("lora" in k or k.rpartition(".")[2] in ("A", "B") for k in load_file(file)), base
    for file in tmp_path.rglob("*.pt"):
        assert file.stat().st_size < 60_000
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_parity_is_measured_and_holds(tmp_path: Path) -> None:
    result = run(make_recipe(tmp_path, export=["peft"]))
    assert [c.name for c in result.parity.comparisons] == [
        "fused",
        "reloaded from adapter/",
        "reloaded from peft/",
    ]
    assert result.parity.passed
    assert all(c.difference is not None for c in result.parity.comparisons)
    assert list(plait.adapters(result.model)) == ["default"]


def test_parity_notices_a_damaged_copy(tmp_path: Path) -> None:
    from plait.training.parity import check_parity

    result = run(make_recipe(tmp_path, parity=False))
    with torch.no_grad():
        result.adapter.deltas["model.layers.1.mlp.up_proj"].B += 0.5
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])}
    parity = check_parity(result.model, result.adapter, [batch], {"plait": tmp_path / "adapter"})
    assert not parity.passed and "DIFFERS" in str(parity)
    assert parity.comparisons[0].passed


def test_a_method_that_cannot_fuse_says_so(tmp_path: Path) -> None:
    result = run(make_recipe(tmp_path, train_modules=["norm"]))
    fused = result.parity.comparisons[0]
    assert fused.difference is None and "cannot be fused" in str(fused)
    assert result.parity.passed


def test_evaluation_is_the_mean_over_tokens(tmp_path: Path) -> None:
    held_out = rows(7, 5)
    result = run(make_recipe(tmp_path, batch_size=3), eval_data=held_out)
    data = encode_all(read_examples(held_out), make_tokenizer(), 16, False).items
    total = count = 0.0
    with torch.no_grad():
        for item in data:
            batch = Collator(0)([item])
            loss = float(result.model(**batch).loss)
            total, count = total + loss * item.trained, count + item.trained
    assert result.eval_loss == pytest.approx(total / count, rel=1e-5)


def test_packing_and_checkpointing_train_too(tmp_path: Path) -> None:
    plain = run(make_recipe(tmp_path / "a", options={"rank": 2}))
    saved = run(make_recipe(tmp_path / "b", options={"rank": 2}, gradient_checkpointing=True))
    for name, value in plain.adapter.state_dict().items():
        torch.testing.assert_close(saved.adapter.state_dict()[name], value, atol=1e-4, rtol=1e-3)
    packed = run(make_recipe(tmp_path / "c", packing=True, steps=20))
    assert packed.history[-1]["loss"] < packed.history[0]["loss"]


def test_adapters_stay_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    result = run(make_recipe(tmp_path), model=make_base(dtype=torch.bfloat16))
    assert {p.dtype for p in result.adapter.parameters()} == {torch.float32}
    assert next(result.model.model.embed_tokens.parameters()).dtype == torch.bfloat16
    assert result.parity.passed


def test_full_training_saves_a_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    start = {n: p.detach().clone() for n, p in base_parameters(make_base()).items()}
    result = run(make_recipe(tmp_path, method="none", options={}))
    assert result.adapter is None and result.parity is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in base_parameters(result.model).items():
        assert torch.equal(again.get_parameter(name), value)
        assert not torch.equal(value, start[name])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = make_base()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PlaitError, match="loss is nan at step 1"):
        run(make_recipe(tmp_path), model=model)


def test_the_first_step_tries_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = plait.Adapter.save

    def save(self, path, format="plait"):
        tried.append(Path(path).parent.name)
        if len(tried) == 1:
            raise OSError("no space left")
        return real(self, path, format)

    monkeypatch.setattr(plait.Adapter, "save", save)
    with pytest.raises(OSError, match="no space"):
        run(make_recipe(tmp_path, save_every=100))
    assert tried == [".trial-save.tmp"] and not list(tmp_path.glob(".trial*"))


# -- dry run --------------------------------------------------------------------------------------


def test_the_dry_run_tells_sites_sizes_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = make_base()
    classes = [type(m) for m in model.modules()]
    found = dry_run(
        model, make_recipe(tmp_path, options={"rank": 2}, targets=["q_proj", "up_proj"])
    )
    assert [type(m) for m in model.modules()] == classes
    assert found.by_type == {"q_proj": 3, "up_proj": 3} and len(found.sites) == 6
    assert found.trainable == 3 * 2 * (16 + 16) + 3 * 2 * (16 + 32)
    assert found.adapter_bytes == 4 * found.trainable
    text = str(found)
    assert "3 q_proj" in text and "model.layers.0.self_attn.q_proj" in text and "peak" in text


def test_the_dry_run_refuses_what_cannot_go_together(tmp_path: Path) -> None:
    cases = [
        ({"rules": ["lisa"]}, "Lisa trains base weights"),
        ({"method": "increlora", "options": {}, "rules": ["lora-plus"]}, "needs"),
        ({"rules": ["increlora"]}, "method increlora; attach"),
        ({"method": "none", "options": {}, "rules": ["lora-pro"]}, "needs an adapter"),
        ({"method": "none", "options": {}, "initializer": "lora"}, "no adapter"),
    ]
    for changes, message in cases:
        recipe = make_recipe(tmp_path, **changes)
        assert any(message in r for r in dry_run(make_base(), recipe).refusals), changes
        with pytest.raises(PlaitError, match=message):
            run(recipe)
    assert not (tmp_path / "log.jsonl").exists()


def test_predicted_activations_are_what_autograd_keeps(tmp_path: Path) -> None:
    model = make_base()
    plait.attach(model, "lora", rank=2)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.randint(2, 16, (4, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, labels=ids)
    log_probabilities = 4 * 16 * 16 * 4
    blocks = sum(t.untyped_storage().nbytes() for t in kept.values()) - log_probabilities
    recipe = make_recipe(tmp_path, batch_size=4, max_length=16, options={"rank": 2})
    predicted = dry_run(make_base(), recipe).memory["blocks"]
    assert 0.75 < predicted / blocks < 1.25


def test_the_rules_of_a_recipe_start_with_the_method_s_own(tmp_path: Path) -> None:
    rules = make_rules(make_recipe(tmp_path, method="increlora", options={}))
    assert [type(r).__name__ for r in rules] == ["Increlora"]
    named = {"increlora": {"target_rank": 3}}
    rules = make_rules(make_recipe(tmp_path, method="increlora", options={}, rules=[named]))
    assert [r.target_rank for r in rules] == [3]
    assert isinstance(make_rules(make_recipe(tmp_path, method="none", options={}))[0], FullTraining)
    assert all(isinstance(r, Rule) for r in rules)


def test_the_log_is_json_lines_with_one_record_a_line(tmp_path: Path) -> None:
    run(make_recipe(tmp_path, parity=False))
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)
