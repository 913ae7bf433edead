"""Vocabularies merged by token: rows against dense formulas, tokenizers as libraries read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from recipe_models import HIDDEN, loaded, write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.recipes import merge_recipe

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
START = ["a", "b", "c", "ab", "<s>"]
MEAN = (
    "merge_method: linear\nmodels:\n  - {model: one}\n  - {model: two}\nparameters: {weight: 1}\n"
)


def write_tokenizer(folder: Path, words: Sequence[str], special: Sequence[str]) -> dict[str, int]:
    """A BPE of single letters and the merges that make the longer words."""
    table = {word: i for i, word in enumerate(words)}
    merges = [(w[:-1], w[-1]) for w in words if len(w) > 1 and not w.startswith("<")]
    made = Tokenizer(models.BPE(vocab=table, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(t, special=True) for t in special])
    made.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return made.get_vocab()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(
    here: Path, name: str, seed: int, words: Sequence[str], special: Sequence[str], rows: int = 0
) -> tuple[dict[str, Tensor], dict[str, int]]:
    count = max(rows, len({*words, *special}))
    made = write_model(here / name, seed, 2, words=count, eos_token_id=words.index("<s>"))
    return made, write_tokenizer(here / name, words, special)


@pytest.fixture
def three(here: Path):
    """`one` has <x> and "abc", `two` <x>, <y> and "bc"; `base` neither. Rows stand elsewhere."""
    one = write(here, "one", 1, [*START, "abc"], ["<s>", "<x>"])
    two = write(here, "two", 2, ["<s>", "c", "b", "a", "bc", "ab"], ["<s>", "<y>", "<x>"])
    base = write(here, "base", 3, START, ["<s>"])
    return {"one": one, "two": two, "base": base}


def run(here: Path, text: str, out: str = "out") -> tuple[dict[str, Tensor], dict[str, int]]:
    (here / "r.yml").write_text(text)
    merge_recipe(here / "r.yml", here / out)
    ids = Tokenizer.from_file(str(here / out / "tokenizer.json")).get_vocab()
    config = json.loads((here / out / "config.json").read_text())
    found = loaded(here / out)
    assert found[EMBED].shape == found[HEAD].shape == (config["vocab_size"], HIDDEN)
    assert config["eos_token_id"] == ids["<s>"]
    return found, ids


def row(model: tuple[dict[str, Tensor], dict[str, int]], name: str, token: str) -> Tensor:
    return model[0][name][model[1][token]]


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_union_has_all_tokens_and_a_lacking_model_borrows_their_rows(here, three, name) -> None:
    found, ids = run(here, MEAN + "tokenizer_source: union\n")
    one, two = three["one"], three["two"]
    assert set(ids) == {*one[1], *two[1]}
    assert all(ids[token] == number for token, number in one[1].items())
    for token in ids:
        x = row(one if token in one[1] else two, name, token)
        y = row(two if token in two[1] else one, name, token)
        torch.testing.assert_close(found[name][ids[token]], (x + y) / 2)
    up = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[up], (one[0][up] + two[0][up]) / 2)


def test_the_union_s_tokenizer_writes_words_of_both(here: Path, three) -> None:
    _, ids = run(here, MEAN + "tokenizer:\n  source: union\n")
    tokenizer = Tokenizer.from_file(str(here / "out" / "tokenizer.json"))
    for text, wanted in (
        ("abc", ["abc"]),
        ("bc", ["bc"]),
        ("a|<y>|ab<x>", ["a", "<y>", "ab", "<x>"]),
    ):
        assert tokenizer.encode(text).tokens == wanted
    assert {t.content for t in tokenizer.get_added_tokens_decoder().values()} >= {"<x>", "<y>"}
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(here / "out")
    assert read.get_vocab() == ids and len(read) == len(ids)


def test_a_token_of_the_base_stands_in_for_a_lacking_model_s(here: Path, three) -> None:
    write(here, "few", 4, ["c", "<s>", "a"], ["<s>"])
    ties = (
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - {model: one}\n"
        "  - {model: few}\nparameters: {weight: 0.5}\ntokenizer_source: base\n"
    )
    few = (loaded(here / "few"), {"c": 0, "<s>": 1, "a": 2})
    found, ids = run(here, ties)
    one, base = three["one"], three["base"]
    assert ids == base[1]
    for token in ids:
        x = row(base, EMBED, token)
        y = row(one, EMBED, token)
        z = row(few, EMBED, token) if token in few[1] else x
        torch.testing.assert_close(found[EMBED][ids[token]], x + 0.5 * (y - x) + 0.5 * (z - x))


def test_the_mean_of_those_who_have_a_token_and_no_base(here: Path, three) -> None:
    write(here, "few", 4, ["c", "<s>", "a"], ["<s>"])
    few = loaded(here / "few")
    text = MEAN.replace("parameters", "  - {model: few}\nparameters") + "tokenizer_source: union\n"
    found, ids = run(here, text)
    x, y = (row(three[n], EMBED, "ab") for n in ("one", "two"))
    torch.testing.assert_close(found[EMBED][ids["ab"]], (x + y + (x + y) / 2) / 3)
    x, y = (row(three[n], EMBED, "a") for n in ("one", "two"))
    torch.testing.assert_close(found[EMBED][ids["a"]], (x + y + few[EMBED][2]) / 3)


def test_rules_for_single_tokens(here: Path, three) -> None:
    rules = """tokenizer:
  source: two
  tokens:
    <x>: {source: one, force: true}
    <y>: {source: {kind: zero}}
    <new>: {source: {kind: model_token, model: one, token: abc}}
    <five>: {source: {kind: model_token, model: two, token_id: 5}}
    bc: {source: {kind: model_token, model: base, token: c}}
"""
    found, ids = run(here, MEAN + rules)
    one, two, base = (three[n] for n in ("one", "two", "base"))
    assert {token: ids[token] for token in two[1]} == two[1]
    wanted = {
        "<x>": row(one, EMBED, "<x>"),
        "<y>": row(two, EMBED, "<y>") / 2,
        "<new>": row(one, EMBED, "abc"),
        "<five>": two[0][EMBED][5],
        "bc": (row(two, EMBED, "bc") + row(base, EMBED, "c")) / 2,
    }
    for token, tensor in wanted.items():
        torch.testing.assert_close(found[EMBED][ids[token]], tensor)
    made = Tokenizer.from_file(str(here / "out" / "tokenizer.json"))
    assert made.encode("a<new>").tokens == ["a", "<new>"]


def test_padding_rows_are_kept_or_the_mean(here: Path, three) -> None:
    padded, _ = write(here, "padded", 5, START, ["<s>"], rows=12)
    text = MEAN.replace("{model: two}", "{model: padded}").replace("one", "padded", 1)
    text = text.replace(
        "  - {model: padded}\n  - {model: padded}", "  - {model: padded}\n  - {model: base}"
    )
    found, _ = run(here, text + "tokenizer_source: padded\n")
    assert len(found[EMBED]) == 12
    torch.testing.assert_close(
        found[EMBED][9], (padded[EMBED][9] + loaded(here / "base")[EMBED].mean(0)) / 2
    )
    found, _ = run(here, MEAN + "tokenizer: {source: union, pad_to_multiple_of: 16}\n", "wide")
    assert len(found[EMBED]) == 16
    means = [three[n][0][EMBED].mean(0) for n in ("one", "two")]
    torch.testing.assert_close(found[EMBED][15], sum(means) / 2)


def test_tied_heads_and_missing_ones(here: Path) -> None:
    """One file holds the head that another leaves out because it is the embedding."""
    from safetensors.torch import save_file

    for name, seed in (("one", 1), ("two", 2)):
        made = write_model(here / name, seed, 2, tie_word_embeddings=True)
        made[HEAD] = made[EMBED].clone()
        if name == "two":
            del made[HEAD]
        save_file(made, here / name / "model.safetensors")
    (here / "r.yml").write_text(MEAN)
    merge_recipe("r.yml", "out")
    found, two = loaded(here / "out"), loaded(here / "two")
    assert torch.equal(found[HEAD], found[EMBED])
    torch.testing.assert_close(found[EMBED], (loaded(here / "one")[EMBED] + two[EMBED]) / 2)
    merge_recipe(_swapped(here), "swapped")
    assert HEAD not in loaded(here / "swapped")


def _swapped(here: Path) -> Path:
    file = here / "s.yml"
    file.write_text(MEAN.replace("one", "x").replace("two", "one").replace("x}", "two}"))
    return file


def test_same_size_but_other_tokens_is_noted(here: Path) -> None:
    write(here, "one", 1, START, ["<s>"])
    write(here, "two", 2, [*START[:3], "bc", "<s>"], ["<s>"])
    (here / "r.yml").write_text(MEAN)
    notes = merge_recipe("r.yml", "out").notes
    assert len(notes) == 1 and "two has 1 tokens ('bc')" in notes[0]


def test_chat_templates(here: Path, three) -> None:
    for i, (wanted, start) in enumerate(
        (("chatml", "{% for message"), ("auto", "{{ messages }}"), ('"{{ x }}"', "{{ x }}"))
    ):
        out = f"out{i}"
        run(here, f"{MEAN}tokenizer_source: union\nchat_template: {wanted}\n", out)
        assert (here / out / "chat_template.jinja").read_text().startswith(start)
        assert "chat_template" not in json.loads((here / out / "tokenizer_config.json").read_text())
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(here / "out0")
    text = read.apply_chat_template(
        [{"role": "user", "content": " ab "}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    (here / "r.yml").write_text(MEAN + "chat_template: chatlm\ntokenizer_source: union\n")
    with pytest.raises(PlaitError, match="unknown chat_template 'chatlm'"):
        merge_recipe("r.yml", "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "vocabularies differ: add tokenizer_source"),
        ("tokenizer_source: base\n", "the recipe has no base_model"),
        ("tokenizer_source: nowhere\n", "'nowhere': there is no such"),
        ("tokenizer_source: union\ntokenizer: {source: base}\n", "say the same; keep one"),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: one, token: <xx>}}}}\n",
            "unknown token '<xx>' in the tokenizer of one; did you mean '<x>'",
        ),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: one, token_id: 99}}}}\n",
            "one has 7 tokens, none numbered 99",
        ),
        ("tokenizer: {pad_to_multiple_of: 0}\n", "line 6 .*greater than or equal to 1"),
    ],
)
def test_vocabularies_that_cannot_be_merged(here: Path, three, text: str, words: str) -> None:
    (here / "r.yml").write_text(MEAN + text)
    with pytest.raises(PlaitError, match=words):
        merge_recipe("r.yml", "out")
    assert not (here / "out").exists()


def test_damaged_and_missing_tokenizers(here: Path, three) -> None:
    (here / "r.yml").write_text(MEAN + "tokenizer_source: union\n")
    (here / "two" / "tokenizer.json").write_text("{")
    with pytest.raises(PlaitError, match=r"two/tokenizer.json: damaged"):
        merge_recipe("r.yml", "out")
    (here / "two" / "tokenizer.json").unlink()
    with pytest.raises(PlaitError, match=r"two has no tokenizer.json"):
        merge_recipe("r.yml", "out")
