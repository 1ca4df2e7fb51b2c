"""Projections of one input, computed together by whichever is asked first.

q, k and v read the same input, gate and up do: together the input is quantised and read once, the product is
large, and the input's gradient is one sum. The modules stay where they are, so that peft and transformers see
what they know.
"""

import types
from typing import Any

import torch
from torch import nn

from stages.lib.model import fp8, swiglu
from stages.lib.model.casting import cast

SILU = {"SiLU", "SiLUActivation"}  # by name: transformers has had both
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("transposed", weight.t().contiguous())
        self.register_buffer("ones", torch.ones(weight.shape[1], 1, device=weight.device))
        self.pending: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        for place, member in enumerate(members):
            part = weight.split(self.sizes)[place]
            member.weight = nn.Parameter(part, requires_grad=False)
            member.scales = scales.split(self.sizes)[place]
            member.together, member.place = self, place
            member.forward = types.MethodType(_forward, member)  # type: ignore[method-assign]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What `swiglu.Mlp` takes of a weight."""
        return self.weight, self.transposed, self.scales, self.ones

    def product(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """A member's output [..., out] for x [..., in]; the others' wait until they are asked for the same."""
        if self.pending is None or self.pending[0] is not x:
            flat = cast(x.reshape(-1, x.shape[-1]))[0]
            found = fp8.Product.apply(
                flat, self.weight, self.transposed, self.scales, self.ones, self.sizes
            )
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
        for names in TOGETHER:
            if found.keys() >= set(names):
                Together([found.pop(name) for name in names])
        for name, alone in found.items():
            if name != "base_layer":
                Together([alone])


def _base(module: nn.Module) -> nn.Module:
    """A projection without its adapter."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def fuse_mlps(model: Any) -> None:
    """Compute every MLP of gathered FP8 projections without adapters as one function, if it is a SwiGLU."""
    for mlp in model.modules():
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        plain = all(isinstance(p, fp8.Fp8Linear) and p.bias is None for p in parts)
        if plain and type(getattr(mlp, "act_fn", None)).__name__ in SILU:
            mlp.forward = types.MethodType(_mlp, mlp)


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    flat = cast(x.reshape(-1, x.shape[-1]))[0]
    wide, down = mlp.up_proj.together.tensors, mlp.down_proj.together.tensors
    return swiglu.Mlp.apply(flat, *wide, *down).view(x.shape)
