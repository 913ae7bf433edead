"""The mean full gradient of frozen weights, one site at a time.

    site i:   x_i ──► W_i ──► y_i        dL/dW_i = sum over tokens of g_i x_i^T,  g_i = dL/dy_i

No module's weight ever requires a gradient: a hook on each site's output catches g_i on the way
back and forms the product with the input there, so at any moment one full gradient exists on the
model's device, and no optimiser state at all. Means are kept on the CPU in float32. Only packed
parameters, which their module uses as it likes, take autograd's own gradient, moved off and freed
as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from plait.adapter.site import LinearSite, Site, first_input
from plait.errors import PlaitError
from plait.statistics.frozen import Active, frozen, shifts_labels, to_device
from plait.statistics.progress import track

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Sums = dict[str, Tensor]


def gradient_pass(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any]],
    loss: Loss | None = None,
    *,
    active: Active = (),
) -> Sums:
    """{path: mean gradient of W [out, in], canonical, float32 on the CPU}.

    Args:
        sites: of `model`, with a weight of their own.
        batches: dicts for `model(**batch)`, consumed once.
        loss: `loss(model, batch) -> scalar`; None takes `model(**batch).loss`.
        active: adapters to run with, as `plait.activate` takes them; () is the base model.

    Batches are weighted so that the result does not depend on how the data is cut up: with `labels`
    and the model's own loss (a mean over labels) by their number of labels other than -100, with a
    loss of one's own, or without labels, equally. A site that no loss depends on (an expert that
    no token chose) has gradient 0.

    Raises PlaitError for a site without a weight of its own, or no batch with a label.
    """
    for site in sites:
        if site.kind == "module":
            raise PlaitError(f"gradient_pass: {site.path!r} is a whole module without a weight.")
    sums: Sums = {s.path: torch.zeros(s.shape, dtype=torch.float32) for s in sites}
    total = 0.0
    with frozen(model, active) as device, torch.enable_grad():
        recorder = _Recorder(sites, sums)
        try:
            for raw in track(batches, "gradients"):
                batch = to_device(raw, device)
                recorder.weight = 1.0 if loss is not None else _labels(model, batch)
                if recorder.weight == 0:
                    continue
                value = loss(model, batch) if loss is not None else _own_loss(model, batch)
                value.backward()
                total += recorder.weight
        finally:
            recorder.close()
    if total == 0:
        raise PlaitError("gradient_pass: no batch with a label; give at least one.")
    return {path: value.div_(total) for path, value in sums.items()}


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise PlaitError(
            f"gradient_pass: {type(model).__name__} returned no loss; put `labels` into the "
            "batches or pass loss=."
        )
    return value


def _labels(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """How many labels the model's mean loss averages over (1 where that cannot be told)."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return 1.0
    if labels.dim() > 1 and shifts_labels(model):
        labels = labels[:, 1:]
    return float((labels != -100).sum())


class _Recorder:
    """Hooks on the sites' modules that add weight x gradient to `sums`."""

    def __init__(self, sites: Sequence[Site], sums: Sums) -> None:
        self.sums, self.weight = sums, 1.0
        self.handles: list[Any] = []
        self.packed: list[tuple[nn.Parameter, Tensor | None]] = []
        for site in sites:
            if site.kind == "parameter":
                self._watch(site)
            else:
                hook = self._hook(site)
                self.handles.append(site.base.register_forward_hook(hook, with_kwargs=True))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        for parameter, gradient in self.packed:
            parameter.requires_grad_(False)
            parameter.grad = gradient

    def _watch(self, site: Site) -> None:
        parameter = cast(nn.Parameter, site.weight())
        self.packed.append((parameter, parameter.grad))
        parameter.grad = None
        parameter.requires_grad_(True)

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.to("cpu", torch.float32)
            self.sums[site.path].add_(gradient, alpha=self.weight)
            parameter.grad = None

        self.handles.append(parameter.register_post_accumulate_grad_hook(take))

    def _hook(self, site: Site) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # the dry pass of reentrant checkpointing
                return output
            x = first_input(args, kwargs).detach()
            version = x._version
            if not output.requires_grad:
                # Nothing below trains, so the graph starts here. A copy, since the model may write
                # into its activations, which a leaf does not allow.
                output = output.detach().requires_grad_().clone()

            def record(g: Tensor) -> None:
                if x._version != version:
                    raise PlaitError(
                        f"the input of {site.path!r} is overwritten in place after it was read, so "
                        "its weight gradient cannot be formed; make that operation out of place."
                    )
                self._add(site, x, g)

            output.register_hook(record)
            return output

        return hook

    def _add(self, site: Site, x: Tensor, g: Tensor) -> None:
        gradient = weight_gradient(site, x, g)
        self.sums[site.path].add_(gradient.to("cpu", torch.float32), alpha=self.weight)


def weight_gradient(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW [out, in] of one call, from the site's input and its output's gradient."""
    if isinstance(site, LinearSite):
        flat = g.reshape(-1, g.shape[-1])
        return flat.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype)
    with torch.enable_grad():
        W = site.weight().detach().requires_grad_()
        return torch.autograd.grad(site.apply(x, W), W, g)[0]
