"""The loss mask covers the answers, their end-of-turn token, and nothing else."""

from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from plait.errors import PlaitError
from plait.training.data import IGNORE, Encoded, encode, encode_all, parse_row, show_examples

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Renders an answer otherwise once something follows it, as templates that strip reasoning do.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose only merge joins two line ends (which a template likes to split)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHATML
    return made


def trained_text(item: Encoded, tokenizer: PreTrainedTokenizerFast) -> str:
    pairs = zip(item.input_ids, item.labels, strict=True)
    assert all(label in (IGNORE, token) for token, label in pairs)
    return tokenizer.decode([label for label in item.labels if label != IGNORE])


def conversation(*contents: str) -> dict:
    roles = ["user", "assistant"] * (len(contents) // 2)
    turns = zip(roles, contents, strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_question_is_masked_and_its_answer_with_the_end_of_turn_is_not(tokenizer) -> None:
    item = encode(parse_row({"prompt": "Why?", "completion": "So."}), tokenizer)
    assert tokenizer.decode(item.input_ids) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    )
    assert trained_text(item, tokenizer) == "So.<|im_end|>"
    assert item.input_ids[-2] == item.labels[-2] == tokenizer.eos_token_id
    assert item.labels[-1] == IGNORE


def test_ids_are_what_the_template_gives(tokenizer) -> None:
    row = conversation("a", "b", "ü€", "d\n")
    expected = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    assert encode(parse_row(row), tokenizer).input_ids == expected


TEXT = st.text(st.sampled_from("ab ü€\n"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_every_answer_of_a_conversation_is_trained(tokenizer, pairs) -> None:
    row = conversation(*(text for pair in pairs for text in pair))
    item = encode(parse_row(row), tokenizer)
    # A line end that begins an answer may fuse with the template's and then belongs to the prompt.
    plain = [answer[1:] if answer.startswith("\n") else answer for _, answer in pairs]
    assert trained_text(item, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in plain)


def test_a_token_across_the_border_belongs_to_the_prompt(tokenizer) -> None:
    item = encode(parse_row({"prompt": "q", "completion": "\nyes"}), tokenizer)
    fused = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert item.labels[item.input_ids.index(fused)] == IGNORE
    assert trained_text(item, tokenizer) == "yes<|im_end|>"


def test_only_the_last_answer_on_request(tokenizer) -> None:
    item = encode(parse_row(conversation("a", "b", "c", "d")), tokenizer, turns="last")
    assert trained_text(item, tokenizer) == "d<|im_end|>"


def test_a_template_that_rewrites_the_past_is_refused_and_the_way_out_works(tokenizer) -> None:
    example = parse_row(conversation("a", "first", "c", "second"), "f.jsonl:9")
    tokenizer.chat_template = FORGETFUL
    try:
        with pytest.raises(PlaitError, match=r"^f.jsonl:9: .* turn 2 .* turns='last'"):
            encode(example, tokenizer)
        item = encode(example, tokenizer, turns="last")
        assert trained_text(item, tokenizer) == "second<|im_end|>"
    finally:
        tokenizer.chat_template = CHATML


def test_no_template_at_all_is_told(tokenizer) -> None:
    tokenizer.chat_template = None
    try:
        with pytest.raises(PlaitError, match=r"has no chat template"):
            encode(parse_row(conversation("a", "b")), tokenizer)
    finally:
        tokenizer.chat_template = CHATML


def test_prompt_and_completion_as_they_are(tokenizer) -> None:
    item = encode(parse_row({"prompt": "2+2=", "completion": "4"}), tokenizer, template=False)
    assert tokenizer.decode(item.input_ids) == "2+2=4<|im_end|>"
    assert trained_text(item, tokenizer) == "4<|im_end|>"
    with pytest.raises(PlaitError, match="needs the chat template"):
        encode(parse_row(conversation("a", "b")), tokenizer, template=False)


def test_plain_text_is_trained_throughout(tokenizer) -> None:
    item = encode(parse_row({"text": "all of it"}), tokenizer)
    assert item.labels == item.input_ids and item.input_ids[-1] == tokenizer.eos_token_id


def test_long_texts_are_cut_into_pieces_and_nothing_is_lost(tokenizer) -> None:
    data = encode_all([parse_row({"text": "abcdefghij"})], tokenizer, max_length=4)
    assert [len(item) for item in data.items] == [4, 4, 3]
    joined = [token for item in data.items for token in item.input_ids]
    assert joined == encode(parse_row({"text": "abcdefghij"}), tokenizer).input_ids
    assert data.rows == 1 and not data.dropped and not data.truncated


def test_what_does_not_fit_is_dropped_or_cut_and_counted(tokenizer) -> None:
    rows = [
        parse_row({"prompt": "q" * 200, "completion": "a"}, "f:1"),
        parse_row({"prompt": "q", "completion": "a" * 200}, "f:2"),
        parse_row({"prompt": "q", "completion": "a"}, "f:3"),
    ]
    with pytest.warns(UserWarning, match=r"of 3 examples.*1 were dropped.*\(f:1\) and 1 lost"):
        data = encode_all(rows, tokenizer, max_length=40)
    assert len(data) == 2 and data.dropped == ["f:1"] and data.truncated == 1
    assert all(item.trained for item in data.items) and max(data.lengths) == 40
    with pytest.raises(PlaitError, match=r"none of 1 examples .* raise max_length"):
        encode_all(rows[:1], tokenizer, max_length=40)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(PlaitError, match="Slow gives no character offsets"):
        encode(parse_row({"text": "a"}), Slow())


def test_samples_are_shown_with_the_mask(tokenizer) -> None:
    from rich.console import Console

    out = StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system="standard")
    rows = [parse_row({"prompt": "wörd", "completion": f"ünswer {n}"}) for n in range(3)]
    show_examples(encode_all(rows, tokenizer), tokenizer, console=console)
    shown = out.getvalue()
    assert "\x1b[1;32münswer 0<|im_end|>\x1b[0m" in shown and "ünswer 2" not in shown
    assert "\x1b[2mwörd<|im_end|>\x1b[0m" in shown


@pytest.mark.smollm2
def test_smollm2s_own_template(request: pytest.FixtureRequest) -> None:
    from plait.training.bases import list_bases

    if not list_bases()[0].on_disk:
        pytest.skip("smollm2-135m is not converted")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(list_bases()[0].path)
    row = conversation("Licht an?", '{"a": 1}', "Und?", "\n\nGrün.")
    item = encode(parse_row(row), tokenizer)
    expected = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    assert item.input_ids == expected
    # The template's line end and the answer's first fuse into one token, which is the prompt's.
    assert trained_text(item, tokenizer) == '{"a": 1}<|im_end|>\nGrün.<|im_end|>'
