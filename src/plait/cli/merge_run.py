"""What `plait merge` runs: adapters into one, models into a checkpoint, or a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.cli.common import Shelf, can_draw, note, on_terminal, open_base
from plait.cli.convert import dropped_line, size_of
from plait.errors import PlaitError

GIGABYTE = 10**9


@dataclass(frozen=True)
class Asked:
    """What the command was asked for."""

    inputs: list[str]
    out: str
    method: str = "linear"
    weights: list[float] | dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    statistics: list[str] | None = None
    space: str | None = None
    rank: int | None = None
    energy: float | None = None
    to: str = "plait"
    name: str = "merged"
    base: str | None = None
    into: str | None = None
    seed: int = 0
    processes: int = 1
    shard_size: float = 5.0
    report: Path | None = None


def merge_adapters(asked: Asked, weights_file: str | None) -> None:
    """Adapters into a plain LoRA."""
    import plait

    sources: list[Any] = list(asked.inputs)
    if asked.base is not None:
        model = open_base(asked.base)[0]
        names = [Shelf(model).name(path) for path in asked.inputs]
        sources = [plait.adapters(model)[n] for n in names]
    weights: Any = asked.weights
    if isinstance(weights, dict):
        sources, weights = _stored(sources, weights, str(weights_file))
    merged = plait.merge(
        sources,
        asked.method,
        weights,
        space=asked.space,
        rank=asked.rank,
        energy=asked.energy,
        statistics=asked.statistics,
        seed=asked.seed,
        name=asked.name,
        progress=on_terminal(),
        **asked.options,
    )
    facts = merged.info["merge"]
    used = ", ".join("by site" if isinstance(w, dict) else f"{w:g}" for w in facts["weights"])
    print(f"merged {len(sources)} adapters ({asked.method} in {facts['space']}, weights {used})")
    _say_adapter(merged)
    written = merged.save(asked.out, format=asked.to)
    print(f"wrote {written} ({asked.to}, {size_of(Path(written))})")
    if asked.report is not None:
        report_adapters(asked.report, sources, merged)


def merge_models(asked: Asked) -> None:
    """Models (and adapters of a base) into a checkpoint; a base may be given by its short name."""
    import plait
    from plait.training.bases import get_base

    if isinstance(asked.weights, dict):
        raise PlaitError("weights by site are for adapters; give one number for each model.")
    for name, value in (("--rank", asked.rank), ("--energy", asked.energy)):
        if value is not None:
            raise PlaitError(f"{name} cuts adapters; a checkpoint is written whole, leave it out.")
    written = plait.merge_checkpoints(
        asked.inputs,
        asked.out,
        asked.method,
        asked.weights,
        base=None if asked.into is None else get_base(asked.into),
        statistics=asked.statistics,
        seed=asked.seed,
        shard_size=_bytes(asked.shard_size),
        processes=asked.processes,
        progress=on_terminal(),
        **asked.options,
    )
    where = "" if asked.into is None else f" into {asked.into}"
    print(f"merged {len(asked.inputs)} inputs{where} ({asked.method})")
    _say_checkpoint(asked, Path(written))


def merge_recipe(asked: Asked, models: dict[str, str]) -> None:
    """A merge file: mergekit's YAML, or one with Plait's own keys."""
    from plait.merging.recipes import merge_recipe as run

    done = run(
        asked.inputs[0],
        asked.out,
        models=models,
        find=_short_name,
        to=asked.to,
        seed=asked.seed,
        shard_size=_bytes(asked.shard_size),
        processes=asked.processes,
        progress=on_terminal(),
    )
    for line in done.notes:
        note(f"note: {line}")
    print(f"merged {len(done.inputs)} inputs as {asked.inputs[0]} says ({done.method})")
    if done.adapter is None:
        _say_checkpoint(asked, done.path)
        return
    _say_adapter(done.adapter)
    print(f"wrote {done.path} ({asked.to}, {size_of(done.path)})")
    if asked.report is not None:
        report_adapters(asked.report, [str(path) for path in done.paths], done.adapter)


def holds_models(inputs: list[str]) -> bool:
    """Whether one of the inputs is a whole model."""
    from plait.merging.checkpoints import holds_checkpoint

    return any(Path(path).is_dir() and holds_checkpoint(path) for path in inputs)


def report_adapters(folder: Path, sources: list[Any], merged: Any) -> None:
    """merge.json and merge.png about a merge of adapters."""
    from plait.merging.report import adapter_facts, write_report
    from plait.merging.sources import read_sources

    facts = adapter_facts(read_sources(sources), merged)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder / "merge.json", merged.info["merge"], facts)
    _picture(folder, facts)


def _say_adapter(merged: Any) -> None:
    ranks = sorted({getattr(d, "rank", 0) for d in merged.deltas.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    print(f"{len(merged.deltas)} sites, rank {span}, {merged.num_parameters():,} parameters")
    print(dropped_line(merged.info["dropped_energy"]))


def _say_checkpoint(asked: Asked, written: Path) -> None:
    print(f"wrote {written} ({size_of(written)}); facts on every tensor in merge.json")
    if asked.report is not None:
        text = (written / "merge.json").read_text(encoding="utf-8")
        asked.report.mkdir(parents=True, exist_ok=True)
        (asked.report / "merge.json").write_text(text, encoding="utf-8")
        _picture(asked.report, json.loads(text)["sites"])


def _picture(folder: Path, facts: dict[str, Any]) -> None:
    """The heat map, where matplotlib is installed."""
    note(f"wrote {folder / 'merge.json'}")
    if not can_draw("merge.png"):
        return
    from plait.merging.heatmap import heat_map

    note(f"wrote {heat_map(facts, folder / 'merge.png')}")


def _stored(sources: list[Any], found: dict[str, Any], file: str) -> tuple[list[Any], list[Any]]:
    """The adapters in the file's order of names, and their weights by site."""
    from plait.cli.search_run import distinct
    from plait.merging.search.stored import fold
    from plait.merging.sources import read_sources

    adapters = read_sources(sources)
    names = distinct([adapter.name for adapter in adapters])
    if set(names) != set(found):
        raise PlaitError(
            f"{file} has weights for {', '.join(found)}; the adapters are {', '.join(names)}."
        )
    return fold(adapters, [found[name] for name in names])


def _short_name(name: str) -> str | None:
    """Where a base of this short name lies; None for any other name."""
    from plait.training.bases import BASES, get_base

    return str(get_base(name)) if name in BASES else None


def _bytes(gigabytes: float) -> int:
    if gigabytes <= 0:
        raise PlaitError(f"--shard-size is gigabytes, more than 0, not {gigabytes:g}.")
    return max(1, int(gigabytes * GIGABYTE))
