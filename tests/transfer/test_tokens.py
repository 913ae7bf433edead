"""Tokens of two tokenizers: what they spell, which stand for the same text, where they go."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import TEXT, byte_level, metaspace, word_piece

from plait.errors import PlaitError
from plait.transfer import VocabularyMap, align_tokens, count_pairs, map_vocabulary, token_bytes
from plait.transfer.alignment import edit_distance, one_to_one

SENTENCE = "The café's cats – naïve cats – sat.\n\tTwice!"


# -- spelling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_tokens_spell_the_text_they_came_from(make) -> None:
    tokenizer = make()
    spelt = token_bytes(tokenizer)
    ids = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    assert b"".join(spelt[i] for i in ids).lstrip(b" ") == SENTENCE.encode()


def test_pieces_of_words_spell_what_a_word_has_there() -> None:
    tokenizer = word_piece()
    spelt = token_bytes(tokenizer)
    ids = tokenizer("the cats", add_special_tokens=False)["input_ids"]
    assert b"".join(spelt[i] for i in ids) == b" the cats"


def test_special_tokens_spell_their_role_and_others_their_name() -> None:
    a, b = byte_level(), metaspace()
    a.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    spelt = token_bytes(a)
    assert spelt[a.eos_token_id] == token_bytes(b)[b.eos_token_id] == b"\x00eos"
    assert a.eos_token != b.eos_token
    assert spelt[a.convert_tokens_to_ids("<|turn|>")] == b"\x00<|turn|>"
    with pytest.raises(PlaitError, match="fast"):
        token_bytes(object())


# -- edit distance and alignment ------------------------------------------------------------------


@lru_cache
def distance(one: bytes, two: bytes) -> int:
    """By its definition."""
    if not one or not two:
        return len(one) + len(two)
    rest = distance(one[1:], two[1:]) + (one[0] != two[0])
    return min(rest, distance(one[1:], two) + 1, distance(one, two[1:]) + 1)


words = st.binary(min_size=0, max_size=5).map(lambda b: bytes(97 + x % 3 for x in b))


@given(words, words)
def test_edit_distance_is_its_definition(one: bytes, two: bytes) -> None:
    assert edit_distance(one, two) == distance(one, two)


def paths(rows: int, columns: int) -> Iterator[list[tuple[int, int]]]:
    if (rows, columns) == (1, 1):
        yield [(0, 0)]
        return
    for i, j in ((rows - 1, columns - 1), (rows - 1, columns), (rows, columns - 1)):
        if i and j:
            yield from ([*path, (rows - 1, columns - 1)] for path in paths(i, j))


some = st.lists(words.filter(bool), min_size=1, max_size=4)


@given(some, some)
def test_other_texts_are_aligned_by_the_cheapest_path(source, target) -> None:
    one, two = b"".join(source), b"".join(target)
    if one.startswith(two) or two.startswith(one):
        return
    found = align_tokens(source, target)
    pairs = [(i, j) for j, others in enumerate(found) for i in others]
    cost = sum(distance(source[i], target[j]) for i, j in pairs)
    options = paths(len(source), len(target))
    least = min(sum(distance(source[i], target[j]) for i, j in path) for path in options)
    assert cost == least
    assert pairs == sorted(pairs) and pairs[0] == (0, 0)
    assert {i for i, _ in pairs} == set(range(len(source))), "every token stands somewhere"


def cut(text: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in pairwise(edges)]


cuts = st.lists(st.integers(0, 30), max_size=6)


@given(
    st.binary(min_size=1, max_size=12).filter(lambda b: 0 not in b and b[:1] != b" "), cuts, cuts
)
def test_of_one_text_those_are_aligned_that_overlap(text: bytes, first, second) -> None:
    source, target = cut(text, first), cut(text, second)

    def spans(tokens):
        at, found = 0, []
        for token in tokens:
            found.append(set(range(at, at + len(token))))
            at += len(token)
        return found

    wanted = [
        tuple(i for i, ours in enumerate(spans(source)) if ours & theirs)
        for theirs in spans(target)
    ]
    assert align_tokens(source, target) == wanted
    assert align_tokens(source, source) == [(i,) for i in range(len(source))]


def test_a_space_in_front_an_end_cut_off_and_empty_tokens_do_no_harm() -> None:
    assert align_tokens([b" Hel", b"lo", b" you"], [b"Hello", b" you"]) == [(0, 1), (2,)]
    assert align_tokens([b"Hel", b"lo"], [b"Hello", b" you"]) == [(0, 1), ()]
    assert align_tokens([b"Hello", b" you"], [b"Hello"]) == [(0,)]
    assert align_tokens([b"a", b"", b"b"], [b"", b"a", b"b"]) == [(), (0,), (2,)]
    assert align_tokens([], [b"a"]) == [()]


def test_special_tokens_stand_beside_their_counterparts() -> None:
    source = [b"ab", b"\x00eos", b"c", b"\x00eos"]
    target = [b"a", b"b", b"\x00<|end|>", b"c", b"\x00<|end|>"]
    assert align_tokens(source, target) == [(0,), (0,), (1,), (2,), (3,)]
    assert one_to_one(align_tokens(source, target)) == [None, None, 1, 2, 3]


def test_two_real_tokenizations_of_one_sentence() -> None:
    a, b = byte_level(), metaspace()
    spelt, spells = token_bytes(a), token_bytes(b)
    here, there = (t(SENTENCE, add_special_tokens=False)["input_ids"] for t in (a, b))
    source, target = [spelt[i] for i in here], [spells[i] for i in there]
    found = one_to_one(align_tokens(source, target))
    paired = [(source[i], target[j]) for j, i in enumerate(found) if i is not None]
    assert len(paired) > 5 and all(x.lstrip() == y.lstrip() for x, y in paired)


# -- vocabularies ---------------------------------------------------------------------------------


def test_one_tokenizer_is_mapped_to_itself() -> None:
    tokenizer = byte_level()
    mapping = map_vocabulary(tokenizer, byte_level())
    for index in range(len(tokenizer)):
        assert mapping.row(index) == ((index,), (1.0,))


@given(st.lists(words.filter(bool), min_size=1, max_size=12, unique=True), words.filter(bool))
def test_the_nearest_token_is_the_first_of_least_distance(vocabulary, text) -> None:
    (found,), share = VocabularyMap([text], vocabulary).row(0)
    distances = [distance(text, other) for other in vocabulary]
    assert found == distances.index(min(distances)) and share == (1.0,)
    near = VocabularyMap([text], vocabulary, farthest=1).row(0)[0]
    assert near == ((found,) if min(distances) <= 1 else ())


def test_what_has_no_counterpart_goes_nowhere_when_only_equals_count() -> None:
    mapping = VocabularyMap([b"cat", b"dog", b"\x00eos", b""], [b"dog", b"\x00eos"], "exact")
    assert [mapping.row(i)[0] for i in range(5)] == [(), (0,), (1,), (), ()]
    mapping = VocabularyMap([b"\x00<|end|>"], [b"dog", b"\x00eos"])
    assert mapping.row(0) == ((), ()), "a special token is like no word"
    mapping.pin(0, 1)
    assert mapping.row(0) == ((1,), (1.0,))
    mapping.pin(0, 0)
    assert mapping.row(0) == ((1,), (1.0,)), "what goes somewhere stays there"


def test_counts_share_a_token_between_those_that_stood_in_its_place() -> None:
    pairs = {(0, 1): 3, (0, 2): 1}
    mapping = VocabularyMap([b"x", b"b"], [b"a", b"b", b"c"], "counts", pairs=pairs)
    assert mapping.row(0) == ((1, 2), (0.75, 0.25))
    assert mapping.row(1) == ((1,), (1.0,)), "equals go first"
    with pytest.raises(PlaitError, match="count_pairs"):
        VocabularyMap([b"x"], [b"a"], "counts")
    with pytest.raises(PlaitError, match="way to map"):
        VocabularyMap([b"x"], [b"a"], "magic")


def test_counted_pairs_are_those_of_the_alignment() -> None:
    a, b = byte_level(), word_piece()
    found = count_pairs(a, b, TEXT)
    spelt, spells = token_bytes(a), token_bytes(b)
    assert sum(found.values()) > 20
    alike = sum(n for (i, j), n in found.items() if spelt[i].lower().strip() == spells[j].strip())
    assert alike > 0.8 * sum(found.values())
    mapping = map_vocabulary(a, b, "counts", texts=TEXT)
    for index in range(len(a)):
        assert sum(mapping.row(index)[1]) in (0, pytest.approx(1.0))
