"""Plait's models in EleutherAI's lm-evaluation-harness: its tasks run as they are.

    lm = harness_model(model, tokenizer, "sql")
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"], limit=100)

A model with adapters stays the transformers model that it was, so the harness's own class for those
does the work; ours only sees to it that the right adapters are active while it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from plait.adapter import activate
from plait.adapter.state import find_state
from plait.errors import PlaitError, unknown
from plait.evaluation.driver import BASE


def harness_model(
    model: Any,
    tokenizer: Any,
    adapter: str | Mapping[str, float] | None = None,
    *,
    batch_size: int | str = 16,
    **options: Any,
) -> Any:
    """A `lm_eval.api.model.LM` that answers with one adapter, or a mix of them.

    Args:
        adapter: a name, {name: weight}, "base" for the model alone; None is what is active when the
            harness asks.
        batch_size: rows at once, or "auto".
        **options: of `lm_eval.models.huggingface.HFLM` (max_length, add_bos_token, ...).

    Raises PlaitError without lm-eval, and for an adapter that the model does not carry.
    """
    state = find_state(model)
    known = [] if state is None else list(state.adapters)
    weights: dict[str, float] | None = None
    if adapter is not None:
        weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
        weights = {} if weights == {BASE: 1.0} and BASE not in known else weights
        for name in weights:
            if name not in known:
                raise unknown("adapter", name, [*known, BASE])
    options.setdefault("device", str(model.device))
    lm = _class()(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
    lm.plait_weights = weights
    return lm


@cache
def _class() -> Any:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as e:
        raise PlaitError(
            f"the harness needs lm-eval; run `pip install 'plait[lm-eval]'` ({e})."
        ) from None

    class PlaitLM(HFLM):
        """The harness's transformers model, with Plait's adapters switched on while it is asked."""

        plait_weights: dict[str, float] | None = None

        def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
            with _active(self.model, self.plait_weights):
                return super().loglikelihood(*args, **kwargs)

        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
            with _active(self.model, self.plait_weights):
                return super().loglikelihood_rolling(*args, **kwargs)

        def generate_until(self, *args: Any, **kwargs: Any) -> Any:
            with _active(self.model, self.plait_weights):
                return super().generate_until(*args, **kwargs)

    return PlaitLM


@contextlib.contextmanager
def _active(model: Any, weights: Mapping[str, float] | None) -> Iterator[None]:
    state = find_state(model)
    if weights is None or state is None:
        yield
        return
    before = dict(state.active)
    activate(model, weights)
    try:
        yield
    finally:
        activate(model, before)
