"""`python -m benchmarks.merging`: whatever has no result yet, then the table and the plot.

Experts are trained once and kept; each contender's line is written as soon as it is there, so an
interrupted run goes on where it stopped. New merge methods of the library enter by themselves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.merging.base import load_minilm
from benchmarks.merging.bench import Bench
from benchmarks.merging.contenders import contenders
from benchmarks.merging.page import REFERENCES, write_report
from benchmarks.merging.results import append, read_results
from benchmarks.merging.scorer import Scorer
from benchmarks.merging.searches import search_labels, search_row
from benchmarks.merging.tasks import all_tasks
from report import machine


def open_bench(count: int) -> Bench:
    """The benchmark of the first `count` experts."""
    encoder, tokenizer = load_minilm()
    tasks = all_tasks()
    chosen = [t for t in tasks if t.kind == "held-in"][:count]
    others = [t for t in tasks if t.kind != "held-in"] if count == 8 else []
    return Bench(Scorer(encoder), tokenizer, [*chosen, *others])


def run(count: int, wanted: list[str], again: bool) -> None:
    """Every contender that has no line yet."""
    known = {} if again else read_results()
    merges = {c.label: c for c in contenders()}
    labels = wanted or [*REFERENCES, *merges, *search_labels()]
    left = [label for label in labels if (label, count) not in known]
    if not left:
        return
    bench = open_bench(count)
    if any(label in REFERENCES for label in left):
        for line in bench.references():
            _write(bench, line)
    for number, label in enumerate(left, 1):
        if label in REFERENCES:
            continue
        print(f"{number}/{len(left)} {label}", file=sys.stderr, flush=True)
        try:
            line = bench.row(merges[label]) if label in merges else search_row(bench, label)
        except Exception as e:  # the others are measured all the same; this one is tried again
            line = {
                "label": label,
                "error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}",
            }
            print(f"  {line['error']}", file=sys.stderr, flush=True)
        _write(bench, line)


def _write(bench: Bench, line: dict[str, Any]) -> None:
    setting = {
        "rows": bench.sizes[2],
        "others": bench.sizes[3],
        "validation": bench.sizes[1] * len(bench.held_in),
        "budget": bench.budget,
    }
    append(
        {
            "experts": len(bench.held_in),
            **line,
            "kinds": bench.kinds,
            "setting": setting,
            "machine": machine(),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__)
    parser.add_argument("--methods", nargs="*", default=[], help="labels; all by default")
    parser.add_argument("--experts", type=int, default=8, help="merge the first so many")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.report:
        run(arguments.experts, arguments.methods, arguments.again)
    print("wrote " + " and ".join(str(path) for path in write_report()))


if __name__ == "__main__":
    main()
