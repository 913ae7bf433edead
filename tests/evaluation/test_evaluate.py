"""Scores against slow, plain oracles: one row at a time, no padding, no cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait.errors import FormatError, PlaitError, UnknownNameError
from plait.evaluation import evaluate, read_questions
from plait.evaluation.generate import greedy_answers
from plait.evaluation.likelihood import likelihoods
from plait.training.data import IGNORE, encode
from tiny_language_model import byte_tokenizer, tiny_model

QUESTIONS = ["Hi", "What is the capital of France, do you know?", "a", "0123456789 " * 4, "b c"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def slow_tokens(model: Any, tokenizer: Any, prompt: str, count: int) -> list[int]:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:]


def slow_answer(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    return tokenizer.decode(slow_tokens(model, tokenizer, prompt, count), skip_special_tokens=True)


def slow_nll(model: Any, ids: list[int], labels: list[int]) -> float:
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logs[t - 1, ids[t]]) for t in range(1, len(ids)) if labels[t] != IGNORE)


def chat_prompt(tokenizer: Any, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def rows(model: Any, tokenizer: Any, right: int) -> list[dict[str, str]]:
    """Questions of which the first `right` have the answer that the model gives."""
    made = []
    for i, text in enumerate(QUESTIONS):
        answer = slow_answer(model, tokenizer, chat_prompt(tokenizer, text), 6)
        made.append({"prompt": text, "completion": answer if i < right else "something else"})
    return made


def test_batched_answers_equal_those_of_a_plain_loop(model: Any, tokenizer: Any) -> None:
    prompts = [chat_prompt(tokenizer, text) for text in QUESTIONS]
    expected = [slow_answer(model, tokenizer, p, 6) for p in prompts]
    done: list[int] = []
    found = greedy_answers(
        model, tokenizer, prompts, max_new_tokens=6, batch_size=3, advance=done.append
    )
    assert found == expected
    assert len(set(found)) > 1  # the model does look at the prompt
    assert done == [3, 2]


def test_answers_end_at_the_end_of_turn(tokenizer: Any) -> None:
    model = tiny_model()
    prompts = [chat_prompt(tokenizer, text) for text in QUESTIONS]
    tokens = slow_tokens(model, tokenizer, prompts[0], 6)
    model.generation_config.eos_token_id = [tokens[2]]
    found = greedy_answers(model, tokenizer, prompts, max_new_tokens=6)
    assert found[0] == tokenizer.decode(tokens[: tokens.index(tokens[2]) + 1])


def test_sampling_defaults_of_the_model_do_not_leak_into_greedy(tokenizer: Any) -> None:
    model = tiny_model()
    prompts = [chat_prompt(tokenizer, text) for text in QUESTIONS]
    plain = greedy_answers(model, tokenizer, prompts, max_new_tokens=4)
    for name, value in {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}.items():
        setattr(model.generation_config, name, value)
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=4) == plain


def test_exact_match_and_its_interval(model: Any, tokenizer: Any) -> None:
    found = evaluate(
        model, tokenizer, rows(model, tokenizer, right=3), max_new_tokens=6, batch_size=2
    )
    score = found.results[0].scores["exact_match"]
    assert (score.value, score.count, score.interval) == (0.6, 5, "wilson")
    assert 0.2 < score.low < 0.6 < score.high < 0.9
    assert found.results[0].label == "base" and len(found.results[0].predictions) == 5


def test_a_scorer_sees_the_prediction_and_the_whole_row(tokenizer: Any) -> None:
    model, seen = tiny_model(), []

    def scorer(prediction: str, row: Any) -> float:
        seen.append((prediction, row["id"]))
        return row["id"] / 4

    data = [{"id": i, "prompt": q, "completion": ""} for i, q in enumerate(QUESTIONS)]
    found = evaluate(model, tokenizer, data, [], scorer=scorer, max_new_tokens=3)
    assert [i for _, i in seen] == [0, 1, 2, 3, 4]
    assert [p for p, _ in seen] == found.results[0].predictions
    score = found.results[0].scores["score"]
    assert score.value == 0.5 and score.interval == "bootstrap"


@pytest.mark.parametrize("template", [True, False])
def test_loss_is_the_mean_over_the_answers_tokens(
    model: Any, tokenizer: Any, template: bool
) -> None:
    data = [{"prompt": q, "completion": "yes" * (i + 1)} for i, q in enumerate(QUESTIONS)]
    found = evaluate(model, tokenizer, data, "loss", template=template, batch_size=2)
    nll = tokens = 0.0
    for question in read_questions(data):
        item = encode(question.example, tokenizer, template=template)
        nll += slow_nll(model, item.input_ids, item.labels)
        tokens += item.trained
    scores = found.results[0].scores
    assert scores["loss"].value == pytest.approx(nll / tokens, rel=1e-5)
    assert scores["loss"].tokens == tokens and not scores["loss"].higher_is_better
    assert scores["perplexity"].value == pytest.approx(2.718281828459 ** (nll / tokens), rel=1e-4)
    assert scores["loss"].low <= scores["loss"].value <= scores["loss"].high


def test_loss_of_plain_text_does_not_count_the_first_token(model: Any, tokenizer: Any) -> None:
    items = [
        encode(q.example, tokenizer)
        for q in read_questions([{"text": "some words"}, {"text": "x"}])
    ]
    found = likelihoods(model, tokenizer, items)
    for item, one in zip(items, found, strict=True):
        assert one.tokens == len(item.input_ids) - 1
        assert one.nll == pytest.approx(slow_nll(model, item.input_ids, item.labels), rel=1e-5)


def test_choice_takes_the_option_likeliest_per_token(model: Any, tokenizer: Any) -> None:
    options = ["yes", "no, never", "perhaps it is so", "3"]
    expected = []
    for text in QUESTIONS:
        prompt, per_token = chat_prompt(tokenizer, text), []
        for option in options:
            ids = tokenizer(prompt + option + "<|im_end|>", add_special_tokens=False)["input_ids"]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            labels = [IGNORE] * start + ids[start:]
            per_token.append(slow_nll(model, ids, labels) / (len(ids) - start))
        expected.append(per_token.index(min(per_token)))
    data = [
        {"prompt": q, "choices": options, "answer": best if i % 2 else options[best]}
        for i, (q, best) in enumerate(zip(QUESTIONS, expected, strict=True))
    ]
    assert evaluate(model, tokenizer, data, "choice").results[0].scores["choice"].value == 1.0
    data[0]["answer"] = (expected[0] + 1) % 4
    found = evaluate(model, tokenizer, data, "choice", batch_size=3)
    assert found.results[0].scores["choice"].value == 0.8


def test_several_adapters_over_the_same_data(tokenizer: Any) -> None:
    model = tiny_model()
    for seed, name in enumerate(["a", "b"]):
        adapter = plait.attach(model, "lora", name=name, rank=4)
        draw = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    plait.activate(model, "b")
    model.train()
    data = [{"prompt": q, "completion": "yes"} for q in QUESTIONS]
    chosen = {"base": "base", "a": "a", "mix": {"a": 1.0, "b": 0.5}}
    found = evaluate(model, tokenizer, data, ["loss", "exact_match"], adapters=chosen)
    model.eval()
    for label, active in {"base": {}, "a": {"a": 1.0}, "mix": {"a": 1.0, "b": 0.5}}.items():
        plait.activate(model, active)
        alone = evaluate(model, tokenizer, data, ["loss", "exact_match"])
        assert found[label].scores == alone.results[0].scores
        assert found[label].active == active
    losses = {r.scores["loss"].value for r in found.results}
    assert len(losses) == 3


def test_the_model_is_left_as_it_was(tokenizer: Any) -> None:
    model = tiny_model()
    for name in ("a", "b"):
        plait.attach(model, "lora", name=name)
    plait.activate(model, {"b": 0.5})
    model.train()
    model.lm_head.eval()
    evaluate(model, tokenizer, [{"prompt": "x", "completion": "y"}], "loss", adapters=["a", "base"])
    state = plait.adapter.state.get_state(model)
    assert state.active == {"b": 0.5}
    assert model.training and not model.lm_head.training


def test_results_go_to_json_and_a_table(tokenizer: Any, tmp_path: Path) -> None:
    from rich.console import Console

    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "x", "completion": "y"}\n\n{"prompt": "xx", "completion": "z"}\n')
    found = evaluate(tiny_model(), tokenizer, file, ["loss", "exact_match"], max_new_tokens=2)
    saved = json.loads(found.save(tmp_path / "out" / "eval.json").read_text())
    assert saved["examples"] == 2
    assert set(saved["results"][0]["scores"]) == {"exact_match", "loss", "perplexity"}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table())
    assert "exact match" in console.export_text()


def test_mistakes_are_named(tokenizer: Any, tmp_path: Path) -> None:
    model, data = tiny_model(), [{"prompt": "x", "completion": "y"}]
    with pytest.raises(UnknownNameError, match="did you mean 'exact_match'"):
        evaluate(model, tokenizer, data, "exact-match")
    with pytest.raises(UnknownNameError, match="unknown adapter 'sql'"):
        evaluate(model, tokenizer, data, adapters=["sql"])
    with pytest.raises(PlaitError, match="nothing to measure"):
        evaluate(model, tokenizer, data, [])
    with pytest.raises(PlaitError, match="row 1 has no choices"):
        evaluate(model, tokenizer, data, "choice")
    with pytest.raises(PlaitError, match="plain text has no question"):
        evaluate(model, tokenizer, [{"text": "x"}])
    with pytest.raises(FormatError, match="none of the choices"):
        read_questions([{"prompt": "x", "choices": ["a", "b"], "answer": "c"}])
    with pytest.raises(FormatError, match="no rows"):
        read_questions([])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x", "completion": "y"}\n{"prompt"\n')
    with pytest.raises(FormatError, match=r"broken\.jsonl:2"):
        read_questions(broken)
