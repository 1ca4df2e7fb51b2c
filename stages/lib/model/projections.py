"""Projections of one input, computed together by whichever is asked first.

q, k and v read the same input, gate and up do: together the input is quantised and read once, the product is
large, and the input's gradient is one sum. The modules stay where they are, so that peft and transformers see
what they know.
"""

import types
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.lib.model import fp8, fused, lora
from stages.lib.model.casting import cast

SILU = {"SiLU", "SiLUActivation"}  # by name: transformers has had both
# Whose q and k are rotated as they are, all of their width; it is a power of two, as the kernels want it.
ROTATED = {"LlamaAttention", "MistralAttention"}


class Together(nn.Module):
    """FP8 projections with one input, their weights one under the other, laid out for both directions.

    Args:
        members: in the order in which the model asks for them.
    """

    def __init__(self, members: list[fp8.Fp8Linear]) -> None:
        super().__init__()
        self.sizes = tuple(member.out_features for member in members)
        weight = torch.cat([member.weight for member in members])
        scales = torch.cat([member.scales for member in members])
        for name, tensor in fp8.Weight.of(weight, scales)._asdict().items():
            self.register_buffer(name, tensor)
        self.pending: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        for place, member in enumerate(members):
            part = weight.split(self.sizes)[place]
            member.weight = nn.Parameter(part, requires_grad=False)
            member.scales = scales.split(self.sizes)[place]
            member.together, member.place = self, place
            member.forward = types.MethodType(_forward, member)  # type: ignore[method-assign]

    @property
    def weight(self) -> fp8.Weight:
        """Of all members."""
        return fp8.Weight(self.rows, self.scales, self.columns, self.column_scales)

    def product(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """A member's output [..., out] for x [..., in]; the others' wait until they are asked for the same."""
        if self.pending is None or self.pending[0] is not x:
            flat = cast(x.reshape(-1, x.shape[-1]))[0]
            found = fp8.Product.apply(flat, *self.weight, self.sizes)
            outputs = tuple(y.view(*x.shape[:-1], -1) for y in found)
            self.pending = (x, outputs)
        outputs = self.pending[1]
        if place == len(self.sizes) - 1:
            self.pending = None
        return outputs[place]


def _forward(member: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = member.together.product(x, member.place)
    return y if member.bias is None else y + member.bias


def gather(model: Any) -> None:
    """Let the FP8 projections of a model that read one input be computed together; the others alone."""
    for parent in list(model.modules()):
        children = {name: _base(module) for name, module in parent.named_children()}
        found = {n: m for n, m in children.items() if isinstance(m, fp8.Fp8Linear)}
        for names in lora.groups(found):
            if names != ("base_layer",):
                Together([found[name] for name in names])


def _base(module: nn.Module) -> nn.Module:
    """A projection without its adapter."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def fuse(model: Any) -> None:
    """Compute attention's projections, MLPs and lone adapted projections as one function each, where known."""
    for module in model.modules():
        children = dict(module.named_children())
        rotated = type(module).__name__ in ROTATED and module.head_dim.bit_count() == 1
        if rotated and _plain(children, "q_proj", "k_proj", "v_proj"):
            module.forward = types.MethodType(_attention, module)
        if (
            _plain(children, "gate_proj", "up_proj")
            and _plain(children, "down_proj")
            and type(getattr(module, "act_fn", None)).__name__ in SILU
        ):
            module.forward = types.MethodType(_mlp, module)
        for name in children.keys() - {"base_layer"}:
            layer = children[name]
            adapted = isinstance(layer, LoraLayer) and _plain(children, name)
            if adapted and len(layer.base_layer.together.sizes) == 1:
                layer.forward = types.MethodType(_projection, layer)


def _plain(children: dict[str, nn.Module], *names: str) -> bool:
    """Whether children are FP8 projections without a bias, with one adapter at most, of one rank and scale."""
    found = [children.get(name) for name in names]
    bases = [_base(one) if one else None for one in found]
    if not all(isinstance(base, fp8.Fp8Linear) and base.bias is None for base in bases):
        return False
    adapted = [one for one in found if isinstance(one, LoraLayer)]
    kinds = {
        (*layer.r.items(), *layer.scaling.items(), layer.lora_dropout[name].p)
        for layer in adapted
        for name in layer.lora_A
    }
    return len(kinds) <= 1 and all(len(layer.lora_A) == 1 for layer in adapted)


class _Group(NamedTuple):
    """The adapters at work on projections of one input, as `fused` takes them."""

    seeds: torch.Tensor
    down: torch.Tensor | None
    ups: list[torch.Tensor | None]
    p: float
    scale: float


def _group(x: torch.Tensor, *layers: Any) -> _Group:
    found = [lora.at_work(layer) for layer in layers]
    there = [one[0] for one in found if one]
    if not there:
        none: list[torch.Tensor | None] = [None] * len(layers)
        return _Group(torch.zeros(1, dtype=torch.int32, device=x.device), None, none, 0.0, 1.0)
    seeds = torch.cat([one.seeds for one in there])
    down = torch.cat([one.down for one in there])
    ups = [one[0].up if one else None for one in found]
    return _Group(seeds, down, ups, there[0].p, there[0].scale)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return cast(x.reshape(-1, x.shape[-1]))[0]


def _projection(layer: Any, x: torch.Tensor) -> torch.Tensor:
    flat = _flat(x)
    group = _group(flat, layer)
    if group.down is None:
        return layer.base_layer(x)
    weight = layer.base_layer.together.weight
    y = fused.Projection.apply(
        flat, *weight, group.seeds, group.down, group.ups[0], group.p, group.scale
    )
    return y.view(*x.shape[:-1], -1)


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    flat = _flat(x)
    first, last = _group(flat, mlp.gate_proj, mlp.up_proj), _group(flat, mlp.down_proj)
    wide, down = _base(mlp.up_proj).together.weight, _base(mlp.down_proj).together.weight
    y = fused.Mlp.apply(
        flat, *wide, *down, first.seeds, first.down, *first.ups, last.seeds, last.down,
        last.ups[0], first.p, first.scale, last.p, last.scale,
    )  # fmt: skip
    return y.view(x.shape)


def _attention(
    attention: Any, hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor], attention_mask: None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As transformers has it, for one batch without a cache."""
    flat = _flat(hidden_states)
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    group = _group(flat, *layers)
    cos, sin = (cast(t[0])[0] for t in position_embeddings)
    together = _base(attention.q_proj).together
    width = attention.head_dim
    heads = tuple(size // width for size in together.sizes[:2])
    found = fused.Attention.apply(
        flat, *together.weight, cos, sin, group.seeds, group.down, *group.ups, (*heads, width),
        group.p, group.scale,
    )  # fmt: skip
    query, key, value = (t.transpose(0, 1)[None] for t in found)
    window = getattr(attention.config, "sliding_window", None)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    y, _ = attend(
        attention, query, key, value, attention_mask, scaling=attention.scaling,
        sliding_window=window, **options,
    )  # fmt: skip
    return attention.o_proj(y.flatten(2)), None
