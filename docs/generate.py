"""Write the pages that follow from the code: docs/methods.md and docs/commands/*.md.

python docs/generate.py            # write them
python docs/generate.py --check    # say which are out of date (exit code 1)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DOCS = Path(__file__).parent
BASE = "smollm2-135m"


def methods_page() -> str:
    """The table of methods, by axis, from each method's own record."""
    from plait.cli.methods_table import merge_rows, rows, search_rows

    lines = [
        "# Methods",
        "",
        "Made by `python docs/generate.py` from the code; `plait methods NAME` shows one in full.",
    ]
    table = rows()
    for axis in dict.fromkeys(row["axis"] for row in table):
        lines += [
            "",
            f"## {axis.capitalize()}",
            "",
            "| name | what | paper |",
            "| --- | --- | --- |",
        ]
        here = (row for row in table if row["axis"] == axis)
        lines += [f"| `{r['name']}` | {r['title']} | {r['paper']} |" for r in here]
    lines += rules_together()
    lines += ["", "## Merging", "", "| name | what | paper |", "| --- | --- | --- |"]
    lines += [f"| `{r['name']}` | {r['title']} | {r['paper']} |" for r in merge_rows()]
    lines += [
        "",
        "## Merging, with coefficients searched with data",
        "",
        "`plait search`, or `plait.search` in Python.",
        "",
        "| name | wants | what | paper |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{r['name']}` | {r['searches with']} | {r['title']} | {r['paper']} |"
        for r in search_rows()
    ]
    return "\n".join(lines) + "\n"


def rules_together() -> list[str]:
    """What each rule trains and claims, from its declarations."""
    from plait.adapter import get_method, method_names
    from plait.adapter.together import CLAIMS, claims_of

    lines = [
        "",
        "## Which rules stand together",
        "",
        "Any list of rules runs in which no claim stands twice, and no rule that keeps states of",
        "the parameters' shapes beside one that changes ranks. What a claim means: "
        + "; ".join(f"*{claim}*: {what}" for claim, what in CLAIMS.items())
        + ".",
        "",
        "| rule | trains | claims | keeps shapes | micro-batches give the batch's step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in method_names():
        method = get_method(name)
        if method.rule is None:
            continue
        rule = method.rule()
        own = f"method `{name}`" if method.delta is not None else "any adapter"
        pairs = "any (A, B) pairs" if rule.needs_pairs else own
        trains = pairs if rule.needs_adapter else "the base (`method: none`)"
        claims = ", ".join(sorted(claims_of(rule)))
        keeps, splits = ("yes" if flag else "" for flag in (rule.keeps_shapes, rule.splits_batches))
        lines.append(f"| `{name}` | {trains} | {claims} | {keeps} | {splits or 'no'} |")
    return lines


def command_pages() -> dict[str, str]:
    """{command: its page}: the help text as the terminal shows it."""
    import typer

    from plait.cli.main import app

    group = typer.main.get_command(app)
    pages = {}
    context = group.make_context("plait", [], resilient_parsing=True)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        inner.terminal_width = inner.max_content_width = 100
        text = "\n".join(line.rstrip() for line in command.get_help(inner).splitlines())
        pages[name] = f"# plait {name}\n\n```\n{text}\n```\n"
    return pages


def pages() -> dict[Path, str]:
    found = {DOCS / "methods.md": methods_page()}
    found |= {DOCS / "commands" / f"{name}.md": text for name, text in command_pages().items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [f for f, text in pages().items() if not f.is_file() or f.read_text() != text]
    for file in stale:
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(pages()[file])
        print(("out of date: " if check else "wrote ") + str(file.relative_to(DOCS.parent)))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
