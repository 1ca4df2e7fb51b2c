"""Adapters and FP8 projections in one function: the same numbers as one after the other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stages.lib.model import fp8, low_rank, projections, rotary
from stages.lib.model.dropout import CountedDropout
from stages.lib.model.low_rank import Drop
from stages.lib.model.quick import Quick
from tests.decoders import QUICK, error, gradients, make, quick_sum, some

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("p", [0.0, 0.3, 0.96])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_first_factors_together_are_each_alone(count: int, p: float) -> None:
    """Forward and both gradients, against dropout and a product for each adapter, in fp64."""
    torch.manual_seed(0)
    x = torch.randn(37, 48, dtype=torch.float64).requires_grad_()
    factors = torch.randn(count * 8, 48, dtype=torch.float64).requires_grad_()
    seed = torch.tensor(77, dtype=torch.int32)
    drops = [CountedDropout(p, seed, place) for place in range(count)]
    seeds = torch.cat([drop.seeds() for drop in drops])
    alone = [
        F.linear(drop(x), a) * 0.5 for drop, a in zip(drops, factors.chunk(count), strict=True)
    ]
    wanted = torch.cat(alone, 1)
    upstream = torch.randn_like(wanted)
    of_wanted = torch.autograd.grad(wanted, (x, factors), upstream)
    found = low_rank.Down.apply(x, factors, seeds, p, 0.5)
    of_found = torch.autograd.grad(found, (x, factors), upstream)
    assert error(found, wanted) < 1e-14
    for one, other in zip(of_found, of_wanted, strict=True):
        assert error(one, other) < 1e-14
    base = torch.randn_like(x)
    drop = Drop(count, p)
    more = low_rank.of_input(upstream, factors.detach(), seeds, base, drop, 0.5)
    assert error(more, of_wanted[0] + base) < 1e-14


@pytest.mark.parametrize("places", [(0, -1, 1), (-1, -1, -1), (0, 1, 2)])
def test_heads_are_rotated_and_back(places: tuple[int, int, int]) -> None:
    """The way back is the transposed of the way there, which turns every pair by its angle."""
    torch.manual_seed(0)
    heads, tokens, rank = rotary.Heads(4, 2, 16), 9, 3
    angles = torch.rand(tokens, 8, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    y = torch.randn(tokens, sum(heads.sizes), dtype=torch.float64).requires_grad_()
    lows = torch.randn(tokens, 3 * rank, dtype=torch.float64)
    ups = torch.randn(sum(heads.sizes), rank, dtype=torch.float64)
    found = rotary.turn(y, lows, ups, cos, sin, heads, places)
    q, k, v = found.split(heads.sizes, 1)
    parts = zip(y.split(heads.sizes, 1), ups.split(heads.sizes), places, strict=True)
    plain = [p + (lows[:, i * rank :][:, :rank] @ u.t() if i >= 0 else 0) for p, u, i in parts]
    for turned, part in ((q, plain[0]), (k, plain[1])):
        pairs = torch.view_as_complex(
            torch.stack(part.unflatten(1, (-1, 2, 8)).unbind(2), -1).contiguous()
        )
        exact = torch.view_as_real(
            pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :8]
        )
        assert error(turned, exact.transpose(2, 3).flatten(1)) < 1e-14
    assert torch.equal(v, plain[2])
    upstream = [torch.randn_like(t).unflatten(1, (-1, 16)) for t in (q, k, v)]
    (wanted,) = torch.autograd.grad(found, y, torch.cat([g.flatten(1) for g in upstream], 1))
    back, values, scales = rotary.turn_back(*upstream, cos, sin, (True, True, True))
    assert error(back, wanted) < 1e-14
    assert error(values.double() * scales, wanted) < 0.03


TARGETS = [
    "all-linear",
    "q_proj,v_proj",
    "k_proj,up_proj",
    "o_proj",
    "gate_proj,down_proj",
    "up_proj",
]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", ["llama2", "mistral"])
def test_fused_is_unfused(family: str, targets: str) -> None:
    """Loss and gradients of a decoder with dropout, in fp32, where both round to FP8 alike."""
    named: Any = targets if targets == "all-linear" else targets.split(",")
    below = {"lora_alpha": 3}  # a scale below that of no adapter
    tuned = make(QUICK[family], convert=fp8.convert, targets=named, dropout=0.2, lora=below)
    quick = Quick(tuned, "fp32")
    quick.seed.fill_(99)
    projections.gather(quick.causal)
    unfused = quick_sum(quick, some(40, 23, 5), 128)
    of_unfused = gradients(tuned, unfused)
    projections.fuse(quick.causal)
    fused = quick_sum(quick, some(40, 23, 5), 128)
    of_fused = gradients(tuned, fused)
    layer = quick.causal.model.layers[0]
    assert "forward" in vars(layer.self_attn)
    assert "forward" in vars(layer.mlp)
    assert error(fused, unfused) < 1e-4
    assert error(of_fused, of_unfused) < 5e-3  # a last bit decides how a value is rounded to FP8
