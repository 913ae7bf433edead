"""`train`: one recipe from start to saved adapter, resumable by the same command.

    load base ──► dry run ──► data ──► attach (or the newest checkpoint's adapter) ──► Trainer
              ──► adapter/ + exports ──► parity check ──► Result

A run that was killed (at any moment) continues when the same recipe is trained again: the data
order, the optimiser, the rules and the random generators go on from the newest complete checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from plait.adapter import Adapter, attach
from plait.adapter.method import Initializer
from plait.adapter.registry import get_method
from plait.errors import PlaitError, unknown
from plait.training import checkpoint
from plait.training.dryrun import attach_arguments, dry_run, make_rules
from plait.training.parity import Parity, check_parity
from plait.training.recipe import Recipe
from plait.training.report import LOG, Result, cut_log, final_loss, plot_losses

TASK_TYPES = {"causal-lm": "CAUSAL_LM"}  # the names that PEFT and others read
RECIPE, DATA = "recipe.yaml", "data.json"
FREE_KEYS = frozenset(
    {"output", "save_every", "keep_checkpoints", "eval_every", "log_every", "export", "parity"}
    | {"show_examples", "steps", "epochs", "eval_data", "gradient_checkpointing"}
)
"""Recipe keys that may change between the start of a run and its continuation."""

Resume = Literal["auto", False]


@dataclass
class Prepared:
    """What a run needs, before its Trainer exists."""

    model: Any
    tokenizer: Any
    rows: Sequence[Any]
    evaluation: Sequence[Any] | None
    collator: Any
    base: str | None = None
    """What the model was loaded as; None for one that was passed in."""
    adapter: Adapter | None = None
    resume_from: Path | None = None


def train(
    recipe: Recipe,
    *,
    resume: Resume = "auto",
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    quiet: bool = False,
) -> Result:
    """Train a recipe and save the adapter under `recipe.output`/adapter.

    Args:
        resume: "auto" continues from the newest complete checkpoint in `recipe.output`; False
            starts anew and removes what an earlier run left there.
        model, tokenizer: a loaded base instead of `recipe.base`. The model keeps the adapter.
        data, eval_data: rows instead of the recipe's files (anything `read_examples` takes).
        quiet: show nothing (log.jsonl is written all the same).

    Raises PlaitError for what the dry run refuses, for a recipe that differs from the one the
    output folder was started with, and when the loss is no longer a number.
    """
    console = _console(quiet)
    output = Path(recipe.output)
    base = recipe.base if model is None else None
    if model is None:
        from plait.training.bases import load_base

        model, tokenizer = load_base(recipe.base, recipe.dtype)
    elif tokenizer is None:
        raise PlaitError("train: a model was given without its tokenizer; pass tokenizer= too.")
    found = dry_run(model, recipe)
    console.print(str(found), highlight=False)
    if found.refusals:
        raise PlaitError(found.refusals[0])
    start = _resume_point(recipe, output, resume)
    prepared = _prepare(recipe, model, tokenizer, data, eval_data, console)
    prepared.base, prepared.resume_from = base, start
    _claim_output(recipe, output, prepared)
    _attach(recipe, prepared)
    return _run(recipe, prepared, console, quiet)


def _console(quiet: bool) -> Any:
    from rich.console import Console

    main = int(os.environ.get("RANK", "0")) == 0
    return Console(quiet=quiet or not main, highlight=False, soft_wrap=True)


# -- where to start -------------------------------------------------------------------------------


def _resume_point(recipe: Recipe, output: Path, resume: Resume) -> Path | None:
    """The checkpoint to go on from, after making sure that it is of this very run."""
    if resume not in ("auto", False):
        raise PlaitError(f"train: resume is {resume!r}; use 'auto' or False.")
    existing = checkpoint.checkpoints(output)
    if resume is False:
        if _is_main():
            for old in existing:
                shutil.rmtree(old)
            (output / LOG).unlink(missing_ok=True)
            (output / RECIPE).unlink(missing_ok=True)
        return None
    if (output / RECIPE).is_file() and existing:
        _check_same(Recipe.load(output / RECIPE), recipe, output)
    return existing[-1] if existing else None


def _check_same(old: Recipe, new: Recipe, output: Path) -> None:
    for key in Recipe.__dataclass_fields__:
        was, now = getattr(old, key), getattr(new, key)
        if key not in FREE_KEYS and was != now:
            raise PlaitError(
                f"{output} holds a run with another {key} ({was!r}, now {now!r}); give another "
                "output, or resume=False to start anew."
            )


def _claim_output(recipe: Recipe, output: Path, prepared: Prepared) -> None:
    """Write down the recipe and the data's size, which a continuation must share."""
    facts = {"rows": len(prepared.rows), "tokens": sum(len(r) for r in prepared.rows)}
    file = output / DATA
    if prepared.resume_from is not None and file.is_file():
        was = json.loads(file.read_text(encoding="utf-8"))
        if was != facts:
            raise PlaitError(
                f"{output} holds a run on other data ({was['rows']} rows, now {facts['rows']}; "
                f"{was['tokens']} tokens, now {facts['tokens']}); give another output, or "
                "resume=False to start anew."
            )
    if _is_main():
        output.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(output)
        (output / RECIPE).write_text(recipe.dump(), encoding="utf-8")
        file.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        done = 0 if prepared.resume_from is None else checkpoint.step_of(prepared.resume_from)
        cut_log(output / LOG, done)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


# -- data and adapter -----------------------------------------------------------------------------


def _prepare(
    recipe: Recipe, model: Any, tokenizer: Any, data: Any, eval_data: Any, console: Any
) -> Prepared:
    from plait.training.data import Collator, show_examples

    rows, encoded = _rows(recipe, tokenizer, data if data is not None else recipe.data, "data")
    evaluation = None
    held_out = eval_data if eval_data is not None else recipe.eval_data
    if held_out is not None:
        evaluation, _ = _rows(recipe, tokenizer, held_out, "eval_data")
    if recipe.show_examples:
        show_examples(encoded, tokenizer, recipe.show_examples, console)
    console.print(f"{len(rows)} rows, {sum(len(r) for r in rows):,} tokens")
    collator = Collator(
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        max_length=recipe.max_length,
        attention=getattr(getattr(model, "config", None), "_attn_implementation", None) or "sdpa",
        dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()),
    )
    return Prepared(model, tokenizer, rows, evaluation, collator)


def _rows(recipe: Recipe, tokenizer: Any, source: Any, key: str) -> tuple[list[Any], list[Any]]:
    """Rows of the batches, and the encoded examples that they are made of."""
    from plait.training.data import encode_all, pack, read_examples

    if source is None:
        raise PlaitError(f"recipe: {key} is missing; name a JSON-lines file.")
    examples = read_examples(source)
    encoded = encode_all(examples, tokenizer, recipe.max_length, recipe.template, recipe.turns)
    rows = pack(encoded.items, recipe.max_length) if recipe.packing else encoded.items
    return list(rows), encoded.items


def _attach(recipe: Recipe, prepared: Prepared) -> None:
    if recipe.method == "none":
        return
    if prepared.resume_from is not None:
        from plait.adapter.formats import load

        folder = prepared.resume_from / checkpoint.ADAPTER
        prepared.adapter = load(prepared.model, folder, recipe.name, trainable=True)
        return
    start = make_initializer(recipe.initializer)
    prepared.adapter = attach(
        prepared.model,
        recipe.method,
        initializer=start,
        data=_first_batches(recipe, prepared, start),
        **attach_arguments(recipe),
    )


def make_initializer(spec: str | dict[str, dict[str, Any]] | None) -> Initializer | None:
    """An initialiser from its name or `{name: {option: value}}`."""
    if spec is None:
        return None
    if isinstance(spec, str):
        spec = {spec: {}}
    if len(spec) != 1:
        raise PlaitError(f"an initializer is a name or one {{name: options}} pair, not {spec!r}.")
    ((name, options),) = spec.items()
    method = get_method(name)
    if method.initializer is None:
        raise PlaitError(f"method {method.name!r} is no initialiser (axis: {method.axis}).")
    known = getattr(method.initializer, "__dataclass_fields__", {})
    for option in options or {}:
        if option not in known:
            raise unknown("option", option, known, where=f"initializer {method.name!r}")
    return method.initializer(**(options or {}))


def _first_batches(recipe: Recipe, prepared: Prepared, start: Initializer | None) -> Any:
    """Training batches for an initialiser that looks at data; None where none does."""
    from plait.training.data import length_grouped_order

    own = get_method(recipe.method).initializer
    if not (start or (own and own()) or Initializer()).needs:
        return None
    rows, size = prepared.rows, recipe.batch_size
    order = length_grouped_order([len(r) for r in rows], size, recipe.seed, 0)
    device = next(prepared.model.parameters()).device
    groups = [order[s : s + size] for s in range(0, len(order), size)][: recipe.initializer_batches]
    batches = (prepared.collator([rows[i] for i in group]) for group in groups)
    return [{k: v.to(device) for k, v in batch.items()} for batch in batches]


# -- the run --------------------------------------------------------------------------------------


def _run(recipe: Recipe, prepared: Prepared, console: Any, quiet: bool) -> Result:
    from plait.training.callbacks import Monitor, TrialSave
    from plait.training.loop import PlaitTrainer

    started, output = time.perf_counter(), Path(recipe.output)
    total = recipe.total_steps(len(prepared.rows), int(os.environ.get("WORLD_SIZE", "1")))
    if recipe.gradient_checkpointing:
        _checkpoint_activations(prepared.model)
    monitor, trial = Monitor(output, console, not quiet), TrialSave(output)
    trainer = PlaitTrainer(
        prepared.model,
        recipe,
        total,
        prepared.adapter,
        make_rules(recipe),
        prepared.rows,
        prepared.evaluation,
        prepared.collator,
        [monitor, trial],
    )
    monitor.trainer = trial.trainer = trainer
    start = prepared.resume_from
    try:
        if start is not None and checkpoint.step_of(start) >= total:
            console.print(f"all {total} steps are done; nothing is left to train")
            trainer.take_up(start)
        else:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        monitor.close()
    return _finish(recipe, prepared, trainer, monitor, console, time.perf_counter() - started)


def _checkpoint_activations(model: Any) -> None:
    """Non-reentrant: a frozen first block does not cut the later ones off from their gradients."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise PlaitError(
            f"{type(model).__name__} has no gradient checkpointing; leave gradient_checkpointing "
            "out."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})


def _finish(
    recipe: Recipe, prepared: Prepared, trainer: Any, monitor: Any, console: Any, seconds: float
) -> Result:
    output, adapter = Path(recipe.output), prepared.adapter
    steps = int(trainer.state.global_step)
    at_end = [r["eval_loss"] for r in monitor.history if "eval_loss" in r and r["step"] == steps]
    if prepared.evaluation is not None and not at_end:
        at_end = [trainer.evaluate()["eval_loss"]]
    result = Result(
        model=prepared.model,
        adapter=adapter,
        output=output,
        steps=steps,
        loss=final_loss(monitor.history),
        eval_loss=at_end[-1] if at_end else None,
        seconds=seconds,
        tokens=int(trainer.tokens),
        history=monitor.history,
    )
    prepared.model.eval()
    if _is_main():
        _save(recipe, prepared, result)
        plot_losses(result.history, output / "loss.png")
        if recipe.parity and adapter is not None:
            result.parity = _parity(prepared, adapter, output, result)
            console.print(str(result.parity), highlight=False)
        console.print(f"saved in {output} after {seconds:.0f} s, loss {result.loss:.4f}")
    return result


def _save(recipe: Recipe, prepared: Prepared, result: Result) -> None:
    output, adapter = result.output, prepared.adapter
    if adapter is None:
        prepared.model.save_pretrained(output / "model")
        prepared.tokenizer.save_pretrained(output / "model")
        return
    if prepared.base is not None:
        adapter.info["base"] = prepared.base
    adapter.info |= {
        "base_fingerprint": _fingerprint(prepared.model),
        "task_type": TASK_TYPES[recipe.task_type],
        "training": {"steps": result.steps, "loss": result.loss, "eval_loss": result.eval_loss},
    }
    adapter.save(output / "adapter")
    for form in recipe.export:
        try:
            adapter.save(output / form, form)
            result.exports[form] = str(output / form)
        except PlaitError as e:
            result.exports[form] = f"not written: {e}"
            warnings.warn(f"export to {form}: {e}", stacklevel=2)


def _fingerprint(model: nn.Module) -> str | None:
    from plait.training.fingerprint import fingerprint

    try:
        return fingerprint(model)
    except (ValueError, AttributeError):
        return None  # a model without the usual weights has no fingerprint


def _parity(prepared: Prepared, adapter: Adapter, output: Path, result: Result) -> Parity:
    rows = list(prepared.evaluation or prepared.rows)[:4]
    batches = [prepared.collator([row]) for row in rows]
    written = {f: Path(p) for f, p in result.exports.items() if not p.startswith("not written")}
    folders = {"plait": output / "adapter", **written}
    return check_parity(prepared.model, adapter, batches, folders)
