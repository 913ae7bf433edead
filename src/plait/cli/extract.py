"""`plait extract`: a full fine-tune as an adapter of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import examples, on_terminal
from plait.cli.convert import size_of


def extract(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A name from `plait bases`, or a folder.")
    ],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tuned model's folder.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Where to write the adapter.")],
    rank: Annotated[
        int | None, typer.Option(help="Components at every site; 16 without another cut.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="The fewest components with this share, as in 0.9.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Numbers in all, spent where they hold most.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Only sites that end so, as q_proj (repeat).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; else the fine-tune's.")
    ] = None,
    svd: Annotated[
        str, typer.Option(help="randomized, krylov (for flat spectra) or exact (slow).")
    ] = "randomized",
    to: Annotated[str, typer.Option(help="plait, or peft (without norms and biases).")] = "plait",
    name: Annotated[str | None, typer.Option(help="The adapter's name; else from --out.")] = None,
) -> None:
    """Extract a LoRA from a full fine-tune and its base, both as safetensors."""
    import plait
    from plait.cli.merge import name_from
    from plait.training.bases import base_fingerprint, get_base

    folder = get_base(base)
    adapter = plait.extract(
        folder,
        get_base(tuned),
        rank=rank,
        energy=energy,
        budget=budget,
        targets=target,
        rest="keep" if to == "plait" else "drop",
        svd=_choice(svd),
        dtype=read_dtype(dtype),
        name=name or name_from(out),
        progress=on_terminal(),
    )
    adapter.info["base"] = base
    if (Path(folder) / "config.json").is_file():
        adapter.info["base_fingerprint"] = base_fingerprint(folder)
    written = adapter.save(out, format=to)
    for line in _report(adapter.info["extract"]):
        print(line)
    print(f"wrote {written} ({to}, {size_of(Path(written))})")


def _report(facts: dict[str, Any]) -> list[str]:
    """How much of the change the adapter holds, and what it does not."""
    lines = [f"holds {facts['held']:.2%} of the change's squared norm"]
    errors = facts["errors"]
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        lines.append(
            f"{len(errors)} sites, relative error: mean {mean:.2g}, most {errors[worst]:.2g} "
            f"at {worst}"
        )
    if facts["kept_dense"]:
        lines.append(f"{len(facts['kept_dense'])} norms and biases kept as they are")
    if left := facts["left_out"]:
        most = max(left, key=left.__getitem__)
        lines.append(f"{len(left)} tensors left out, the greatest {most} (norm {left[most]:.2g})")
    return lines


def _choice(svd: str) -> Any:
    from plait.errors import unknown

    known = ("randomized", "krylov", "exact")
    if svd not in known:
        raise unknown("svd", svd, known)
    return svd


def read_dtype(name: str | None) -> Any:
    """The dtype of an option's value; None stays None."""
    import torch

    from plait.errors import unknown

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is not None and name not in known:
        raise unknown("dtype", name, known)
    return None if name is None else known[name]


def add(app: typer.Typer) -> None:
    app.command(
        short_help="A full fine-tune as an adapter.",
        epilog=examples(
            "plait extract smollm2-135m my-fine-tune --rank 16 -o out/extracted",
            "plait extract base tuned --energy 0.9 --dtype bfloat16 -o out/small",
            "plait extract base tuned --target q_proj --target v_proj --to peft -o out/qv",
        ),
    )(extract)
