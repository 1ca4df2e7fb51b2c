"""The adapter's branch, in the type of its input: peft's own makes seven full-size copies a projection.

peft keeps all that is not arithmetic: the modules, their weights in fp32, saving, loading, switching off.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from stages.lib.model.dropout import CountedDropout


def layers(tuned: Any) -> list[Any]:
    """The model's adapted projections, in order."""
    return [module for module in tuned.modules() if isinstance(module, LoraLayer)]


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


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """W x + alpha/r * B A dropout(x), as in Hu et al. 2021; x [..., in]."""
    y: torch.Tensor = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return y
    for name in layer.active_adapters:
        a, b = (m[name].weight.to(x.dtype) for m in (layer.lora_A, layer.lora_B))
        low = F.linear(layer.lora_dropout[name](x), a) * layer.scaling[name]
        y = y + F.linear(low, b)
    return y
