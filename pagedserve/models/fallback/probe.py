"""What a transformers class would compute, found out by running it once while recording.

First without weights, on the meta device, where tensors have shapes and no numbers: so a model that
cannot be served is refused before a byte of its weights is read. Then once more with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pagedserve.models.fallback.attention import NotExpressible, NumbersNeeded, Recorder
from pagedserve.spec import Attn

TOKENS = 5  # of the probe: prime, so that it cannot be taken for another size


@dataclass(frozen=True, slots=True)
class Traced:
    """What a forward does.

    layers, modules: of the attention calls, in their order. kind: what the body returns.
    hidden_size, vocab_size: of hidden states and logits.
    """

    layers: tuple[Attn, ...]
    modules: tuple[nn.Module, ...]
    kind: type
    hidden_size: int
    vocab_size: int


def trace_shapes(model: Any, num_layers: int) -> Traced | None:
    """`trace` of a model on meta; None where only numbers can tell. Raises NotExpressible."""
    try:
        with OnMeta():  # type: ignore[no-untyped-call]
            return trace(model, num_layers)
    except NotExpressible:
        raise
    # Whatever a model's own code, or torch, has to say to tensors that hold no numbers: `trace`
    # with weights will tell whether it is the model's fault.
    except Exception:
        return None


def trace(model: Any, num_layers: int) -> Traced:
    """Run `model`, whose attention function is PROBE, over a few tokens. Raises NotExpressible.

    The mask of ones says that they are one sequence: transformers would look for several in the
    positions.
    """
    kept: list[Any] = []
    recorder = Recorder()
    ids = torch.arange(TOKENS, device=model.device)[None]
    hook = body(model).register_forward_hook(lambda *call: kept.append(call[-1]))
    try:
        with torch.no_grad():  # not inference mode, in which `OnMeta` would see compound ops whole
            out = model(
                input_ids=ids,
                position_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                paged=recorder,
            )
    finally:
        hook.remove()
    if len(kept) != 1 or not isinstance(getattr(kept[0], "last_hidden_state", None), Tensor):
        raise NotExpressible("its forward is not one body with one head behind it")
    check_layers(model, recorder, num_layers)
    hidden, logits = kept[0].last_hidden_state, out.logits
    if hidden.shape[:2] != ids.shape or logits.shape[:2] != ids.shape:
        raise NotExpressible(f"hidden states {tuple(hidden.shape)}, logits {tuple(logits.shape)}")
    return Traced(
        tuple(recorder.layers),
        tuple(recorder.modules),
        type(kept[0]),
        hidden.shape[-1],
        logits.shape[-1],
    )


def check_layers(model: nn.Module, recorder: Recorder, num_layers: int) -> None:
    """Raise NotExpressible unless every layer called our attention once."""
    calls = len(recorder.layers)
    if calls < num_layers:
        raise NotExpressible(
            f"only {calls} of its {num_layers} layers call the attention function"
            + other_layers(model, recorder, num_layers)
        )
    if calls > num_layers:
        raise NotExpressible(
            f"it calls the attention function {calls} times for {num_layers} layers"
        )
    if len({id(module) for module in recorder.modules}) != calls:
        raise NotExpressible("it goes through a layer more than once")


def other_layers(model: nn.Module, recorder: Recorder, num_layers: int) -> str:
    """What the layers that called no attention have instead of it, for a message."""
    called = set(map(id, recorder.modules))
    calling: set[type] = set()
    silent: set[type] = set()
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
            for layer in layers:
                calls = any(id(module) in called for module in layer.modules())
                (calling if calls else silent).update(map(type, layer.modules()))
    own = {kind.__name__ for kind in silent - calling if kind.__module__.startswith("transformers")}
    return f"; there is {', '.join(sorted(own)[:3])}" if own else ""


def body(model: Any) -> Any:
    """The model without its head. Raises NotExpressible."""
    if model.base_model is not model:
        return model.base_model
    found = [module for module in model.children() if isinstance(module, PreTrainedModel)]
    if len(found) != 1:
        raise NotExpressible("its head cannot be told from its body")
    return found[0]


class OnMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what only numbers could: how many are not zero (one), and which number it is (one).

    Which branch a model takes by them, and which experts, changes no attention call.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, first = func.overloadpacket.__name__, args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if name in ("_local_scalar_dense", "item"):
                return torch.ones((), dtype=first.dtype, device="cpu").item()
            if name == "nonzero":
                return first.new_zeros((1, first.dim()), dtype=torch.int64)
            if name == "_grouped_mm":
                return first.new_zeros((first.shape[0], args[1].shape[-1]))
            if name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu"):
                raise NumbersNeeded(name)
        return func(*args, **(kwargs or {}))
