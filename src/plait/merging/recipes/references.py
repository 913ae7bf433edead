"""Models as a recipe names them: `path`, `owner/name@revision`, `model+adapter`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.merging.checkpoints import holds_checkpoint
from plait.merging.work import Model

HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PARTS = frozenset(("model", "lora"))
"""Keys of a reference that is written out."""
Find = Callable[[str], str | None]
"""A further place to look a name up in; None where it is not there."""


@dataclass(frozen=True)
class Place:
    """A folder's or a repository's name, and a revision of it."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """`name` or `name@revision`; an `@` of an existing folder's name is part of it."""
        name, at, revision = text.rpartition("@")
        if not at or Path(text).exists() or not HUB.fullmatch(name):
            return cls(text)
        return cls(name, revision)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Reference:
    """A model, or a model with a LoRA on it."""

    model: Place
    lora: Place | None = None

    @classmethod
    def parse(cls, value: Any) -> Reference:
        """From a word, or from {model: {path, revision}, lora: {path, revision}}."""
        if isinstance(value, str) and value.strip():
            text = value.strip()
            model, plus, lora = text.partition("+")
            if not plus or Path(text).exists():
                return cls(Place.parse(text))
            return cls(Place.parse(model), Place.parse(lora))
        if isinstance(value, Mapping) and "model" in value and set(value) <= PARTS:
            added = value.get("lora")
            return cls(_place(value["model"]), None if added is None else _place(added))
        if isinstance(value, Mapping) and "path" in value:
            return cls(_place(value))
        raise ValueError(f"{value!r} names no model; write a path, owner/name or model+adapter.")

    def __str__(self) -> str:
        return str(self.model) if self.lora is None else f"{self.model}+{self.lora}"


def _place(value: Any) -> Place:
    if isinstance(value, str):
        return Place.parse(value)
    if isinstance(value, Mapping) and "path" in value and set(value) <= {"path", "revision"}:
        return Place(str(value["path"]), value.get("revision"))
    raise ValueError(f"{value!r} names no model; write a path, or {{path: ..., revision: ...}}.")


class Shelf:
    """Where references lie on this disk.

    A name is looked up in `given`, then as a path from here and from the recipe's folder, then by
    `find`, at last among the hub's repositories (its cache, or a download).
    """

    def __init__(
        self, folder: Path, given: Mapping[str, str] | None = None, find: Find | None = None
    ) -> None:
        self.folder, self.given, self.find = folder, dict(given or {}), find
        self._known: dict[Place, str] = {}

    def model(self, reference: Reference, base: Reference | None = None) -> Model:
        """The input; an adapter named alone is that adapter on `base`."""
        path = self.path(reference.model)
        lora = () if reference.lora is None else (self.path(reference.lora),)
        if holds_checkpoint(path):
            return Model(path, lora)
        if lora or base is None:
            raise PlaitError(
                f"{reference.model} is no model but an adapter; write model+{reference.model}, or "
                "give base_model, the model that it changes."
            )
        return Model(self.path(base.model), (path,))

    def is_adapter(self, reference: Reference) -> bool:
        """Whether a reference names an adapter alone."""
        return reference.lora is None and not holds_checkpoint(self.path(reference.model))

    def path(self, place: Place) -> str:
        if place not in self._known:
            self._known[place] = self._look_up(place)
        return self._known[place]

    def _look_up(self, place: Place) -> str:
        given = self.given.get(str(place), self.given.get(place.name))
        name = place.name if given is None else given
        for candidate in (Path(name), self.folder / name):
            if (place.revision is None or given is not None) and candidate.exists():
                return str(candidate)
        found = self.find(name) if self.find is not None else None
        if found is not None:
            return found
        if HUB.fullmatch(name):
            return _from_hub(name, place.revision)
        raise PlaitError(
            f"model {name!r}: there is no such file or folder, here or beside the recipe."
        )


def _from_hub(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise PlaitError(
            f"model {name!r}: no folder of that name here or beside the recipe, and not to be had "
            f"from the hub ({first.rstrip('.')}); say where it lies with --model {name}=FOLDER."
        ) from None
