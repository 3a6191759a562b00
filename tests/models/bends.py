"""Specs with one thing wrong, to see that logits notice: how each field of a spec can be bent.

A bend keeps every shape, so that the same weights fill the bent decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from pagedserve.spec import (
    Attn,
    DecoderSpec,
    Layer,
    Mla,
    Mlp,
    Moe,
    Norm,
    Positions,
    QueryScale,
    Rope,
)

SAME = object()  # what a bend returns where it has nothing to bend
Path = tuple[str, ...]
Change = Callable[[Any], Any]

# Not of the kind that only scales: a norm behind would take that out again.
BARE = Norm("layer", bare=True)
GROWTH = QueryScale("log_steps", 8, 0.7)


def times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def toggled(value: bool) -> bool:
    return not value


def removed(value: Any) -> Any:
    """None for what is there."""
    return SAME if value is None else None


def removed_or(instead: Any) -> Callable[[Any], Any]:
    """None for what is there, `instead` for what is not."""
    return lambda value: instead if value is None else None


def by(field: str, change: Callable[[Any], Any]) -> Change:
    """Of a node by its value alone."""
    return lambda node: change(getattr(node, field))


def other_packing(attn: Attn) -> Any:
    """One group is stored as no groups are."""
    if attn.kv_heads == 1 and attn.packed in ("qkv", "groups"):
        return SAME
    return {"qkv": "groups", "groups": "qkv", "heads": "qkv", "slices": "heads"}.get(
        attn.packed, SAME
    )


def other_groups(moe: Moe) -> Any:
    """All experts at once, or half of them."""
    if moe.groups[0] > 1:
        return (1, 1)
    half = moe.experts // 2
    fits = moe.experts % 2 == 0 and moe.top_k <= half and half > 1
    return (2, 1) if fits and chosen_by_score(moe) else SAME


def chosen_by_score(moe: Moe) -> bool:
    """Whether groups, correction and renormalisation take part."""
    return moe.score in ("softmax", "sigmoid")


def other_score(moe: Moe) -> str:
    return "softmax" if moe.score in ("sigmoid", "sparsemixer") else "sigmoid"


def other_order(layer: Layer) -> Any:
    if layer.attn is None or layer.ffn is None:
        return SAME
    return "parallel" if layer.order == "sequential" else "sequential"


def other_rotation(attn: Attn) -> Any:
    return Rope(10000.0, attn.head_dim) if attn.rope is None else None


def other_names(spec: DecoderSpec) -> Any:
    """The norms before change places, or gate and up; else the norm before is not computed."""
    gated = all(isinstance(layer.ffn, Mlp) and layer.ffn.gated for layer in spec.layers)
    pairs = [("pre_attn", "pre_ffn")] * (not spec.norm.bare) + [("gate", "up")] * gated
    for a, b in pairs:
        if a in spec.names and b in spec.names:
            return {**spec.names, a: spec.names[b], b: spec.names[a]}
    return {role: name for role, name in spec.names.items() if role != "pre_attn"}


def with_skip(spec: DecoderSpec) -> Any:
    """The last layer gets half of what the first one got; or no layer has such a thing."""
    if any(layer.skip for layer in spec.layers):
        return tuple(dataclasses.replace(layer, skip=None) for layer in spec.layers)
    *first, last = spec.layers
    return (*first, dataclasses.replace(last, skip=(0, 0.5)))


BENDS: list[tuple[type, str, Change]] = [
    (Attn, "scale", by("scale", times(1.5))),
    (Attn, "rope", other_rotation),
    (Attn, "window", by("window", lambda n: 3 if n is None else n + 1)),
    (Attn, "chunk", by("chunk", lambda n: 5 if n is None else n + 1)),
    (Attn, "softcap", by("softcap", lambda cap: 0.02 if cap is None else cap / 25)),
    (Attn, "alibi", by("alibi", lambda span: 8.0 if span is None else span / 2)),
    (Attn, "alibi_factor", lambda a: SAME if a.alibi is None else 3 * a.alibi_factor),
    (Attn, "sinks", lambda a: False if a.sinks else SAME),
    (Attn, "qk_norm", by("qk_norm", removed_or(BARE))),
    (Attn, "norm_after_rope", lambda a: not a.norm_after_rope if a.qk_norm and a.rope else SAME),
    (Attn, "query_scale", by("query_scale", removed_or(GROWTH))),
    (Attn, "out_norm", by("out_norm", removed_or(BARE))),
    (Attn, "clip", by("clip", lambda limit: 0.2 if limit is None else limit / 10)),
    (Attn, "packed", other_packing),
    (Mla, "scale", by("scale", times(1.5))),
    (Mla, "query_scale", by("query_scale", removed_or(GROWTH))),
    (Rope, "theta", by("theta", times(3))),
    (Rope, "dim", lambda rope: SAME if "long_factor" in rope.scaling else rope.dim // 4 * 2),
    (Rope, "scaling", lambda rope: {} if rope.scaling else {"rope_type": "linear", "factor": 2.0}),
    (Rope, "interleaved", by("interleaved", toggled)),
    (Rope, "backwards", by("backwards", toggled)),
    (QueryScale, "kind", lambda s: "log_n" if s.kind == "log_steps" else SAME),
    (QueryScale, "length", lambda s: s.length // 2),
    (QueryScale, "beta", lambda s: SAME if s.kind == "log_n" else 3 * s.beta),
    (QueryScale, "shift", lambda s: SAME if s.kind == "log_n" else s.shift + 1),
    (Mlp, "act", lambda mlp: "silu" if mlp.act == "relu" else "relu"),
    (Mlp, "inner_norm", by("inner_norm", removed_or(BARE))),
    (Moe, "top_k", lambda moe: moe.top_k - 1 if moe.top_k > 1 else 2),
    (Moe, "score", other_score),
    (Moe, "renorm", lambda moe: not moe.renorm if chosen_by_score(moe) else SAME),
    (Moe, "renorm_eps", lambda moe: 0.5 if moe.renorm and chosen_by_score(moe) else SAME),
    (Moe, "groups", other_groups),
    (Moe, "group_score", lambda m: SAME if m.groups[0] == 1 else OTHER_GROUP_SCORE[m.group_score]),
    (Moe, "scale", lambda moe: SAME if moe.score == "sparsemixer" else moe.scale * 1.5),
    (Moe, "on_input", by("on_input", toggled)),
    (Moe, "bias", lambda moe: False if moe.bias else SAME),
    (Moe, "jitter", lambda moe: moe.jitter * 30 if moe.score == "sparsemixer" else SAME),
    (Moe, "act", lambda moe: "silu" if moe.act == "clamped_silu" else "relu"),
    (Moe, "limit", lambda moe: 0.02 if moe.act == "clamped_silu" else SAME),
    (Moe, "shared", by("shared", removed)),
    (Moe, "shared_gate", lambda moe: False if moe.shared_gate else SAME),
    (Moe, "stored", lambda moe: OTHER_COLUMNS.get(moe.stored, SAME)),
    (Norm, "kind", lambda norm: "layer" if norm.kind == "rms" else "rms"),
    (Norm, "eps", lambda norm: norm.eps + 0.1),
    (Norm, "offset", lambda norm: SAME if norm.bare else norm.offset + 0.5),
    (Norm, "bare", lambda norm: SAME if norm.bare else True),
    (Layer, "attn", by("attn", removed)),
    (Layer, "ffn", by("ffn", removed)),
    (Layer, "order", other_order),
    (Positions, "kind", lambda p: "sines" if p.kind == "learned" else SAME),
    (Positions, "offset", lambda p: p.offset - 1 if p.offset else 1),
    (DecoderSpec, "layers", lambda spec: spec.layers[:-1]),
    (DecoderSpec, "layers", with_skip),
    (DecoderSpec, "names", other_names),
    (DecoderSpec, "positions", by("positions", removed)),
    (DecoderSpec, "embed_scale", by("embed_scale", times(1.5))),
    (DecoderSpec, "residual_scale", by("residual_scale", times(0.5))),
    (DecoderSpec, "logit_scale", by("logit_scale", times(1.5))),
    (DecoderSpec, "logit_softcap", by("logit_softcap", lambda c: 1.0 if c is None else c / 10)),
    (DecoderSpec, "unit_head", by("unit_head", removed_or("rows"))),
]
OTHER_GROUP_SCORE = {"best": "best two", "best two": "best"}
OTHER_COLUMNS = {"columns": "column pairs", "column pairs": "columns"}

OF_A_SHAPE = "the weights would have another shape"
NOT_BENT: dict[tuple[type, str], str] = {
    **{(Attn, field): OF_A_SHAPE for field in ("heads", "kv_heads", "head_dim", "qk_norm_over")},
    (Attn, "values_in_keys"): "only latent attention makes it, for the cache",
    **{
        (Mla, field): OF_A_SHAPE
        for field in ("heads", "nope_dim", "value_dim", "latent_dim", "q_rank")
    },
    (Mla, "rope"): "there is none without; its own fields are bent",
    (Mla, "norm"): "there is none without; its own fields are bent",
    **{(Mlp, field): OF_A_SHAPE for field in ("size", "gated", "packed")},
    **{(Moe, field): OF_A_SHAPE for field in ("experts", "size")},
    (Layer, "skip"): "bent with DecoderSpec.layers, for it names another layer",
    (Positions, "rows"): OF_A_SHAPE,
    **{
        (DecoderSpec, field): OF_A_SHAPE
        for field in ("hidden_size", "vocab_size", "embed_size", "transposed")
    },
    (DecoderSpec, "max_positions"): "a limit, which the context of a case overrules",
    (DecoderSpec, "stretched_positions"): "the same",
    (DecoderSpec, "norm"): "its own fields are bent",
    **{
        (DecoderSpec, field): "which tensors there are, not what is computed"
        for field in ("prefix", "renames", "ignored", "biases", "tied_head")
    },
}
KINDS = (Attn, Mla, Rope, QueryScale, Mlp, Moe, Norm, Layer, Positions, DecoderSpec)


def bends(spec: DecoderSpec) -> Iterator[tuple[str, tuple[type, str], DecoderSpec]]:
    """All of `spec`: (where, what, the bent spec), each in every layer that it applies to."""
    for path, kind in dict.fromkeys(places(spec, ())):
        for of, field, change in BENDS:
            if of is not kind or (kind is Rope and field == "dim" and within_latent(spec)):
                continue
            bent = changed(spec, path, kind, field, change)
            if bent != spec:
                where = ".".join((*path, field))
                yield (
                    f"{where} of {kind.__name__}" + ("'" if change is with_skip else ""),
                    (kind, field),
                    bent,
                )


def within_latent(spec: DecoderSpec) -> bool:
    """There the rotated share is of a shape."""
    return any(isinstance(layer.attn, Mla) for layer in spec.layers)


def places(node: Any, path: Path) -> Iterator[tuple[Path, type]]:
    """Every part of a spec: the fields that lead there, and what it is."""
    yield path, type(node)
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        for part in value if field.name == "layers" else (value,):
            if isinstance(part, KINDS):
                yield from places(part, (*path, field.name))


def changed(node: Any, path: Path, kind: type, field: str, change: Change) -> Any:
    """`node` with `field` of all of `kind` at `path` changed."""
    if not path:
        new = change(node) if type(node) is kind else SAME
        return node if new is SAME else dataclasses.replace(node, **{field: new})
    first, rest = path[0], path[1:]
    value = getattr(node, first, None)
    if isinstance(value, tuple):
        value = tuple(changed(part, rest, kind, field, change) for part in value)
    elif isinstance(value, KINDS):
        value = changed(value, rest, kind, field, change)
    else:
        return node
    return dataclasses.replace(node, **{first: value})
