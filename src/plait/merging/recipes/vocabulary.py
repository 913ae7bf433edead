"""Models of different vocabularies: the result's tokens, and each model's rows for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plait.errors import PlaitError, unknown
from plait.merging.checkpoints import Checkpoint
from plait.merging.recipes.inputs import Inputs
from plait.merging.recipes.references import Reference
from plait.merging.recipes.schema import TokenRule, Tokens, TokenSource
from plait.merging.recipes.tokenizer_files import TokenizerFiles, read_tokenizer
from plait.merging.work import RowMap

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "embeddings.weight",
)
OTHER_TABLES = ("position", "wpe", "token_type")
"""Tables that may have as many rows as the vocabulary, of something else."""
Row = tuple[int, int]
"""A model's number, and a row of its vocabulary."""


@dataclass
class Vocabulary:
    """The result's vocabulary: rows, the row map of each model, tokenizer files to write.

    `maps` gives a model's place in `rows`; a model without one is in order already.
    """

    size: int
    ids: Mapping[str, int]
    rows: list[RowMap] = field(default_factory=list)
    maps: dict[int, int] = field(default_factory=dict)
    files: dict[str, bytes | Path] = field(default_factory=dict)
    old_ids: Mapping[str, int] = field(default_factory=dict)
    """The vocabulary of the model whose config is taken over."""


def rows_of(checkpoint: Checkpoint) -> int | None:
    """How many rows a model's vocabulary has."""
    for name, entry in checkpoint.entries.items():
        if name.endswith(EMBEDDINGS) and not any(part in name for part in OTHER_TABLES):
            return entry.shape[0]
    found = checkpoint.config.get("vocab_size")
    return found if isinstance(found, int) else None


def is_vocabulary(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor has a row for each token: an embedding, a head, a head's bias."""
    tied = name not in checkpoint.entries
    shape = () if tied else checkpoint.entries[name].shape
    if any(part in name for part in OTHER_TABLES) or any(p.isdigit() for p in name.split(".")):
        return False
    # A norm can be as wide as a small vocabulary.
    table = len(shape) == 2 or (len(shape) == 1 and name.endswith("bias") and "norm" not in name)
    return tied or (table and shape[0] == rows_of(checkpoint))


def plan_vocabulary(wanted: Tokens, inputs: Inputs) -> Vocabulary:
    """The result's tokens and every model's way to them.

    A token that a model lacks takes the base model's row, or that of the only model that has it, or
    the mean over those that do (as mergekit documents); rules for single tokens go before. Rows
    beyond the tokens (padding) are the vocabulary's own model's, else a model's mean row.
    """
    references = inputs.recipe.references()
    numbers = {reference: inputs.number(reference) for reference in references}
    files = {r: read_tokenizer(inputs.checkpoint(r).path) for r in references}
    first, tokenizer = _start(wanted, inputs, files)
    for reference in references if wanted.source == "union" else ():
        tokenizer = tokenizer.with_tokens_of(files[reference])
    tokenizer = tokenizer.with_special_tokens(wanted.tokens)
    size = max(max(tokenizer.ids.values()) + 1, rows_of(inputs.checkpoint(first)) or 0)
    step = wanted.pad_to_multiple_of or 1
    made = Vocabulary(-(-size // step) * step, tokenizer.ids, files=tokenizer.written())
    made.old_ids = files[references[0]].ids
    owners = {numbers[r]: files[r].ids for r in references}
    filled = _Fill(wanted.tokens, inputs, owners, _base_number(inputs))
    for reference in references:
        number = numbers[reference]
        rows = rows_of(inputs.checkpoint(reference)) or 0
        found = filled.map_of(number, made, rows, numbers.get(first))
        if found.own != tuple(range(rows)) or rows != made.size:
            made.maps[number] = len(made.rows)
            made.rows.append(found)
    return made


def different_tokens(inputs: Inputs) -> list[str]:
    """Notes on models whose tokenizers give other tokens to the same rows, though sizes agree."""
    first, *others = (inputs.checkpoint(r).path for r in inputs.recipe.references())
    found = []
    for path in dict.fromkeys(others):
        if all((p / "tokenizer.json").is_file() for p in (first, path)):
            if (first / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes():
                continue
            one, two = read_tokenizer(first).ids, read_tokenizer(path).ids
            apart = [token for token, row in two.items() if one.get(token) != row]
            if apart:
                shown = ", ".join(map(repr, apart[:3]))
                found.append(
                    f"{path} has {len(apart)} tokens ({shown}) that {first} lacks or numbers "
                    "otherwise; rows are merged by number. tokenizer_source merges by token."
                )
    return found


def _start(
    wanted: Tokens, inputs: Inputs, files: Mapping[Reference, TokenizerFiles]
) -> tuple[Reference, TokenizerFiles]:
    """The model that the vocabulary starts from: the base, the one named, or the first."""
    base = inputs.recipe.base_model
    if wanted.source == "union":
        first = base or inputs.pattern
    elif wanted.source == "base":
        if base is None:
            raise PlaitError("tokenizer source base: the recipe has no base_model.")
        first = base
    else:
        first = Reference.parse(wanted.source)
    return first, files.get(first) or read_tokenizer(inputs.checkpoint(first).path)


def _base_number(inputs: Inputs) -> int | None:
    base = inputs.recipe.base_model
    return None if base is None else inputs.number(base)


@dataclass
class _Fill:
    """What stands in for rows that a model lacks."""

    rules: Mapping[str, TokenRule]
    inputs: Inputs
    owners: Mapping[int, Mapping[str, int]]
    base: int | None

    def __post_init__(self) -> None:
        self.named = {
            token: self._named(token, rule.source)
            for token, rule in self.rules.items()
            if rule.source is not None and rule.source.model is not None
        }

    def map_of(self, number: int, made: Vocabulary, rows: int, source: int | None) -> RowMap:
        own, zeros = [-1] * made.size, []
        others: list[tuple[int, tuple[Row, ...]]] = []
        for row in range(made.size):  # padding, which no token names
            if number == source and row < rows:
                own[row] = row
        for token, row in made.ids.items():
            rule = self.rules.get(token, TokenRule())
            own[row] = self.owners[number].get(token, -1)
            if own[row] >= rows:
                own[row] = -1
            if rule.source is not None and (rule.force or own[row] < 0):
                own[row] = -1
                if token in self.named:
                    others.append((row, (self.named[token],)))
                else:
                    zeros.append(row)
            elif own[row] < 0 and (sources := self._default(token)):
                others.append((row, sources))
        return RowMap(tuple(own), tuple(others), tuple(zeros))

    def _default(self, token: str) -> tuple[Row, ...]:
        have = {number: ids[token] for number, ids in self.owners.items() if token in ids}
        if self.base in have and self.base is not None:
            return ((self.base, have[self.base]),)
        return tuple(have.items())

    def _named(self, token: str, source: TokenSource) -> Row:
        assert source.model is not None
        number = self.inputs.number(source.model)
        ids = self.owners.get(number)
        if ids is None:
            ids = read_tokenizer(self.inputs.checkpoint(source.model).path).ids
        if source.token_id is not None:
            rows = rows_of(self.inputs.checkpoint(source.model)) or 0
            if not 0 <= source.token_id < rows:
                raise PlaitError(
                    f"{source.model} has {rows} tokens, none numbered {source.token_id}."
                )
            return number, source.token_id
        name = source.token or token
        if name not in ids:
            raise unknown("token", name, _few(ids, name), where=f"the tokenizer of {source.model}")
        return number, ids[name]


def _few(ids: Iterable[str], like: str) -> list[str]:
    """Special tokens, among which a slip is looked for; vocabularies are large."""
    return [token for token in ids if token[:1] == like[:1] == "<"][:2000]
