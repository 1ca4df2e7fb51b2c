"""The GPU's own kernels against fp64: attention, SwiGLU with its quantisation, FP8 products, the loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stages.lib.model import attention, cross_entropy, fp8, fused, low_rank, rotary, swiglu
from stages.lib.model.dropout import keep
from tests.decoders import error

PLACE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("no GPU: its kernels are unproven", allow_module_level=True)
EIGHT_BITS = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < fp8.CAPABILITY,
    reason="this GPU has no FP8 products",
)
ROUNDING = 0.027  # as in tests/lib/model/test_fp8.py


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Attention in fp64 under a mask of tokens by tokens, scaled by 0.1."""
    several = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(several, 1) for t in (k, v))
    at = torch.arange(q.shape[2], device=q.device)
    row = torch.searchsorted(bounds, at.to(bounds.dtype), right=True)
    behind = at[:, None] - at
    mask = (row[:, None] == row) & (behind >= 0) & (behind < (window or len(at)))
    scores = (q @ k.transpose(-1, -2) * 0.1).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ([100, 1, 60, 95], None),
        ([100, 1, 60, 95], 16),
        ([100, 1, 60, 95], 1),
        ([128, 128], None),
        ([128, 128], 16),
        ([256], None),
    ],
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("width", [64, 128])
def test_attention_is_a_block_diagonal_mask(
    lengths: list[int], window: int | None, heads: tuple[int, int], width: int
) -> None:
    """Rows of many lengths and of one, shared keys, a sliding window; forward and backward."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    bounds = ends.to(PLACE, torch.int32)
    q, k, v = (
        torch.randn(1, n, tokens, width, device=PLACE, dtype=torch.bfloat16).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    upstream = torch.randn(1, tokens, heads[0], width, device=PLACE, dtype=torch.bfloat16)
    uniform = len(set(lengths)) == 1
    given: dict[str, Any] = {"bounds": bounds, "longest": max(lengths), "uniform": uniform}
    found, _ = attention.attend(None, q, k, v, None, sliding_window=window, scaling=0.1, **given)
    assert found.shape == upstream.shape
    of_found = torch.autograd.grad(found, (q, k, v), upstream)
    far = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = reference(*far, bounds, window)
    of_wanted = torch.autograd.grad(wanted, far, upstream.double())
    assert error(found, wanted) < 5e-3
    for one, other in zip(of_found, of_wanted, strict=True):
        if other.norm() > 1e-6:  # who sees but itself has no gradient of q and k
            assert error(one, other) < 0.01


def gates(width: int) -> torch.Tensor:
    """Gate and up in bf16: rows of many sizes, one of them zeros."""
    torch.manual_seed(0)
    both = torch.randn(9, 2 * width, device=PLACE)
    both *= torch.tensor([1.0, 10.0, 0.1, 1e3, 1e-3, 1.0, 0.0, 1e-8, 5.0], device=PLACE)[:, None]
    return both.to(torch.bfloat16)


@EIGHT_BITS
@pytest.mark.parametrize("width", [176, 5504, 17408])
def test_swiglu_and_its_backward_are_close_to_exact(width: int) -> None:
    """Also at widths that no block divides, and where a row needs sixteen warps."""
    both = gates(width)
    _, values, scales = swiglu.forward(both)
    gate, up = both.double().chunk(2, -1)
    exact = F.silu(gate) * up
    sized = (0, 1, 2, 3, 4, 5, 8)  # the rows whose largest value is well above LEAST
    for row in sized:
        assert error(values[row].double() * scales[row].double(), exact[row]) < ROUNDING + 0.005
    assert not values[6].float().any()
    upstream = torch.randn(9, width, device=PLACE, dtype=torch.bfloat16)
    values, scales = swiglu.backward(upstream, both)[1:]
    far = both.double().requires_grad_()
    near, wide = far.chunk(2, -1)
    (of_both,) = torch.autograd.grad(F.silu(near) * wide, far, upstream.double())
    for row in sized:
        assert error(values[row].double() * scales[row].double(), of_both[row]) < ROUNDING + 0.005
    assert not values[6].float().any()
    assert scales.isfinite().all()


@EIGHT_BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_swiglu_makes_no_number_of_what_is_none(bad: float) -> None:
    both = gates(176)
    both[0, 3], both[1, 200] = bad, bad
    _, values, scales = swiglu.forward(both)
    found = values.float() * scales
    assert not found[:2].isfinite().all(1).any()
    assert found[2:].isfinite().all()
    upstream = torch.randn(9, 176, device=PLACE, dtype=torch.bfloat16)
    upstream[2, 5] = bad
    values, scales = swiglu.backward(upstream, both)[1:]
    found = values.float() * scales
    assert not found[:3].isfinite().all(1).any()
    assert found[3:].isfinite().all()


def projection() -> Any:
    """A frozen FP8 projection and its source."""
    torch.manual_seed(0)
    source = torch.nn.Linear(256, 384, bias=False, device=PLACE, dtype=torch.bfloat16)
    source.requires_grad_(False)
    return fp8.Fp8Linear(source), source


@EIGHT_BITS
@pytest.mark.parametrize("count", [1, 17, 128])
def test_an_fp8_product_and_its_gradient_are_close_to_exact(count: int) -> None:
    frozen, source = projection()
    weight = frozen.weight.double() * frozen.scales.double()
    x = torch.randn(count, 256, device=PLACE, dtype=torch.bfloat16).requires_grad_()
    upstream = torch.randn(count, 384, device=PLACE, dtype=torch.bfloat16)
    y = frozen(x)
    y.backward(upstream)
    assert y.dtype == torch.bfloat16
    scatter = 0.01 if count == 1 else 0.002  # and the rounding to bf16
    assert error(y, x.double() @ weight.t()) < ROUNDING + scatter
    assert error(x.grad, upstream.double() @ weight) < ROUNDING + scatter
    assert error(y, x.double() @ source.weight.double().t()) < 0.05


@EIGHT_BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_fp8_product_makes_no_number_of_what_is_none(bad: float) -> None:
    frozen, _ = projection()
    x = torch.randn(3, 256, device=PLACE, dtype=torch.bfloat16)
    x[1, 7] = bad
    for compute in (frozen, torch.compile(frozen, fullgraph=True)):
        y = compute(x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@EIGHT_BITS
def test_rows_are_quantised_as_on_the_cpu() -> None:
    rows = gates(256)
    values, scales = fp8.quantise(rows)
    on_cpu, cpu_scales = fp8.quantise(rows.cpu())
    torch.testing.assert_close(scales.cpu(), cpu_scales)
    assert error(values.float() * scales, on_cpu.float() * cpu_scales) < 1e-3


def test_the_dropout_mask_is_that_of_the_cpu() -> None:
    compiled = torch.compile(keep, fullgraph=True)
    for number in (0, 77, 2**31 - 1):
        seed = torch.tensor([number], dtype=torch.int32)
        like = torch.empty(300, 257)
        wanted = keep(seed, like, 0.3)
        for compute in (keep, compiled):
            assert torch.equal(compute(seed.to(PLACE), like.to(PLACE), 0.3).cpu(), wanted)


def test_the_loss_holds_one_chunk_of_logits() -> None:
    """The peak does not grow with the tokens, but for the gradient of their hidden states."""
    words, width = 65536, 256
    head = torch.randn(words, width, device=PLACE, dtype=torch.bfloat16)
    piece = torch.compile(cross_entropy.piece, dynamic=True)
    peaks = []
    for count in (4096, 4096, 16384):  # the first is for the compiler
        hidden = torch.randn(count, width, device=PLACE, dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(0, words, (count,), device=PLACE)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = cross_entropy.NllSum.apply(hidden, head, None, targets, piece)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - 2 * hidden.nbytes)
    chunk = cross_entropy.CHUNK * words * 2
    assert peaks[2] < peaks[1] + 0.1 * chunk
    assert peaks[2] < 5 * chunk
    wanted = torch.zeros((), dtype=torch.float64, device=PLACE)
    for part, target in zip(hidden.detach().split(1024), targets.split(1024), strict=True):
        wanted += F.cross_entropy(part.double() @ head.double().t(), target, reduction="sum")
    assert error(loss, wanted) < 1e-3


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.95, 0.97])
@pytest.mark.parametrize("width", [256, 344])
@pytest.mark.parametrize(("count", "rank"), [(1, 16), (1, 4), (2, 16), (3, 40), (3, 64), (3, 256)])
def test_first_factors_are_those_of_the_cpu(count: int, rank: int, width: int, p: float) -> None:
    """Masks to the last element; the same to the last bit when computed again; no size divides a tile."""
    torch.manual_seed(0)
    drop = low_rank.Drop(count, p)
    seeds = torch.tensor([5, -99, 2**30], dtype=torch.int32, device=PLACE)[:count]
    x, base = (torch.randn(301, width, device=PLACE, dtype=torch.bfloat16) for _ in range(2))
    factors = torch.randn(count * rank, width, device=PLACE, dtype=torch.bfloat16)
    lows = torch.randn(301, count * rank, device=PLACE, dtype=torch.bfloat16)
    most = 4e-3 if low_rank.fits(x, rank, p) else 8e-3  # torch rounds between its steps
    for name, given in (
        ("down", (x, factors)),
        ("of_factors", (lows, x)),
        ("of_input", (lows, factors)),
    ):
        more = (base,) if name == "of_input" else ()
        compute = getattr(low_rank, name)
        found = compute(*given, seeds, *more, drop, 0.7)
        exact = compute(*(t.double() for t in given), seeds, *(t.double() for t in more), drop, 0.7)
        assert error(found, exact) < most, name
        assert torch.equal(found, compute(*given, seeds, *more, drop, 0.7)), name
    alone = low_rank.of_input(lows, factors, seeds, None, drop, 0.7)
    wanted = low_rank.of_input(lows.double(), factors.double(), seeds, None, drop, 0.7)
    assert error(alone, wanted) < most


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1])
def test_compiled_first_factors_have_the_gradients_of_eager_ones(p: float) -> None:
    """A compiled graph hands numbers over in another width than a launch from Python."""
    torch.manual_seed(0)
    x = torch.randn(96, 256, device=PLACE, dtype=torch.bfloat16, requires_grad=True)
    factors = torch.randn(16, 256, device=PLACE, requires_grad=True)
    upstream = torch.randn(96, 16, device=PLACE, dtype=torch.bfloat16)
    seeds = torch.tensor([7], dtype=torch.int32, device=PLACE)

    def lows(x: torch.Tensor, factors: torch.Tensor) -> Any:
        return low_rank.Down.apply(x, factors, seeds, p, 1.0)

    for compute in (lows, torch.compile(lows, fullgraph=True)):
        found = compute(x, factors)
        sides = (found, *torch.autograd.grad(found, (x, factors), upstream))
        if compute is lows:
            wanted = sides
    for one, other in zip(sides, wanted, strict=True):
        assert error(one, other) < 1e-3


@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(301, 344, 8), (1500, 256, 40), (300, 640, 64), (300, 640, 256)]
)
def test_second_factors_have_their_gradients(rows: int, width: int, rank: int) -> None:
    """From columns of a wider gradient, as q's and k's are."""
    torch.manual_seed(0)
    wide = torch.randn(rows, 3 * width, device=PLACE, dtype=torch.bfloat16)
    lows = torch.randn(rows, 2 * rank, device=PLACE, dtype=torch.bfloat16)[:, rank:]
    factor = torch.randn(width, rank, device=PLACE, dtype=torch.bfloat16)
    gradient = wide[:, width : 2 * width]
    of_lows, of_factor = low_rank.of_up(gradient, lows, factor)
    assert error(of_lows, gradient.double() @ factor.double()) < 4e-3
    assert error(of_factor, gradient.double().t() @ lows.double()) < 4e-3


@EIGHT_BITS
@pytest.mark.parametrize("places", [(0, -1, 1), (-1, -1, -1), (0, 1, 2)])
@pytest.mark.parametrize("heads", [(4, 4, 128), (7, 1, 64), (6, 3, 32)])
def test_heads_are_rotated_and_back(
    heads: tuple[int, int, int], places: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    sizes, tokens, rank = rotary.Heads(*heads), 77, 8
    angles = torch.rand(tokens, heads[2] // 2, device=PLACE).repeat(1, 2)
    y = torch.randn(tokens, sum(sizes.sizes), device=PLACE)
    lows = torch.randn(tokens, 3 * rank, device=PLACE)
    ups = torch.randn(sum(sizes.sizes), rank, device=PLACE)
    near = [t.to(torch.bfloat16) for t in (y, lows, ups, angles.cos(), angles.sin())]
    far = [t.double() for t in near]
    exact = rotary.turn(*far, sizes, places)
    assert error(rotary.turn(*near, sizes, places), exact) < 5e-3
    parts = [t.unflatten(1, (-1, heads[2])) for t in near[0].split(sizes.sizes, 1)]
    wanted, _, _ = rotary.turn_back(*(p.double() for p in parts), *far[3:], (True, True, True))
    back, values, scales = rotary.turn_back(*parts, *near[3:], (True, True, True))
    assert error(back, wanted) < 5e-3
    assert error(values.double() * scales.double(), wanted) < ROUNDING + 0.001
    bad = parts[0].clone()
    bad[3, 1, 5] = torch.nan
    _, values, scales = rotary.turn_back(bad, *parts[1:], *near[3:], (False, False, False))
    found = (values.float() * scales).isfinite().all(1)
    assert not found[3]
    assert found.sum() == tokens - 1


@pytest.mark.parametrize("there", [(True, True), (True, False), (False, True)])
def test_second_factors_are_added(there: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    y = torch.randn(77, 2 * 344, device=PLACE, dtype=torch.bfloat16)
    factors = [
        torch.randn(344, 8, device=PLACE, dtype=torch.bfloat16) if one else None for one in there
    ]
    lows = torch.randn(77, 8 * sum(there), device=PLACE, dtype=torch.bfloat16)
    far = [None if f is None else f.double() for f in factors]
    assert error(fused._up(y, lows, factors), fused._up(y.double(), lows.double(), far)) < 4e-3
