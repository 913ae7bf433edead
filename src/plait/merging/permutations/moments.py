"""What two networks' layers read on the same batches: their joint second moments.

    z = [x_1 | x_2 | 1]      M = mean of z z^T  [2 d + 1, 2 d + 1]

One pass over both gives everything that matching by activations and the least-squares fit ask for:
a layer is linear, so what it puts out is known from what it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import first_input
from plait.adapter.site import LinearSite, make_site
from plait.errors import PlaitError
from plait.statistics.frozen import frozen, to_device
from plait.statistics.progress import track

Batches = Iterable[Mapping[str, Any]]


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that `joint_moments` can watch."""
    sites = ((path, make_site(path, module)) for path, module in model.named_modules() if path)
    return [path for path, site in sites if isinstance(site, LinearSite)]


def joint_moments(
    one: nn.Module, two: nn.Module, batches: Batches, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """{layer: M [2 d + 1, 2 d + 1]}, float64 on the CPU, of both networks on the same batches.

    Args:
        batches: dicts for `model(**batch)`; padding (`attention_mask` 0) does not count, and
            neither do labels.
        layers: paths of linear layers that both have; None takes all of them.

    Memory: 32 d^2 bytes a layer of d inputs. Raises PlaitError where nothing was seen.
    """
    paths = linear_layers(one) if layers is None else list(layers)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with torch.no_grad(), ExitStack() as stack:
        devices = [stack.enter_context(frozen(model)) for model in (one, two)]
        seen: list[dict[str, Tensor]] = [{}, {}]
        for model, found in zip((one, two), seen, strict=True):
            for path in paths:
                hook = _keep(found, path)
                module = model.get_submodule(path)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for batch in track(batches, "activations"):
            for model, device, found in zip((one, two), devices, seen, strict=True):
                found.clear()
                here = to_device(batch, device)
                model(**{k: v for k, v in here.items() if k != "labels"})
            for path in paths:
                if path in seen[0] and path in seen[1]:
                    z = _joined(seen[0][path], seen[1][path], batch.get("attention_mask"))
                    sums[path] = sums.get(path, 0) + z.mT @ z
                    counts[path] = counts.get(path, 0) + len(z)
    if not any(counts.values()):
        raise PlaitError("joint_moments: no layer read anything; give at least one batch.")
    return {path: total / max(1, counts[path]) for path, total in sums.items()}


def _keep(found: dict[str, Tensor], path: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found[path] = first_input(args, kwargs).detach()

    return hook


def _joined(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """z [tokens, 2 d + 1] in float64."""
    sides = [t.to("cpu", torch.float64) for t in (x, y)]
    if mask is not None and mask.shape == x.shape[:-1]:
        sides = [t[mask.bool().cpu()] for t in sides]
    flat = [t.reshape(-1, t.shape[-1]) for t in sides]
    return torch.cat([*flat, torch.ones(len(flat[0]), 1, dtype=torch.float64)], 1)
