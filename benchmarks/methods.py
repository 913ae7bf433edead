"""Every registered method on one model: parameters, file, step time, memory, attach and start time.

    python benchmarks/methods.py                          # SmolLM2-135M, all methods
    python benchmarks/methods.py --model six-layer      # its small twin, far quicker
    python benchmarks/methods.py --methods dora vera --rounds 9
    python benchmarks/methods.py --report               # table and plot from what is there

Each method is measured at its defaults and, where one integer option can bring it there, at the
parameter budget of LoRA r=8; beside it, in the same rounds, LoRA r=8 itself, the frozen base alone
(the bound), PEFT's form of the method with the same options and, for rules that train base weights,
AdamW on all of them. A round is one training step of each (forward, backward, AdamW, and the
method's own rule), in CPU seconds of one thread; figures are medians of paired ratios. Peak memory
is that of a process of its own.

One JSON line a method goes to benchmarks/results/methods-<model>.jsonl; a method that is there is
skipped, so an interrupted run goes on where it stopped (`--again` measures it anew).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from method_contenders import REFERENCE, Contender, bound, budget_options, full, ours, theirs
from method_table import RESULTS, read_results, write_report
from models import MODELS, random_batch
from report import machine, peak_megabytes
from torch import nn

import plait

KINDS = ("bound", "lora", "full", "default", "budget", "peft")
PATIENCE = 3600
"""Seconds after which a method's process is given up."""
SLOW = 8.0
"""A contender that takes this many times LoRA's step is measured in one round."""


def make(kind: str, args: argparse.Namespace, base: nn.Module, name: str) -> Contender | None:
    """One contender of a method, or None where there is no such thing."""
    batch = random_batch(base, args.rows, args.tokens)
    if kind == "bound":
        return bound(base, batch)
    if kind == "lora":
        return ours(base, batch, "lora", REFERENCE)
    if kind == "full":
        rule = plait.get_method(name).rule
        trains_base = rule is not None and "base" in rule().claims
        return full(base, batch) if trains_base else None
    if kind == "default":
        return ours(base, batch, name, {})
    if kind == "peft":
        return theirs(base, batch, name, {})
    options = budget_options(base, plait.get_method(name), _lora_parameters(base))
    return ours(base, batch, name, options) if options else None


def _lora_parameters(base: nn.Module) -> int:
    lora = plait.get_method("lora")
    sites = plait.find_sites(base, lora.targets, kinds=lora.kinds)
    return lora.count(sites, lora.options(**REFERENCE))  # type: ignore[misc]


# -- one method, in a process of its own ----------------------------------------------------------


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    base = MODELS[args.model](torch.float32)
    made: dict[str, Contender] = {}
    found: dict[str, Any] = {}
    for kind in KINDS:
        try:
            contender = make(kind, args, base, name)
        except Exception as e:  # the others are measured all the same, and the table says why
            found[kind] = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
            continue
        if contender is not None:
            made[kind] = contender
            found[kind] = contender.facts
    for kind, contender in made.items():  # the first step, which allocates
        found[kind]["flops"] = _flops(contender.step)
    seconds = _rounds(made, args.rounds)
    for kind in made:
        found[kind]["step_s"] = statistics.median(seconds[kind].values())
        for other in {"lora", "full", "bound"} & seconds.keys():
            found[kind][f"over_{other}"] = _ratio(seconds[kind], seconds[other])
    return found


def _rounds(made: dict[str, Contender], rounds: int) -> dict[str, dict[int, float]]:
    """{contender: {round: CPU seconds}}; those that take far longer than the rest have only one."""
    found = {kind: {0: _seconds(contender.step)} for kind, contender in made.items()}
    slow = {kind for kind, s in found.items() if s[0] > SLOW * found.get("lora", s)[0]}
    kinds = list(made)
    for turn in range(1, rounds):
        # Each starts a round in turn: what ran before leaves its mark on the caches.
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            if kind not in slow:
                found[kind][turn] = _seconds(made[kind].step)
    return found


def _seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _ratio(own: dict[int, float], other: dict[int, float]) -> float:
    return statistics.median(own[turn] / other[turn] for turn in own.keys() & other.keys())


def _flops(step: Callable[[], None]) -> int:
    """Multiplications and additions of one step's matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    def product(added: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    # The counter does not know that products may also be added in place.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})
    with counter:
        step()
    return counter.get_total_flops()


def peak(args: argparse.Namespace, name: str, kind: str) -> float:
    """Peak resident megabytes of two steps, in this process."""
    contender = make(kind, args, MODELS[args.model](torch.float32), name)
    assert contender is not None
    for _ in range(2):  # the first makes the optimiser's state
        contender.step()
    return peak_megabytes()


# -- all methods ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    from rich.progress import Progress

    done = {} if args.again else read_results(args.model)
    todo = [n for n in args.methods or plait.method_names() if n not in done]
    RESULTS.mkdir(exist_ok=True)
    with Progress() as progress, (RESULTS / f"methods-{args.model}.jsonl").open("a") as out:
        task = progress.add_task(args.model, total=len(todo))
        for name in todo:
            progress.update(task, description=name)
            line = _line(args, name)
            out.write(json.dumps(line) + "\n")
            out.flush()
            if "error" in line:
                progress.console.print(f"{name}: {line['error']}", highlight=False)
            progress.advance(task)


def _line(args: argparse.Namespace, name: str) -> dict[str, Any]:
    method = plait.get_method(name)
    setting = {key: getattr(args, key) for key in ("model", "rows", "tokens", "rounds")}
    line = {"method": name, "axis": method.axis, "machine": machine(), **setting}
    found = _child(args, "--one", name)
    if "error" not in found and not args.no_memory:
        for kind in ("full", "default", "peft"):
            if "step_s" in found.get(kind, {}):
                answer = _child(args, "--one", name, "--peak", kind)
                found[kind]["peak_mb"] = answer.get("peak_mb")
    own = found.get("default", {})
    if "error" not in found and "error" in own:
        found["error"] = own["error"]
    return line | found


def _child(args: argparse.Namespace, *flags: str) -> dict[str, Any]:
    keys = ("model", "rows", "tokens", "rounds")
    common = [flag for key in keys for flag in (f"--{key}", str(getattr(args, key)))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, *common, *flags]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {PATIENCE} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit {done.returncode}: {last[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--methods", nargs="*", help="names; all by default")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps({"peak_mb": peak(args, args.one, args.peak)}))
    elif args.one:
        print(json.dumps(measure(args, args.one)))
    else:
        if not args.report:
            run(args)
        print("wrote " + " and ".join(str(path) for path in write_report()))


if __name__ == "__main__":
    main()
