"""Finding groups: in chains of layers, and in the blocks of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from plait.adapter.site import make_site
from plait.errors import PlaitError
from plait.merging.permutations.groups import Group, Slot

ENTRYWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten),
)
"""What treats every unit (or channel) by itself and has no weights for it."""

FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("lin1",), "lin2"),
)
"""(layers that write a block's hidden units, the one that reads them), by their names."""

ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"))


def find_groups(model: nn.Module, *, residual: bool = False) -> list[Group]:
    """The groups of a network: of a chain (nn.Sequential), or of each block of a transformer.

    In a transformer these are the hidden units of feed-forward layers and the heads of attention (a
    key-value head together with the query heads that read it). `residual` adds the width of the
    residual stream itself, which networks of one base share and others do not; it can be reordered
    but not widened. Raises PlaitError where nothing is found, or where a layer of a chain is not
    known: then give `chain_groups` the layers by name, or `Group`s of your own.
    """
    if isinstance(model, nn.Sequential):
        found = chain_groups(model)
    else:
        found = [g for path, module in model.named_modules() for g in _of_block(path, module)]
        if residual:
            found.append(_residual(model, found))
    if not found:
        raise PlaitError(
            f"{type(model).__name__}: no hidden units are known; name its layers in their order "
            "with chain_groups(model, [...]), or make Groups."
        )
    return found


def chain_groups(model: nn.Module, layers: Sequence[str] | None = None) -> list[Group]:
    """The groups between the layers of a chain, named after the layer that writes them.

    Args:
        layers: paths of the layers that have weights, in the order in which they run, where the
            model is no nn.Sequential. What runs between them must treat every unit alike.
    """
    if layers is None:
        chain = list(_leaves("", model))
    else:
        chain = [(path, model.get_submodule(path)) for path in layers]
    found: list[Group] = []
    current: _Open | None = None
    for path, module in chain:
        site = make_site(path, module)
        if site is not None and site.kind in ("linear", "conv"):
            if getattr(module, "groups", 1) != 1:
                raise PlaitError(f"{path!r} is a grouped convolution, which ties units' places.")
            if current is not None:
                found.append(current.closed(path, module))
            current = _Open(path, site.shape[0], _written(path, module))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.PReLU):
            if current is not None:
                current.passes(path, module)
        elif not isinstance(module, ENTRYWISE):
            raise PlaitError(
                f"{path!r} ({type(module).__name__}) is not known: whether it treats units alike "
                "cannot be told; make Groups yourself."
            )
    return found  # what the last layer writes are the outputs, whose order has a meaning


@dataclass
class _Open:
    """Units that have been written and not yet read."""

    name: str
    size: int
    slots: list[Slot] = field(default_factory=list)
    widens: bool = True

    def passes(self, path: str, module: Any) -> None:
        """A layer with weights for every unit."""
        names = ("weight", "bias", "running_mean", "running_var")
        for name in names:
            tensor = getattr(module, name, None)
            if tensor is not None and tensor.shape == (self.size,):
                self.slots.append(Slot(f"{path}.{name}", 0))
        if isinstance(module, nn.LayerNorm):
            if tuple(module.normalized_shape) != (self.size,):
                raise PlaitError(f"{path!r} normalises over more than its {self.size} units.")
            self.widens = False

    def closed(self, path: str, module: Any) -> Group:
        inside = _axes(module)[1]
        span, rest = divmod(module.weight.shape[inside], self.size)
        if rest:
            raise PlaitError(f"{path!r} does not read the {self.size} units of {self.name!r}.")
        slots = (*self.slots, Slot(f"{path}.weight", inside, reads=True, span=span))
        return Group(self.name, self.size, slots, self.widens)


def _leaves(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _leaves(f"{path}.{name}" if path else name, child)


def _axes(module: nn.Module) -> tuple[int, int]:
    """The axes of a weight for outputs and inputs; transformers' Conv1D stores them turned."""
    return (1, 0) if hasattr(module, "nf") else (0, 1)


def _written(path: str, module: Any, span: int = 1) -> list[Slot]:
    slots = [Slot(f"{path}.weight", _axes(module)[0], span=span)]
    if getattr(module, "bias", None) is not None:
        slots.append(Slot(f"{path}.bias", 0, span=span))
    return slots


def _of_block(path: str, module: nn.Module) -> Iterator[Group]:
    children = dict(module.named_children())
    for writers, reader in FEED_FORWARD:
        if all(_is_linear(children.get(name)) for name in (*writers, reader)):
            last: Any = children[reader]
            size = last.weight.shape[_axes(last)[1]]
            slots = [s for name in writers for s in _written(f"{path}.{name}", children[name])]
            slots.append(Slot(f"{path}.{reader}.weight", _axes(last)[1], reads=True))
            yield Group(path, size, tuple(slots))
            break
    for names in ATTENTION:
        head = getattr(module, "head_dim", None)
        if head and all(_is_linear(children.get(name)) for name in names):
            q, k, v, o = (f"{path}.{name}" for name in names)
            layers: list[Any] = [children[name] for name in names]
            heads = layers[1].weight.shape[0] // head
            wide = layers[0].weight.shape[0] // heads
            slots = _written(q, layers[0], wide)
            slots += [*_written(k, layers[1], head), *_written(v, layers[2], head)]
            slots.append(Slot(f"{o}.weight", 1, reads=True, span=wide))
            yield Group(path, heads, tuple(slots))


def _is_linear(module: Any) -> bool:
    """A layer whose weight is there as numbers (a quantised one cannot be reordered)."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _residual(model: Any, inner: Sequence[Group]) -> Group:
    """All axes of the residual stream's width that no other group holds."""
    taken = {(slot.tensor, slot.axis) for group in inner for slot in group.slots}
    width = model.get_input_embeddings().weight.shape[1]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    fixed = {id(model.get_input_embeddings().weight)} | ({id(head.weight)} if head else set())
    slots = []
    for name, tensor in model.named_parameters():
        for axis, length in enumerate(tensor.shape):
            if length != width or (name, axis) in taken or (axis == 0 and id(tensor) in fixed):
                continue
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            reads = tensor.dim() == 2 and _is_linear(owner) and axis == _axes(owner)[1]
            slots.append(Slot(name, axis, reads=reads and not isinstance(owner, nn.Embedding)))
    return Group("residual", width, tuple(slots), widens=False)
