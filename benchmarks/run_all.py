"""Run every benchmark of Plait against its peers and print the figures.

    python benchmarks/run_all.py            # about half an hour on two cores
    python benchmarks/run_all.py --quick    # fewer rounds

Copy what it prints into benchmarks/RESULTS.md with the date and the machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STEP = ["training_step.py"]
SETTINGS = [
    [*STEP, "--model", "six-layer", "--rank", "8"],
    [*STEP, "--model", "six-layer", "--rank", "64"],
    [*STEP, "--model", "smollm2", "--rank", "8"],
    [*STEP, "--model", "smollm2", "--rank", "64"],
    [*STEP, "--model", "smollm2", "--rank", "8", "--dropout", "0.05"],
    [*STEP, "--model", "smollm2", "--rank", "8", "--dtype", "bfloat16"],
    [*STEP, "--model", "smollm2", "--rank", "8", "--memory"],
    ["lifecycle.py"],
    ["import_time.py"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for script, *flags in SETTINGS:
        rounds = []
        if script == "training_step.py" and "--memory" not in flags:
            full = "smollm2" in flags
            rounds = ["--rounds", "3" if quick else ("7" if full else "15")]
        command = [sys.executable, str(HERE / script), *flags, *rounds]
        print("$ python benchmarks/" + " ".join([script, *flags, *rounds]), flush=True)
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
