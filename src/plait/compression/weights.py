"""Two sets of full weights side by side, and where in a model each of their tensors stands.

A name in a checkpoint says neither how a matrix is stored (GPT-2 keeps W as [in, out], an embedding
as [vocabulary, dim]) nor who else uses it (a head tied to the embedding). A model says both, and
its structure alone is enough: built from `config.json` on the meta device, it holds no numbers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plait.adapter import Site
from plait.adapter.site import make_parameter_site, make_site, rebuild_site
from plait.errors import PlaitError
from plait.merging.checkpoints import Checkpoint

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]
"""Full weights: a checkpoint's folder or file, a model, or a state dict."""

TABLES = ("embed", "wte", "wpe")
"""What the names of embeddings hold, for weights that come without a model."""


@dataclass(frozen=True)
class Weights:
    """Named tensors, each read when it is asked for."""

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


@contextmanager
def open_weights(source: Source, label: str) -> Iterator[Weights]:
    """The weights of a source; a checkpoint's files stay mapped, and closed at the end."""
    if isinstance(source, str | os.PathLike):
        with Checkpoint(source) as opened:
            shapes = {name: entry.shape for name, entry in opened.entries.items()}
            yield Weights(os.fspath(source), shapes, opened.read)
        return
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    yield Weights(label, shapes, lambda name: tensors[name].detach())


def skeleton(source: Source) -> nn.Module | None:
    """The model that a source belongs to, without its numbers where it is a folder; None where
    nothing says it."""
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str | os.PathLike) or not (Path(source) / "config.json").is_file():
        return None
    import transformers

    config = transformers.AutoConfig.from_pretrained(os.fspath(source))
    kind = (getattr(config, "architectures", None) or [""])[0]
    cls: Any = getattr(transformers, kind, None)
    with torch.device("meta"):
        if cls is not None and hasattr(cls, "_from_config"):
            return cls._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config)


class Keyed(Protocol):
    """What tells tensors that are one tensor."""

    def key(self, name: str) -> object:
        """The same for all names of one tied tensor."""


class Places:
    """Where tensors stand in a model: a name has one site, or several where weights are tied."""

    def __init__(self, model: nn.Module | None) -> None:
        self.known = model is not None
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._names: dict[str, int] = {}
        self._sites: dict[int, dict[str, Site]] = {}
        if model is None:
            return
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[name] = id(parameter)
        for path, module in model.named_modules():
            for leaf, own in module._parameters.items():
                if own is not None:
                    self._add(path, module, leaf, own)

    def _add(self, path: str, module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
        name = f"{path}.{leaf}" if path else leaf
        site = make_site(path, module) if leaf == "weight" else None
        site = site or make_parameter_site(name, module, leaf)
        self._sites.setdefault(id(parameter), {})[site.path] = site.bare()

    def key(self, name: str) -> object:
        """The same for all names of one tied tensor."""
        return self._names.get(name, self._names.get(self._prefix + name, name))

    def sites(self, name: str, shape: tuple[int, ...]) -> list[Site]:
        """Every site that reads this tensor; none where the model has no such parameter."""
        if not self.known:
            return [_guessed(name, shape)]
        key = self.key(name)
        return list(self._sites[key].values()) if isinstance(key, int) else []


def _guessed(name: str, shape: tuple[int, ...]) -> Site:
    """The site of a tensor of which only the name is known."""
    path, _, leaf = name.rpartition(".")
    if leaf == "weight" and len(shape) == 2:
        if any(word in path.rpartition(".")[2] for word in TABLES):
            return rebuild_site(path, "embedding", shape[::-1], {})
        return rebuild_site(path, "linear", shape, {})
    if leaf == "weight" and len(shape) > 2:
        flat = (shape[0], int(torch.Size(shape[1:]).numel()))
        return rebuild_site(path, "conv", flat, {"kernel": tuple(shape[1:])})
    return rebuild_site(name, "parameter", shape, {})


def canonical(site: Site, stored: Tensor) -> Tensor:
    """A tensor as its module stores it, in the site's canonical orientation."""
    holder = nn.Module()
    leaf = site.path.rpartition(".")[2] if site.kind == "parameter" else "weight"
    holder.register_parameter(leaf, nn.Parameter(stored, requires_grad=False))
    return dataclasses.replace(site, module=holder).weight()


def turned(site: Site) -> bool:
    """Whether the module stores the transpose of the canonical weight."""
    return site.kind != "parameter" and canonical(site, torch.empty(1, 2)).shape == (2, 1)


def pairs(base: Weights, tuned: Weights, places: Keyed) -> list[tuple[str, str]]:
    """(name in the base, name in the tuned model) of each tensor that both have, tied ones once.

    Raises PlaitError for a tensor that only one of them has, and for other shapes.
    """
    mine, theirs = ({places.key(n): n for n in w.shapes} for w in (base, tuned))
    for one, other, has in ((mine, theirs, base), (theirs, mine, tuned)):
        if alone := [name for key, name in one.items() if key not in other]:
            raise PlaitError(
                f"only {has.label} has {alone[0]!r} ({len(alone)} such tensors); give a fine-tune "
                "and the base that it started from."
            )
    for key, name in mine.items():
        a, b = base.shapes[name], tuned.shapes[theirs[key]]
        if a != b:
            raise PlaitError(
                f"{name!r} is {list(a)} in {base.label} and {list(b)} in {tuned.label}; a "
                "vocabulary that grew cannot be extracted as a change."
            )
    return [(name, theirs[key]) for key, name in mine.items()]
