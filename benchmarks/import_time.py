"""CPU seconds of `import plait`, `import peft` and torch alone, each in fresh processes, in turn.

python benchmarks/import_time.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from report import machine

STATEMENTS = {
    "python": "pass",
    "plait": "import plait",
    "plait with its core": "import plait; plait.attach",
    "torch": "import torch",
    "peft": "import peft",
}


def cpu_seconds(statement: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(args.repeats):
        for name, statement in STATEMENTS.items():
            seconds[name].append(cpu_seconds(statement))
    medians = {name: round(statistics.median(v), 3) for name, v in seconds.items()}
    print(json.dumps({**machine(), **medians}))


if __name__ == "__main__":
    main()
