"""Extraction: CPU seconds, file size and error beside mergekit-extract-lora, in one run.

    python benchmarks/extraction.py                               # Plait alone
    python benchmarks/extraction.py --mergekit path/to/mergekit-extract-lora

The fine-tune is SmolLM2-135M plus a change of rank 8 in every matrix, with dense noise a third of
its size, made in a temporary folder. Every contender is its command in a process of its own, with
one thread; CPU seconds include its imports, which are timed alone too (Plait's from bytecode, as an
installed package has it: a first run, not counted, makes it). The error is the mean of
||dW - B A|| / ||dW|| over the 210 linear layers, read from the files. One JSON line goes to
benchmarks/results/extraction.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from merging_speed import PLAIT, base_folder, measure  # noqa: E402
from report import machine  # noqa: E402

RESULTS = HERE / "results" / "extraction.jsonl"
INNER = 8


def make_tuned(folder: Path, noise: float = 0.33) -> Path:
    """The base with every matrix moved: rank INNER, and dense noise `noise` times as large."""
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(base_folder() / "model.safetensors").items():
        tensors[name] = weight
        if weight.dim() == 2:
            rows, columns = weight.shape
            left = torch.randn(rows, INNER, generator=draw)
            change = left @ torch.randn(INNER, columns, generator=draw) / INNER**0.5
            change += noise * torch.randn(rows, columns, generator=draw)
            tensors[name] = weight + 0.01 * change
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in base_folder().glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    return folder


def error(tuned: Path, folder: Path) -> float:
    """Of a PEFT folder, over the linear layers within the blocks."""
    from safetensors.torch import load_file

    import plait

    before, after = (load_file(f / "model.safetensors") for f in (base_folder(), tuned))
    deltas = plait.read_adapter(folder).deltas
    errors = []
    for path in deltas:
        if (
            ".layers." in path
            and f"{path}.weight" in before
            and before[f"{path}.weight"].dim() == 2
        ):
            change = (after[f"{path}.weight"] - before[f"{path}.weight"]).double()
            low = deltas[path].factors()
            assert low is not None
            near = low.scale * (low.B.detach().double() @ low.A.detach().double())
            errors.append(float((change - near).norm() / change.norm()))
    assert len(errors) == 210, f"{len(errors)} layers in {folder}"
    return sum(errors) / len(errors)


def plait_command(tuned: Path, out: Path, rank: int, form: str) -> list[str]:
    where = [str(base_folder()), str(tuned), "-o", str(out), "--to", form]
    how = ["--rank", str(rank), "--dtype", "float16"]
    bytecode = ["-X", f"pycache_prefix={tuned.parent / 'bytecode'}"]
    return [sys.executable, *bytecode, "-c", PLAIT, "extract", *where, *how]


def mergekit_command(program: str, tuned: Path, out: Path, rank: int) -> list[str]:
    where = ["--model", str(tuned), "--base-model", str(base_folder()), "--out-path", str(out)]
    return [program, *where, "--max-rank", str(rank), "--quiet"]


def imports(python: str, modules: str) -> float:
    """CPU seconds until a command's modules are there."""
    return float(measure([python, "-c", f"import {modules}"])["cpu_s"])


def size(folder: Path) -> float:
    """Megabytes of the adapter's tensors on disk."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", default=shutil.which("mergekit-extract-lora"))
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tuned = make_tuned(work / "tuned")
        first = plait_command(tuned, work / "first", args.rank, "plait")
        writing = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run(first, env=writing, check=True, capture_output=True)
        for form in ("plait", "peft"):
            command = plait_command(tuned, work / form, args.rank, form)
            found[f"plait, {form}"] = measure(command) | {"mb": size(work / form)}
        own_error = error(tuned, work / "peft")
        start = imports(sys.executable, "plait.cli.main, plait.compression, plait.training.bases")
        for case in ("plait, plait", "plait, peft"):
            found[case] |= {"error": own_error, "imports_s": start}
        if args.mergekit:
            peer = imports(
                str(Path(args.mergekit).with_name("python")), "mergekit.scripts.extract_lora"
            )
            for case, flags in (("mergekit", []), ("mergekit --embed-lora", ["--embed-lora"])):
                out = work / case.replace(" ", "")
                command = mergekit_command(args.mergekit, tuned, out, args.rank)
                # Without a network it ends with 1, after everything but its README is written.
                figures = measure([*command, *flags], accept=(0, 1))
                facts = {"mb": size(out), "error": error(tuned, out), "imports_s": peer}
                found[case] = figures | facts
    own = found["plait, plait"]
    for case, line in found.items():
        whole = line["cpu_s"] / own["cpu_s"]
        work = (line["cpu_s"] - line["imports_s"]) / (own["cpu_s"] - own["imports_s"])
        print(
            f"{case:22} {line['cpu_s']:6.2f} CPU s ({line['imports_s']:.2f} imports) "
            f"{line['peak_mb']:6.0f} MB memory {line['mb']:6.1f} MB file  error "
            f"{line['error']:.4f}  {whole:5.2f} x Plait's, without imports {work:5.2f} x"
        )
    with RESULTS.open("a") as out_file:
        line = {"rank": args.rank, "machine": machine(), "found": found}
        out_file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
