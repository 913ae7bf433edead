"""Sites: places in a base model where a change dW may act, and the base's protocol there.

A site answers for the base, whatever it is made of: `forward` (the base's own output), `weight`
(dense, dequantised, in canonical [out, in] orientation), `bias`, `bits`. Adapters ask the site and
never reach for `.weight`, so transposed, convolutional, quantised and packed bases all fit.

Canonical orientation, by kind:

    linear      y = W x + b             W [out, in]          nn.Linear, transformers Conv1D
    conv        y = conv(x, W) + b      W [out, in*k*k]      nn.Conv1d, nn.Conv2d
    embedding   y = W[:, token]         W [dim, vocabulary]  nn.Embedding
    parameter   a tensor used by name   W as it is stored    packed experts [E, ., .], biases
    module      a block's output        no weight            residual bottlenecks, routed blocks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError


@dataclass(eq=False)
class Site:
    """One place in the base model. `module` is None for an adapter that is not attached."""

    path: str
    shape: tuple[int, ...]
    module: nn.Module | None = field(default=None, repr=False)
    details: dict[str, Any] = field(default_factory=dict)

    kind = "abstract"

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def bits(self) -> float:
        """Bits the base spends on one weight."""
        weight = getattr(self.base, "weight", None)
        return 32.0 if weight is None else 8.0 * weight.element_size()

    @property
    def base(self) -> nn.Module:
        """The module in the model; an error when the adapter is not attached."""
        if self.module is None:
            raise PlaitError(
                f"site {self.path!r} is not attached to a model, and this needs the base weight; "
                "attach the adapter first (plait.load(model, ...))."
            )
        return self.module

    @property
    def device(self) -> torch.device:
        for tensor in self.base.parameters(recurse=False):
            return tensor.device
        for tensor in self.base.parameters():
            return tensor.device
        return torch.device("cpu")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own output, as if no adapter were there."""
        module = self.base
        return base_class(module).forward(module, *args, **kwargs)

    def weight(self) -> Tensor:
        """The base weight, dense, in canonical orientation (a view where possible)."""
        raise PlaitError(f"site {self.path!r} ({self.kind}) has no weight.")

    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    def replacement(self, weight: Tensor) -> Tensor:
        """A canonical weight in the layout that the module stores."""
        return weight

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x` through the linear map `weight` (canonical) in this site's way; no bias."""
        raise PlaitError(f"site {self.path!r} ({self.kind}) is not a linear map.")

    def apply_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """`x` through B A without forming the product."""
        return self.apply(x, B @ A)

    def bare(self) -> Site:
        """The same site without its module, as an unattached adapter holds it."""
        return type(self)(self.path, self.shape, None, dict(self.details))


class LinearSite(Site):
    kind = "linear"

    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def apply_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)


class TransposedLinearSite(LinearSite):
    """transformers' Conv1D: a linear layer that stores W as [in, out]."""

    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight).t()

    def replacement(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()


class ConvSite(Site):
    """nn.Conv1d and nn.Conv2d; the kernel is unrolled into the input axis."""

    kind = "conv"

    def _kernel(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], *self.details["kernel"])

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        module = cast(Any, self.base)
        run = F.conv2d if kernel.dim() == 4 else F.conv1d
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        return run(x, kernel, None, module.stride, padding, module.dilation, module.groups)

    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight).flatten(1)

    def replacement(self, weight: Tensor) -> Tensor:
        return self._kernel(weight).contiguous()

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(x, self._kernel(weight))

    def apply_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if cast(Any, self.base).groups != 1:
            return self.apply(x, B @ A)  # a group sees only its own input channels
        hidden = self._convolve(x, self._kernel(A))
        point = B.reshape(*B.shape, *([1] * (hidden.dim() - 2)))
        return (F.conv2d if hidden.dim() == 4 else F.conv1d)(hidden, point)


class EmbeddingSite(Site):
    kind = "embedding"

    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight).t()

    def bias(self) -> None:
        return None

    def replacement(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    def _scale(self) -> float | Tensor:
        # Gemma-style embeddings multiply their output by a constant.
        return getattr(self.base, "embed_scale", 1.0)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight.t()) * self._scale()

    def apply_low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.embedding(x, A.t()), B) * self._scale()


class ParameterSite(Site):
    """A tensor that its module uses by name: packed experts [E, ., .], biases, raw parameters.

    The adapted module answers `module.<name>` with base + change while its forward runs.
    """

    kind = "parameter"

    @property
    def parameter_name(self) -> str:
        return self.path.rpartition(".")[2]

    def weight(self) -> Tensor:
        return cast(Tensor, self.base._parameters[self.parameter_name])

    def bias(self) -> None:
        return None


class ModuleSite(Site):
    """A whole block: the change acts on its output (or replaces its forward)."""

    kind = "module"

    @property
    def out_features(self) -> int:
        return self.shape[-1]


SITE_TYPES: dict[str, type[Site]] = {
    "linear": LinearSite,
    "transposed-linear": TransposedLinearSite,
    "conv": ConvSite,
    "embedding": EmbeddingSite,
    "parameter": ParameterSite,
    "module": ModuleSite,
}


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before Plait gave it a subclass of it."""
    return getattr(module, "_plait_base_class", type(module))


def layout(site: Site) -> str:
    """The name under which a site's type is stored in files."""
    return next(name for name, cls in SITE_TYPES.items() if cls is type(site))


def make_site(path: str, module: nn.Module) -> Site | None:
    """The site of a weight-bearing module, or None when Plait knows no weight there."""
    cls = base_class(module)
    if isinstance(module, nn.Linear) or _looks_linear(module):
        shape = (int(cast(Any, module).out_features), int(cast(Any, module).in_features))
        return LinearSite(path, shape, module)
    if cls.__name__ == "Conv1D" and hasattr(module, "nf"):
        rows, columns = cast(Tensor, module.weight).shape
        return TransposedLinearSite(path, (columns, rows), module)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        kernel = tuple(module.weight.shape[1:])
        shape = (module.out_channels, int(torch.Size(kernel).numel()))
        return ConvSite(path, shape, module, {"kernel": kernel})
    if isinstance(module, nn.Embedding):
        return EmbeddingSite(path, (module.embedding_dim, module.num_embeddings), module)
    return None


def _looks_linear(module: nn.Module) -> bool:
    """Quantised linears are no nn.Linear but keep its two sizes and a forward of one tensor."""
    sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return sizes and not any(True for _ in module.children()) and _has_tensor(module)


def _has_tensor(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def make_parameter_site(path: str, module: nn.Module, name: str) -> ParameterSite:
    shape = tuple(cast(Tensor, module._parameters[name]).shape)
    return ParameterSite(path, shape, module)


def make_module_site(path: str, module: nn.Module, width: int) -> ModuleSite:
    return ModuleSite(path, (width,), module)


def rebuild_site(path: str, kind: str, shape: tuple[int, ...], details: dict[str, Any]) -> Site:
    """A bare site from what a file recorded."""
    return SITE_TYPES[kind](path, tuple(shape), None, dict(details))


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module was called on; some callers name it: linear(input=x)."""
    return args[0] if args else next(iter(kwargs.values()))
