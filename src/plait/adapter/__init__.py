"""The core: sites, deltas, adapters, and attaching them to a model.

Read in this order: `site` (where), `delta` and `pair` (what), `adapted` and `plans` (how a module
applies it), `adapter` and `attaching` (the life of a named adapter), `method` and `registry` (how a
method is published).
"""

from plait.adapter.activation import activate
from plait.adapter.adapter import Adapter, DeltaMap
from plait.adapter.attaching import adapters, attach, bind, detach, install
from plait.adapter.build import build_adapter, make_options
from plait.adapter.context import Context
from plait.adapter.convert import low_rank_of, to_lora
from plait.adapter.delta import Build, Delta, Options, Traits, add_change
from plait.adapter.fusing import fuse, unfuse
from plait.adapter.method import Initializer, Method, PeftCodec, PeftSite, per_site
from plait.adapter.pair import Pair, PairDelta, PairOptions
from plait.adapter.registry import get_initializer, get_method, register
from plait.adapter.registry import names as method_names
from plait.adapter.resize import replace_parameter
from plait.adapter.routing_context import auxiliary_loss, routing
from plait.adapter.rows import per_row
from plait.adapter.rule import Rule, RuleStack, Run, make_group, make_rule, split_group
from plait.adapter.shared import SharedTensors
from plait.adapter.site import Site, first_input
from plait.adapter.targets import block_index, find_blocks, find_sites, is_gated_ffn

__all__ = [
    "Adapter",
    "Build",
    "Context",
    "Delta",
    "DeltaMap",
    "Initializer",
    "Method",
    "Options",
    "Pair",
    "PairDelta",
    "PairOptions",
    "PeftCodec",
    "PeftSite",
    "Rule",
    "RuleStack",
    "Run",
    "SharedTensors",
    "Site",
    "Traits",
    "activate",
    "adapters",
    "add_change",
    "attach",
    "auxiliary_loss",
    "bind",
    "block_index",
    "build_adapter",
    "detach",
    "find_blocks",
    "find_sites",
    "first_input",
    "fuse",
    "get_initializer",
    "get_method",
    "install",
    "is_gated_ffn",
    "low_rank_of",
    "make_group",
    "make_options",
    "make_rule",
    "method_names",
    "per_row",
    "per_site",
    "register",
    "replace_parameter",
    "routing",
    "split_group",
    "to_lora",
    "unfuse",
]
