"""Merging: CPU seconds and memory beside PEFT's add_weighted_adapter and mergekit, in one run.

    python benchmarks/merging_speed.py                           # what is installed
    python benchmarks/merging_speed.py --mergekit path/to/mergekit-yaml

Adapters are LoRAs of rank 16 on all linears of SmolLM2-135M with random factors; full models are
the base plus noise in bfloat16, four of them (kept in benchmarks/merged). Every contender runs in a
process of its own with one thread; CPU seconds are that process's own, imports included, and
"inner_s" those of the merge alone. One JSON line a case goes to
benchmarks/results/merging-speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from report import machine  # noqa: E402

WORK, RESULTS = HERE / "merged", HERE / "results" / "merging-speed.jsonl"
RANK = 16
PLAIT = "import sys; from plait.cli.main import main; sys.exit(main())"


# -- what is merged -------------------------------------------------------------------------------


def base_folder() -> Path:
    from plait.training.bases import get_base

    return Path(get_base("smollm2-135m"))


def make_adapters(count: int) -> list[Path]:
    """Adapters with random factors, in PEFT's format."""
    import plait
    from plait.training.bases import load_base

    made = [WORK / f"adapter-{i}" for i in range(count)]
    if all(path.is_dir() for path in made):
        return made
    model, _ = load_base("smollm2-135m")
    for i, path in enumerate(made):
        adapter = plait.attach(model, "lora", name=f"a{i}", rank=RANK, seed=i, activate=False)
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for delta in adapter.deltas.values():
                delta.B.copy_(0.02 * torch.randn(delta.B.shape, generator=g))
        adapter.save(path, format="peft")
    return made


def make_models(count: int) -> list[Path]:
    """The base, and `count` fine-tunes of it: bfloat16 folders."""
    from safetensors.torch import load_file, save_file

    made = [WORK / "base", *(WORK / f"model-{i}" for i in range(count))]
    if all(path.is_dir() for path in made):
        return made
    weights = {n: t.bfloat16() for n, t in load_file(base_folder() / "model.safetensors").items()}
    for i, path in enumerate(made):
        work = Path(tempfile.mkdtemp(dir=WORK))
        g = torch.Generator().manual_seed(i)
        noise = 0.0 if path.name == "base" else 0.005
        tensors = {
            n: (t.float() + noise * torch.randn(t.shape, generator=g)).bfloat16()
            for n, t in weights.items()
        }
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        for file in base_folder().glob("*.json"):
            shutil.copyfile(file, work / file.name)
        work.rename(path)
    return made


# -- contenders, each in a process of its own -----------------------------------------------------


def plait_svd(adapters: list[str], out: str) -> None:
    import plait

    inputs = [plait.read_adapter(path) for path in adapters]
    start = time.process_time()
    merged = plait.merge(inputs, rank=RANK)
    print(json.dumps({"inner_s": time.process_time() - start}))
    merged.save(out)


def peft_svd(adapters: list[str], out: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder())
    names = [f"a{i}" for i in range(len(adapters))]
    wrapped = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        wrapped.load_adapter(path, adapter_name=name)
    start = time.process_time()
    weights = [1 / len(names)] * len(names)
    wrapped.add_weighted_adapter(names, weights, "m", combination_type="svd", svd_rank=RANK)
    print(json.dumps({"inner_s": time.process_time() - start}))


CONTENDERS: dict[str, Callable[[list[str], str], None]] = {
    "plait_svd": plait_svd,
    "peft_svd": peft_svd,
}


def mergekit_config(models: list[Path], method: str, density: float) -> str:
    import yaml

    parameters = {"weight": 1.0} | ({"density": density} if method != "linear" else {})
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": parameters} for m in models[1:]],
        "dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = str(models[0])
    return yaml.safe_dump(config)


# -- measuring ------------------------------------------------------------------------------------


def measure(command: list[str], accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """CPU seconds, peak memory and last line of output of one process that ends as accepted."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)  # of this process alone
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        out = output.read()
    if process.returncode not in accept:
        raise SystemExit(f"{command[0]} failed: {out.strip()[-500:]}")
    found = {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - start,
        "peak_mb": used.ru_maxrss * 1024 / 1e6,
    }
    last = (out.strip().splitlines() or [""])[-1]
    return found | (json.loads(last) if last.startswith("{") else {})


def ours(name: str, inputs: list[Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        flags = ["--one", name, "--out", f"{folder}/out", "--inputs", *map(str, inputs)]
        return measure([sys.executable, __file__, *flags])


def plait_into(models: list[Path], method: str, density: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        command = [
            sys.executable,
            "-c",
            PLAIT,
            "merge",
            *map(str, models[1:]),
            "--method",
            method,
        ]
        if method != "linear":
            command += ["--density", str(density)]
        return measure([*command, "--into", str(models[0]), "-o", f"{folder}/out"])


def mergekit(program: str, models: list[Path], method: str, density: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        config = Path(folder) / "merge.yml"
        config.write_text(mergekit_config(models, method, density))
        return measure([program, str(config), f"{folder}/out"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"))
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        CONTENDERS[args.one](args.inputs, args.out)
        return
    WORK.mkdir(exist_ok=True)
    cases: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = []
    for count in (2, 8):
        adapters = make_adapters(count)
        cases.append((f"svd of {count}", ours("plait_svd", adapters), ours("peft_svd", adapters)))
    models = make_models(4)
    for method in ("linear", "ties"):
        own = plait_into(models, method, args.density)
        peer = mergekit(args.mergekit, models, method, args.density) if args.mergekit else None
        cases.append((f"{method} of 4 models", own, peer))
    with RESULTS.open("a") as out:
        for name, own, peer in cases:
            line = {"case": name, "machine": machine(), "plait": own, "peer": peer}
            out.write(json.dumps(line) + "\n")
            ratio = "" if peer is None else f"  ratio {own['cpu_s'] / peer['cpu_s']:.3f}"
            print(f"{name:18} plait {own['cpu_s']:6.2f} s {own['peak_mb']:6.0f} MB", end="")
            print(
                "" if peer is None else f"  peer {peer['cpu_s']:6.2f} s {peer['peak_mb']:6.0f} MB",
                ratio,
            )


if __name__ == "__main__":
    main()
