"""Every claim that has no stored result yet, one after another; then the page.

python benchmarks/claims/run_all.py            # skips what is stored; kill it when you like
python benchmarks/claims/run_all.py --again    # runs all of them (stored trials are used)
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lab.store import RESULTS

HERE = Path(__file__).parent
NOT_CLAIMS = {"run_all", "page"}


def main() -> None:
    failed = []
    for script in sorted(HERE.glob("*.py")):
        if script.stem in NOT_CLAIMS:
            continue
        stored = RESULTS / f"{script.stem.replace('_', '-')}.json"
        if stored.is_file() and "--again" not in sys.argv:
            print(f"{script.stem}: stored")
            continue
        if subprocess.run([sys.executable, str(script)]).returncode:
            failed.append(script.stem)
    subprocess.run([sys.executable, str(HERE / "page.py")], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
