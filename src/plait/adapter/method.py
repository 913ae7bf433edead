"""The records that a method, an initialiser, a rule or a router publishes: one `METHOD` a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from plait.adapter.delta import Delta, Options, Traits
from plait.adapter.site import Site
from plait.adapter.targets import Targets

AXES = ("parameterisation", "initialisation", "rule", "routing")

Count = Callable[[Sequence[Site], Any], int]
Choose = Callable[[nn.Module, Any], list[tuple[Site, type[Delta]]]]


@dataclass
class PeftSite:
    """What a PEFT folder says about one site (`path` "" stands for the adapter as a whole)."""

    path: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """By their names in the file after the site's path: {"lora_A.weight": ...}."""
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the file holds once for all sites."""


@dataclass(frozen=True)
class PeftCodec:
    """How a method stands in a PEFT folder; `plait.adapter.formats` drives it.

    A method whose tensors have PEFT's shapes needs `type`, `keys`, `options` and `config`;
    `read` and `write` take over where shapes differ.
    """

    type: str
    """PEFT's peft_type."""
    keys: Mapping[str, str]
    """Our tensor names to PEFT's: {"D": "miss_block"}."""
    options: Callable[[PeftSite], dict[str, Any]]
    """Our options at a site, from PEFT's configuration."""
    config: Callable[[Mapping[str, Delta]], dict[str, Any]]
    """PEFT's configuration for these deltas, but for what all types have; PlaitError where the
    deltas have no form in PEFT."""
    site: Callable[[PeftSite], Site | None] = lambda found: None
    """The site as far as its tensors tell; None where only the model can say."""
    read: Callable[[Delta, PeftSite], None] | None = None
    write: Callable[[Delta], dict[str, torch.Tensor]] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    """Our shared tensors to PEFT's full names: {"A": "base_model.vera_A"}."""
    accepts: Callable[[dict[str, Any]], bool] = lambda config: True
    """Whether a configuration of this type is this method's."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Keys that change the mathematics in a way this method lacks, with the value that does not."""
    settings: Collection[str] = ()
    """Keys of this type alone that `options` reads, or that matter at the start only."""


@dataclass(frozen=True)
class Method:
    """One entry of the registry: a published system, or a preset combining several pieces."""

    name: str
    title: str
    paper: str
    axis: str
    options: type[Options] = Options
    delta: type[Delta] | None = None
    count: Count | None = None
    """Trainable parameters over all sites, by formula."""
    initializer: type[Initializer] | None = None
    rule: type[Any] | None = None
    targets: Targets = "all-linear"
    choose: Choose | None = None
    """Which delta goes to which site, for methods that mix several (else `delta` everywhere)."""
    peft: PeftCodec | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    """Options that suit tiny layers (12 to 16 features a side), for the test kit and the docs.

    Without it the kit asks for `rank=2` where the options have a rank, and defaults elsewhere.
    """
    rule_example: Mapping[str, Any] = field(default_factory=dict)
    """Options of the rule at which a run of six steps shows what it does, for the test kit."""
    example_context: Mapping[str, Any] = field(default_factory=dict)
    """What `plait.routing` must be given before a forward of this method (`{"task": 1}`)."""

    def __deepcopy__(self, memo: Any) -> Method:
        return self  # a record never changes, and one that is not registered has no name to find

    def __reduce__(self) -> Any:
        return _by_name, (self.name,)  # records hold functions: pickle the name instead

    @property
    def kinds(self) -> frozenset[str]:
        return self.delta.kinds if self.delta is not None else frozenset()

    @property
    def traits(self) -> Traits:
        return self.delta.traits if self.delta is not None else Traits()

    @property
    def reference(self) -> str:
        """One line for tables."""
        return f"{self.title}. {self.paper}"


def _by_name(name: str) -> Method:
    from plait.adapter.registry import get_method

    return get_method(name)


def per_site(formula: Callable[[Site, Any], int]) -> Count:
    """A parameter count that is a sum over sites."""
    return lambda sites, options: sum(formula(site, options) for site in sites)


class Initializer:
    """Where a delta starts. Subclasses are dataclasses whose fields are the options.

    `needs` names the statistics that `collect` must provide (of {"gradient", "input_covariance",
    "inputs"}); an empty set means that the base weight is enough.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        """One streaming pass over `data` for what `needs` names; {path: statistics}.

        `rank` is the options' (0 where they have none).
        """
        return {}

    def ranks(self, sites: Sequence[Site], statistics: dict[str, Any], rank: int) -> dict[str, int]:
        """Ranks that differ from the options' (0 leaves a site out)."""
        return {}

    def start(self, delta: Delta, statistics: Any) -> None:
        """Write the start of one delta, after its own `reset`."""
        raise NotImplementedError
