"""Knowledge of several models, whatever their tokenizers, as rows that an adapter learns from.

    examples ──► every teacher's rows ──► carried to the target's tokens ──► fused ──► one file
    plait train recipe.yaml rules=[{distil: {rows: file}}]

The heterogeneous half of unconstrained merging (Zhang et al., 2024, arXiv 2410.13699), after
FuseLLM (Wan et al., 2024, arXiv 2401.10491). Departures: labels whose tokens are not aligned one to
one have no row and count alone; a row's lost mass is reported and counts against its teacher.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from plait.errors import PlaitError
from plait.rules._cached_rows import key_of_example, write_rows
from plait.training.data import IGNORE, Encoded, Example, encode, encode_all, read_examples
from plait.transfer.alignment import align_tokens, is_special, one_to_one
from plait.transfer.distributions import (
    Distributions,
    Fusing,
    carried,
    coverage,
    fuse_distributions,
    labels_of,
    teacher_rows,
)
from plait.transfer.surfaces import token_bytes
from plait.transfer.vocabulary import How, VocabularyMap, map_vocabulary

WHOLE = 10**9


@dataclass(frozen=True)
class Teacher:
    """A model, with whatever adapters are active on it, and its tokenizer."""

    model: nn.Module
    tokenizer: Any
    name: str = "teacher"
    most: int | None = None
    """Tokens that it can read; labels beyond have no row. None asks the model's config."""

    @property
    def limit(self) -> int:
        config = getattr(self.model, "config", None)
        return self.most or getattr(config, "max_position_embeddings", None) or WHOLE


@dataclass(frozen=True)
class Fused:
    """What was written, and how much of it there is."""

    path: Path
    examples: int
    labels: int
    known: float
    """Share of the labels that have a row."""
    mass: float
    """Mean probability of the teacher's tokens that its rows kept."""
    teachers: dict[str, dict[str, float]] = field(repr=False)
    """For each teacher: known and mass of its own rows, and its part in the fused ones."""


def fuse(
    teachers: Sequence[Teacher],
    examples: Any,
    tokenizer: Any,
    out: str | os.PathLike[str],
    *,
    how: Fusing = "min-ce",
    vocabulary: How | Sequence[VocabularyMap] = "edit",
    top_k: int = 10,
    temperature: float = 1.0,
    max_length: int = 1024,
    template: bool = True,
    turns: Literal["all", "last"] = "all",
    batch_size: int = 8,
) -> Fused:
    """Write rows for the labels of `examples` in the target's tokens, for the rule `distil`.

    Args:
        teachers: at least one; a tokenizer equal to the target's is mapped by identity.
        examples: rows or files, as `plait train` takes them.
        tokenizer, max_length, template, turns: of the target, as in its recipe.
        how: "min-ce" or "avg-ce" (see `fuse_distributions`), for each example.
        vocabulary: how tokens are mapped (see `map_vocabulary`; "counts" reads the examples), or
            a map for each teacher.
        top_k: tokens a row. temperature: of the teachers' distributions.

    Raises PlaitError when nothing is left to learn from.
    """
    if not teachers:
        raise PlaitError("fuse: give at least one teacher.")
    known = list(read_examples(examples))
    maps = _maps(teachers, known, tokenizer, vocabulary)
    encoded = [_pieces(example, tokenizer, max_length, template, turns) for example in known]
    every = []
    for teacher, mapping in zip(teachers, maps, strict=True):
        rows = _rows_of(teacher, known, template, turns, top_k, temperature, batch_size)
        every.append(_on_target(rows, teacher, encoded, tokenizer, mapping, top_k))
    examples_out, fused, parts = _fused(encoded, every, len(tokenizer), how, top_k)
    names = _names(teachers)
    whole = coverage(fused)
    told = {
        name: {**coverage([r for rows in own for r in rows]), "part": float(part)}
        for name, own, part in zip(names, every, parts, strict=True)
    }
    facts = {"how": how, "top_k": top_k, "temperature": temperature, "teachers": told, **whole}
    path = write_rows(out, examples_out, facts)
    return Fused(path, len(examples_out), int(whole["labels"]), whole["known"], whole["mass"], told)


def _maps(
    teachers: Sequence[Teacher], known: Sequence[Example], tokenizer: Any, given: Any
) -> list[VocabularyMap]:
    if not isinstance(given, str):
        if len(given) != len(teachers):
            raise PlaitError(f"fuse: {len(given)} vocabulary maps for {len(teachers)} teachers.")
        return list(given)
    texts = [text for example in known for text in _texts(example)] if given == "counts" else []
    return [map_vocabulary(t.tokenizer, tokenizer, given, texts=texts) for t in teachers]  # type: ignore[arg-type]


def _texts(example: Example) -> Iterable[str]:
    if example.kind == "text":
        return [example.text]
    return [message.content for message in example.chat() if message.content]


def _pieces(
    example: Example, tokenizer: Any, max_length: int, template: bool, turns: Any
) -> list[Encoded]:
    """As training encodes it; none where nothing is left to train on."""
    try:
        return encode_all([example], tokenizer, max_length, template, turns).items
    except PlaitError:
        if encode(example, tokenizer, max_length, template, turns).trained:
            raise
        return []


def _rows_of(
    teacher: Teacher,
    known: Sequence[Example],
    template: bool,
    turns: Any,
    top_k: int,
    temperature: float,
    batch_size: int,
) -> list[tuple[Encoded, Distributions]]:
    own = template and bool(getattr(teacher.tokenizer, "chat_template", None))
    items = []
    for example in known:
        used = own or example.kind == "chat"
        items.append(encode(example, teacher.tokenizer, teacher.limit, used, turns))
    rows = teacher_rows(
        teacher.model, items, top_k=top_k, temperature=temperature, batch_size=batch_size
    )
    return list(zip(items, rows, strict=True))


def _on_target(
    rows: Sequence[tuple[Encoded, Distributions]],
    teacher: Teacher,
    encoded: Sequence[Sequence[Encoded]],
    tokenizer: Any,
    mapping: VocabularyMap,
    top_k: int,
) -> list[list[Distributions]]:
    """For every example and each of its pieces, the teacher's rows in the target's tokens."""
    spelt, spells = token_bytes(teacher.tokenizer), token_bytes(tokenizer)
    aligned = [
        _sources(item, pieces, spelt, spells, mapping)
        for (item, _), pieces in zip(rows, encoded, strict=True)
    ]
    return [
        [carried(own, sources, mapping, top_k) for sources in of_pieces]
        for (_, own), of_pieces in zip(rows, aligned, strict=True)
    ]


def _sources(
    item: Encoded,
    pieces: Sequence[Encoded],
    spelt: Sequence[bytes],
    spells: Sequence[bytes],
    mapping: VocabularyMap,
) -> list[list[int | None]]:
    """Which row of the teacher's own belongs to each label of each piece."""
    here = [label for label in item.labels if label != IGNORE]
    first = 1 if item.labels[0] != IGNORE else 0  # nothing predicts it: it is aligned, without row
    there = [label for piece in pieces for label in piece.labels if label != IGNORE]
    alignment = one_to_one(align_tokens([spelt[i] for i in here], [spells[i] for i in there]))
    for label, source in zip(there, alignment, strict=True):
        if source is not None and is_special(spells[label]) and is_special(spelt[here[source]]):
            mapping.pin(here[source], label)
    rows = iter([None if s is None or s < first else s - first for s in alignment])
    found = []
    for piece in pieces:
        own = [(at, next(rows)) for at, label in enumerate(piece.labels) if label != IGNORE]
        found.append([source for at, source in own if at])
    return found


def _fused(
    encoded: Sequence[Sequence[Encoded]],
    every: Sequence[Sequence[Sequence[Distributions]]],
    vocabulary: int,
    how: Fusing,
    top_k: int,
) -> tuple[dict[int, Any], list[Distributions], torch.Tensor]:
    """{key: (ids, shares)}, the same as rows, and each teacher's mean part."""
    out: dict[int, Any] = {}
    fused, parts = [], []
    for number, pieces in enumerate(encoded):
        for place, piece in enumerate(pieces):
            own = [teacher[number][place] for teacher in every]
            rows, part = fuse_distributions(own, labels_of(piece), vocabulary, how, top_k)
            out[key_of_example(piece.input_ids, piece.labels)] = (rows.ids, rows.shares)
            fused.append(rows)
            parts.append(part)
    if not out:
        raise PlaitError("fuse: no example has a token to train on; raise max_length.")
    return out, fused, torch.stack(parts).mean(0)


def _names(teachers: Sequence[Teacher]) -> list[str]:
    names = [teacher.name for teacher in teachers]
    return [f"{n} {i}" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]
