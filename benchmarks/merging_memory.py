"""Merging: does memory grow with the size of the models, or with the number of adapters?

    python benchmarks/merging_memory.py                 # checkpoints of 0.75 and 3 GB, in shards
    python benchmarks/merging_memory.py --sizes 1 8

Two fine-tunes of one synthetic base (Llama's shapes, bfloat16, shards of 500 MB; a larger one has
more layers) are merged by TIES, and adapters (4 to 32, rank 16, 210 sites) one after the other by
OPCM. Each case runs in a process of its own whose memory is read from /proc every few milliseconds:
"own" is what the process allocated (RssAnon), "resident" counts mapped pages of the input files
too, which the system takes back when it needs them. One JSON line a case goes to
benchmarks/results/merging-memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from report import machine  # noqa: E402

RESULTS = HERE / "results" / "merging-memory.jsonl"
WIDTH, INNER, WORDS, SHARD = 2048, 5632, 32000, 500_000_000


# -- what is merged -------------------------------------------------------------------------------


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama of 2,048 with that many layers."""
    yield "model.embed_tokens.weight", (WORDS, WIDTH)
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{at}.self_attn.{name}.weight", (WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            yield f"{at}.mlp.{name}.weight", (INNER, WIDTH)
        yield f"{at}.mlp.down_proj.weight", (WIDTH, INNER)
        yield f"{at}.input_layernorm.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)


def make_checkpoint(folder: Path, gigabytes: float, seed: int) -> None:
    """A checkpoint of about that size in shards; different seeds are fine-tunes of one base."""
    from plait.merging.shards import Planned, plan_shards, shard_names, write_index, write_shard

    layer = 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER + WIDTH)
    layers = max(1, round((gigabytes * 1e9 - 2 * WORDS * WIDTH) / layer))
    planned = [Planned(name, shape, torch.bfloat16) for name, shape in shapes(layers)]
    noise = torch.randn(WORDS * WIDTH, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    tuned = torch.randn(WORDS * WIDTH, generator=torch.Generator().manual_seed(seed)).mul_(1e-3)

    def value(tensor: Planned) -> torch.Tensor:
        count = tensor.nbytes // 2
        made = noise[:count] if seed == 0 else noise[:count] + tuned[:count]
        return made.to(torch.bfloat16).reshape(tensor.shape)

    folder.mkdir(parents=True)
    shards = plan_shards(planned, SHARD)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_shard(folder / name, shard, value)
    write_index(folder, dict(zip(names, shards, strict=True)))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def size_of(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9


# -- contenders, each in a process of its own -----------------------------------------------------


def opcm(count: int) -> None:
    """Adapters that come one after the other: one of them, and the merge, in memory."""
    from plait.linalg import LowRank
    from plait.merging.methods.opcm import Arrivals

    so_far = Arrivals(0.5, most=32)
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        low = {
            f"layers.{i}": LowRank(
                torch.randn(1536, 16, generator=g), torch.randn(16, 576, generator=g)
            )
            for i in range(210)
        }
        so_far.add(low)


def ties(folder: str) -> None:
    from plait.cli.main import main

    at = Path(folder)
    models = [str(at / "model-1"), str(at / "model-2")]
    out = str(at / "merged")
    sys.exit(main(["merge", *models, "--method", "ties", "--into", str(at / "base"), "-o", out]))


# -- measuring ------------------------------------------------------------------------------------


def measure(arguments: list[str]) -> dict[str, Any]:
    """Seconds and the peaks of a process's own and resident memory, in MB (10^6 bytes)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], env=environment, stdout=subprocess.DEVNULL
    )
    peak = {"RssAnon": 0, "VmRSS": 0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for line in lines:
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(rest.split()[0]) * 1024)
        time.sleep(0.004)
    if process.wait():
        raise SystemExit(f"{arguments} failed")
    return {
        "own_mb": peak["RssAnon"] / 1e6,
        "resident_mb": peak["VmRSS"] / 1e6,
        "wall_s": time.perf_counter() - start,
    }


def checkpoint_cases(sizes: list[float]) -> Iterator[dict[str, Any]]:
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=HERE, prefix=".merging-") as folder:
            for seed, name in enumerate(("base", "model-1", "model-2")):
                make_checkpoint(Path(folder, name), size, seed)
            found = measure(["--ties", folder])
            written = size_of(Path(folder, "merged"))
            assert abs(written - size_of(Path(folder, "base"))) < 1e-3
            yield {"case": "ties of 2 models", "model_gb": round(written, 3)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.75, 3.0], help="GB a model")
    parser.add_argument("--counts", type=int, nargs="*", default=[4, 8, 32], help="adapters")
    parser.add_argument("--opcm", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ties", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.opcm:
        return opcm(args.opcm)
    if args.ties:
        return ties(args.ties)
    with RESULTS.open("a") as out:
        cases = [{"case": "opcm", "adapters": n} | measure(["--opcm", str(n)]) for n in args.counts]
        for case in (*cases, *checkpoint_cases(args.sizes)):
            out.write(json.dumps(case | {"machine": machine()}) + "\n")
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in case.items()})


if __name__ == "__main__":
    main()
