"""The adapter's branch, in the type of its input: peft's own makes seven full-size copies a projection.

peft keeps all that is not arithmetic: the modules, their weights in fp32, saving, loading, switching off.
"""

import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from stages.lib.model.casting import cast
from stages.lib.model.dropout import CountedDropout
from stages.lib.model.low_rank import Down

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order of their use


def layers(tuned: Any) -> list[Any]:
    """The model's adapted projections, in order."""
    return [module for module in tuned.modules() if isinstance(module, LoraLayer)]


def name_of(part: str) -> str:
    """The base's name of a projection, from that of its adapter or of a tensor there."""
    return part.removeprefix("base_model.model.").partition(".lora_")[0]


def named(tuned: Any) -> dict[str, Any]:
    """The model's adapted projections that have two factors, by the base's names, in order."""
    found = tuned.named_modules()
    return {name_of(n): m for n, m in found if isinstance(m, LoraLayer) and m.lora_A}


def simple(tuned: Any) -> bool:
    """Whether every branch is B A x and nothing beyond it; DoRA, a bias or an adapted embedding is more."""
    return all(
        layer.lora_A and not layer.lora_variant and not any(layer.lora_bias.values())
        for layer in layers(tuned)
    )


def lighten(tuned: Any, seed: torch.Tensor) -> None:
    """Give every adapted projection the arithmetic of this module; `seed`, int32 scalar, is its dropout's."""
    for place, layer in enumerate(layers(tuned)):
        for name, dropout in layer.lora_dropout.items():
            layer.lora_dropout[name] = CountedDropout(getattr(dropout, "p", 0.0), seed, place)
        layer.forward = types.MethodType(_forward, layer)


def groups(children: Iterable[str]) -> list[tuple[str, ...]]:
    """A module's children by their names, those that read one input together."""
    names = set(children)
    whole = [group for group in TOGETHER if names.issuperset(group)]
    return whole + [(name,) for name in children if not any(name in group for group in whole)]


class Adapter(NamedTuple):
    """What is at work on a projection.

    Attributes:
        down: first factor, fp32 [rank, in]. up: second factor, fp32 [out, rank].
        seeds: of its dropout, int32 [1]. p: of dropout, now. scale: alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    seeds: torch.Tensor
    p: float
    scale: float


def at_work(layer: Any) -> list[Adapter]:
    """The adapters that a projection has, and that are not switched off; none for a plain one."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return []
    found = []
    for name in layer.active_adapters:
        drop = layer.lora_dropout[name]
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        p = drop.p if drop.active else 0.0
        found.append(Adapter(down, up, drop.seeds(), p, layer.scaling[name]))
    return found


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """W x + alpha/r * B A dropout(x), as in Hu et al. 2021; x [..., in]."""
    y: torch.Tensor = layer.base_layer(x)
    flat = cast(x.reshape(-1, x.shape[-1]))[0]
    for one in at_work(layer):
        lows = Down.apply(flat, one.down, one.seeds, one.p, one.scale)
        y = y + F.linear(lows, one.up.to(lows.dtype)).view(y.shape)
    return y
