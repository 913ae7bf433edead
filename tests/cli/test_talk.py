"""eval and chat on a tiny model, and the small commands."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

import plait
from plait.cli.common import Shelf, parse_mix, read_settings
from plait.cli.train import split_words
from plait.errors import PlaitError
from plait.evaluation import evaluate
from tiny_language_model import byte_tokenizer, tiny_model


def test_eval_scores_the_base_each_adapter_and_mixes(
    run, adapters, base: Path, data: Path, tmp_path: Path
) -> None:
    mix = f"{adapters['sql']}=.5,{adapters['chat']}=2"
    words = ["eval", "--base", base, "--data", data, "--metric", "loss", "--json"]
    words += ["--adapter", adapters["sql"], "--adapter", mix, "--out", tmp_path / "eval.json"]
    code, out, err = run(*words)
    assert code == 0 and "wrote" in err
    results = {r["label"]: r for r in json.loads(out)["results"]}
    assert list(results) == ["base", str(adapters["sql"]), mix]
    assert json.loads((tmp_path / "eval.json").read_text()) == json.loads(out)
    model, tokenizer = tiny_model(), byte_tokenizer()
    for name in ("sql", "chat"):
        plait.load(model, adapters[name])
    plait.activate(model, {"sql": 0.5, "chat": 2.0})
    expected = evaluate(model, tokenizer, str(data), "loss").results[0].scores["loss"].value
    assert results[mix]["scores"]["loss"]["value"] == pytest.approx(expected, rel=1e-5)
    assert results["base"]["active"] == {}


def test_eval_prints_a_table_and_takes_a_scorer(
    run, base: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "own_scorer.py").write_text("def long(text, row):\n    return len(text) > 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["eval", "--base", base, "--data", data, "--max-new-tokens", 3, "--limit", 4]
    code, out, _ = run(*words, "--scorer", "own_scorer:long", "--predictions", 2)
    assert code == 0 and "4 examples" in out and "100.0 %" in out
    assert out.count('["base", "yes", ') == 2
    code, _, err = run(*words, "--scorer", "own_scorer:lnog")
    assert code == 2 and "own_scorer:lnog" in err


def test_chat_answers_one_prompt_with_the_mix(run, adapters, base: Path) -> None:
    words = ["chat", "--base", base, "--max-new-tokens", 5, "--prompt", "Hi"]
    plain = run(*words)
    adapted = run(*words, "--adapter", f"{adapters['sql']}=2.0")
    assert plain[0] == adapted[0] == 0
    assert plain[1] != adapted[1] and plain[1].strip()


def test_chat_obeys_commands(run, adapters, base: Path, monkeypatch) -> None:
    lines = ["Hi", f"/adapter {adapters['sql']}=.5", "/adapter", "/adapter nothing", "/rest"]
    lines += ["/reset", "/system Be kind.", "/adapter base", "/help", "", "Hi", "/quit", "Hi"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, err = run("chat", "--base", base, "--max-new-tokens", 3)
    assert code == 0
    assert err.count("active: sql=0.5") == 2 and err.count("active: base") == 2
    assert "nothing: no such file" in err and "Loaded: sql" in err
    assert "did you mean '/reset'?" in err and "/system TEXT" in err
    assert err.count("(a new conversation)") == 2
    assert out.strip()


def test_chat_keeps_the_conversation(base: Path) -> None:
    from plait.cli.chat import Talk

    model, tokenizer = tiny_model(), byte_tokenizer()
    talk = Talk(model, tokenizer, Shelf(model), 0.0, 4, system="Be kind.")
    first = talk.ask("One?")
    talk.ask("Two?")
    roles = [t["role"] for t in talk.turns]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert (
        f"Be kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n{first}"
        in (talk._prompt())
    )


def test_without_a_base_the_adapter_must_say_it(run, adapters, data: Path) -> None:
    code, _, err = run("eval", "--adapter", adapters["sql"], "--data", data)
    assert code == 2 and "which base model?" in err


def test_mixes_and_settings() -> None:
    assert parse_mix("a=1.0, b=.5,c") == {"a": 1.0, "b": 0.5, "c": 1.0}
    assert parse_mix("out/x=y=-2") == {"out/x=y": -2.0}
    for wrong, message in {"a=x": "'x' is no weight", "": "no adapter named"}.items():
        with pytest.raises(PlaitError, match=message):
            parse_mix(wrong)
    assert read_settings(["rank=4", "targets=[a, b]", "x=true"]) == {
        "rank": 4,
        "targets": ["a", "b"],
        "x": True,
    }
    assert split_words(["r.yaml", "a=1"]) == (["r.yaml"], ["a=1"])
    with pytest.raises(PlaitError, match="two recipes"):
        split_words(["a.yaml", "b.yaml"])


def test_two_adapters_of_one_name_can_be_loaded(adapters, tmp_path: Path) -> None:
    plait.read_adapter(adapters["chat"], "sql").save(tmp_path / "sql")
    model = tiny_model()
    shelf = Shelf(model)
    mix = shelf.mix(f"{adapters['sql']},{tmp_path / 'sql'}=.5,{adapters['sql']}=.2")
    assert mix == {"sql": 0.2, "sql-1": 0.5}
    assert shelf.mix("sql-1") == {"sql-1": 1.0}


def test_env_is_a_pasteable_block(run) -> None:
    code, out, _ = run("env")
    assert code == 0 and plait.__version__ in out and torch.__version__ in out
    assert "transformers" in out and "memory" in out


def test_bases(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    code, out, _ = run("bases")
    assert code == 0 and "smollm2-135m" in out and "no (0.5" in out
    assert json.loads(run("bases", "list", "--json")[1])[0]["name"] == "smollm2-135m"
    code, _, err = run("bases", "get", "smollm")
    assert code == 2 and "did you mean 'smollm2-135m'" in err
