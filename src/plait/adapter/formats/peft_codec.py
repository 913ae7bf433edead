"""`pair_codec`: PEFT's LoRA form of a delta that is a pair A, B and perhaps some vectors.

    linear       lora_A.weight [r, in], lora_B.weight [out, r], lora_B.bias [out] (not yet scaled)
    convolution  lora_A.weight [r, in, k, k], lora_B.weight [out, r, 1, 1]
    embedding    lora_embedding_A [r, vocabulary], lora_embedding_B [dim, r]
    experts      lora_A.weight [E r, in], lora_B.weight [out, r E], the experts flattened in

The scale is in the configuration only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from plait.adapter.build import site_matches
from plait.adapter.delta import Delta
from plait.adapter.formats.peft_starts import hold_back_start
from plait.adapter.method import PeftCodec, PeftSite
from plait.adapter.pair import PairDelta
from plait.adapter.site import (
    ConvSite,
    EmbeddingSite,
    LinearSite,
    ParameterSite,
    Site,
    TransposedLinearSite,
)
from plait.errors import FormatError, PlaitError

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
SHIFT = "lora_B.bias"

NOT_OURS: dict[str, Any] = {
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
}
"""Keys of LoraConfig that change the mathematics, and the values that leave it alone."""


def pair_codec(
    *,
    marks: Mapping[str, bool],
    vectors: Mapping[str, str] | None = None,
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {},
) -> PeftCodec:
    """The codec of a pair method.

    Args:
        marks: switches of LoraConfig that tell this method from its kin ({"use_dora": True}).
        vectors: our names of its vectors [out], and PEFT's ({"m": "lora_magnitude_vector"}).
        more: options beside those of every pair method, from the configuration.
    """
    names = dict(vectors or {})

    def read(delta: Delta, found: PeftSite) -> None:
        _read_pair(cast(PairDelta, delta), found)
        for own, theirs in names.items():
            _put(delta, own, found.tensors[theirs].flatten())

    def write(delta: Delta) -> dict[str, Tensor]:
        tensors = _write_pair(cast(PairDelta, delta))
        for own, theirs in names.items():
            value: Tensor = delta.get_parameter(own)
            if delta.site.kind == "conv":
                value = value.reshape(1, -1, *[1] * (len(delta.site.details["kernel"]) - 1))
            tensors[theirs] = value
        return tensors

    return PeftCodec(
        type="LORA",
        keys={n: n for n in (*LINEAR, *EMBEDDING, SHIFT)} | names,
        options=lambda found: _options(found) | more(found.config),
        config=lambda deltas: _config(deltas) | dict(marks),
        site=_bare_site,
        read=read,
        write=write,
        accepts=lambda config: all(bool(config.get(k)) == v for k, v in marks.items()),
        required=NOT_OURS,
    )


# -- configuration ------------------------------------------------------------------------------


def one_value(deltas: Mapping[str, Delta], option: str) -> Any:
    """An option that all deltas share, for methods of which PEFT knows no patterns."""
    values = {getattr(d.options, option) for d in deltas.values()}
    if len(values) > 1:
        raise PlaitError(f"PEFT has one {option} for all sites of this method, not {len(values)}.")
    return values.pop()


def any_transposed(deltas: Mapping[str, Delta]) -> bool:
    """PEFT's fan_in_fan_out."""
    return any(isinstance(d.site, TransposedLinearSite) for d in deltas.values())


def pattern_values(found: PeftSite, key: str, default: Any) -> list[Any]:
    """What `rank_pattern` or `alpha_pattern` says for this site; the first match counts."""
    patterns = found.config.get(key) or {}
    return [*(v for p, v in patterns.items() if site_matches(p, found.path)), default]


def _options(found: PeftSite) -> dict[str, Any]:
    config = found.config
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if found.path:
        ranks = pattern_values(found, "rank_pattern", rank)
        # PEFT sorts the patterns when it saves them, which may put another match first: then the
        # tensor itself tells which one was meant.
        stored = found.tensors[LINEAR[0]].shape[0] if LINEAR[0] in found.tensors else 0
        rank = stored if stored in ranks else ranks[0]
        alpha = pattern_values(found, "alpha_pattern", alpha)[0]
    return {
        "rank": int(rank),
        "alpha": float(alpha),
        "rslora": bool(config.get("use_rslora", False)),
        "dropout": float(config.get("lora_dropout") or 0.0),
    }


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    pairs = {p: cast(PairDelta, d) for p, d in deltas.items()}
    rslora = all(d.options.rslora for d in pairs.values())
    ranks = {p: _rank(d) for p, d in pairs.items()}
    alphas = {p: _alpha(d, ranks[p], rslora) for p, d in pairs.items()}
    (rank, alpha), _ = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0]
    # The same keys in both patterns, longest first: older PEFT looks both up under one key.
    others = sorted(p for p in pairs if (ranks[p], alphas[p]) != (rank, alpha))
    others.sort(key=len, reverse=True)
    packed = any(d.site.kind == "parameter" for d in pairs.values())
    shifted = any(d.bias() is not None for d in pairs.values())
    if shifted and (packed or any(d.site.kind == "embedding" for d in pairs.values())):
        raise PlaitError("PEFT has no lora_bias beside embeddings or packed experts.")
    config: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "bias": "none"}
    config["fan_in_fan_out"] = any_transposed(deltas)
    dropout = max(d.options.dropout for d in pairs.values())
    if dropout and not packed:  # PEFT refuses dropout on packed experts
        config["lora_dropout"] = dropout
    if others:
        config["rank_pattern"] = {p: ranks[p] for p in others}
        config["alpha_pattern"] = {p: alphas[p] for p in others}
    return config | ({"lora_bias": True} if shifted else {})


def _rank(delta: PairDelta) -> int:
    held = delta._buffers.get("held_A")
    return delta.rank + (0 if held is None else held.shape[0])


def _alpha(delta: PairDelta, rank: int, rslora: bool) -> float | int:
    alpha = delta.scaling * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


# -- reading ------------------------------------------------------------------------------------


def _bare_site(found: PeftSite) -> Site | None:
    if EMBEDDING[0] in found.tensors:
        A, B = (found.tensors[n] for n in EMBEDDING)
        return EmbeddingSite(found.path, (B.shape[0], A.shape[1]))
    if LINEAR[0] not in found.tensors or LINEAR[1] not in found.tensors:
        return None
    A, B = (found.tensors[n] for n in LINEAR)
    if A.dim() > 2:
        kernel = tuple(A.shape[1:])
        return ConvSite(found.path, (B.shape[0], math.prod(kernel)), None, {"kernel": kernel})
    return LinearSite(found.path, (B.shape[0], A.shape[1]))


def _read_pair(delta: PairDelta, found: PeftSite) -> None:
    names = EMBEDDING if delta.site.kind == "embedding" else LINEAR
    if missing := [n for n in names if n not in found.tensors]:
        raise FormatError(f"{found.path!r} has no {missing[0]}.")
    A, B = (found.tensors[n] for n in names)
    if isinstance(delta.site, ParameterSite):
        A, B = _unflatten_experts(delta, A, B)
    else:
        A, B = A.flatten(1), B.flatten(1)
    _put(delta, "A", A)
    _put(delta, "B", B)
    if SHIFT in found.tensors:
        if "c" not in delta._parameters:
            raise FormatError(f"{found.path!r} has a bias, which {type(delta).__name__} lacks.")
        _put(delta, "c", found.tensors[SHIFT] * delta.scaling)
    hold_back_start(delta, str(found.config.get("init_lora_weights", True)).lower())


def _put(delta: Delta, name: str, value: Tensor) -> None:
    own = delta.get_parameter(name)
    if own.shape != value.shape:
        raise FormatError(
            f"{delta.site.path!r}: {name} has shape {list(value.shape)} in the file, but the "
            f"configuration and the site ask for {list(own.shape)}."
        )
    own.data = value.detach().to(own.device).clone(memory_format=torch.contiguous_format)


def _unflatten_experts(delta: PairDelta, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if len(delta.site.shape) == 2:
        return A, B
    experts, r = delta.site.shape[0], delta.options.rank
    if A.shape[0] != experts * r or B.shape[1] != experts * r:
        raise FormatError(f"{delta.site.path!r} does not hold {experts} pairs of rank {r}.")
    A = A.reshape(experts, r, -1)  # [E, r, in]
    B = B.reshape(B.shape[0], r, experts).permute(2, 0, 1)  # [E, out, r]
    if _stored_transposed(delta):
        return B.mT, A.mT  # W is stored as [E, in, out]
    return A, B


def _stored_transposed(delta: Delta) -> bool:
    return bool(getattr(delta.site.base, "is_transposed", False))


# -- writing ------------------------------------------------------------------------------------


def _write_pair(delta: PairDelta) -> dict[str, Tensor]:
    A, B = delta.A, delta.B
    if "held_A" in delta._buffers:
        A = torch.cat([A, delta.get_buffer("held_A")], dim=-2)
        B = torch.cat([B, -delta.get_buffer("held_B")], dim=-1)
    if delta.site.kind == "embedding":
        return dict(zip(EMBEDDING, (A, B), strict=True))
    if delta.site.kind == "parameter":
        A, B = _flatten_experts(delta, A, B)
    elif delta.site.kind == "conv":
        kernel = delta.site.details["kernel"]
        A = A.reshape(A.shape[0], *kernel)
        B = B.reshape(*B.shape, *[1] * (len(kernel) - 1))
    tensors = dict(zip(LINEAR, (A, B), strict=True))
    bias = delta.bias()
    if bias is not None:
        tensors[SHIFT] = bias / delta.scaling
    return tensors


def _flatten_experts(delta: PairDelta, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if len(delta.site.shape) == 2:
        return A, B
    if _stored_transposed(delta):
        A, B = B.mT, A.mT
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
