"""Write the quickstart's tasks as train.jsonl and test.jsonl.

python examples/make_data.py home_en data/home_en
"""

import sys

from plait.quickstart.tasks import TASKS

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TASKS:
        sys.exit(f"usage: make_data.py {{{'|'.join(TASKS)}}} FOLDER")
    for path in TASKS[sys.argv[1]].make(sys.argv[2]):
        print(path)
