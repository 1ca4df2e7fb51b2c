"""The decoder on a GPU: its kernels against torch on the CPU, its graphs against transformers."""

from typing import Any

import pytest
import torch

from stages.lib.model import decode_ops, decoder, fp8
from stages.lib.model.sampling import Sampling
from tests.decoders import QUICK, error, exact_twin, make
from tests.lib.model.test_decoding import FAMILIES, held_against_plain, said, speaker, wanted
from tests.lib.model.test_int8 import convert as in_int8
from tests.lib.model.test_nf4 import convert as in_nf4

if not torch.cuda.is_available():
    pytest.skip("no GPU: the decoder's kernels are unproven", allow_module_level=True)
TYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
SIZES = {"hidden_size": 256, "intermediate_size": 512}
CONVERT: dict[str, Any] = {"bf16": None, "nf4": in_nf4, "fp8": fp8.convert}


def on_gpu(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(map(on_gpu, given))
    return given.cuda() if isinstance(given, torch.Tensor) else given


def adapted(rows: int, out: int, dtype: torch.dtype, *columns: int) -> tuple[Any, ...]:
    """lows, ups and, where asked, columns of an adapter of rank 4."""
    lows = torch.randn(rows, 12).to(dtype)
    return lows, torch.randn(4, out).to(dtype), *([columns] if columns else [])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("width", [96, 4096])
def test_norm_and_gate(dtype: torch.dtype, tuned: bool, width: int) -> None:
    torch.manual_seed(0)
    on = torch.tensor([0.7])
    y, x = torch.randn(5, 2 * width + 8).to(dtype), torch.randn(5, width).to(dtype)
    more = adapted(5, width, dtype) if tuned else (None, None)
    weight = torch.randn(width).to(dtype)
    given = (x.clone(), y[:, :width], *more, on, weight, 1e-5)
    there = on_gpu(given)
    assert error(decode_ops.add_norm(*there), decode_ops.add_norm(*given)) < TYPES[dtype]
    assert error(there[0], given[0]) < TYPES[dtype]
    more = adapted(5, 2 * width, dtype, 4, 0) if tuned else (None, None, (-1, -1))
    given = (y[:, : 2 * width], *more, on, width)
    assert error(decode_ops.gate(*on_gpu(given)), decode_ops.gate(*given)) < 2 * TYPES[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 20), (32, 8, 128)])
def test_placing(dtype: torch.dtype, tuned: bool, normed: bool, heads: Any) -> None:
    torch.manual_seed(0)
    queries, shared, head = heads
    out = (queries + 2 * shared) * head
    y = torch.randn(5, out + 8).to(dtype)[:, :out]
    more = adapted(5, out, dtype, 0, -1, 4) if tuned else (None, None, (-1, -1, -1))
    turns = tuple(torch.randn(30, head // 2).repeat(1, 2).to(dtype) for _ in range(2))
    norms = tuple(torch.randn(head).to(dtype) for _ in range(2)) if normed else None
    positions = torch.tensor([3, 0, 29, 7, 7], dtype=torch.int32)
    slots = torch.tensor([5, 0, 39, 11, 12], dtype=torch.int32)
    cache = torch.zeros(2, shared, 40, head, dtype=dtype)
    given = (y, *more, torch.tensor([0.7]), turns, norms, 1e-5, positions, slots, *cache, heads)
    there = on_gpu(given)
    assert error(decode_ops.place(*there), decode_ops.place(*given)) < 2 * TYPES[dtype]
    for place in (-3, -2):
        assert error(there[place], given[place]) < 2 * TYPES[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 20), (8, 1, 32), (32, 32, 128)])
@pytest.mark.parametrize("rows", [1, 3, 80])
def test_attention(dtype: torch.dtype, heads: Any, rows: int) -> None:
    torch.manual_seed(0)
    queries, shared, head = heads
    keys, values = torch.randn(2, shared, 500, head).to(dtype)
    starts = torch.randint(0, 250, (rows,), dtype=torch.int32)
    slots = starts + torch.randint(0, 250, (rows,), dtype=torch.int32)
    q = torch.randn(rows, queries * head).to(dtype)
    given = (q, keys, values, starts, slots, heads, head**-0.5)
    assert error(decode_ops.attend(*on_gpu(given)), decode_ops.attend(*given)) < TYPES[dtype]


@pytest.mark.parametrize("columns", [300, 4096, 11008])
def test_vectors_and_rows_in_eight_bits(columns: int) -> None:
    from stages.lib.model.kernels import decode

    torch.manual_seed(0)
    weight, bias = torch.randn(70, columns).bfloat16(), torch.randn(70).bfloat16()
    x = torch.randn(1, columns).bfloat16()
    exact = x.double() @ weight.double().t() + bias
    assert error(decode.vector(*on_gpu((x, weight, None, bias))), exact) < 8e-3
    e4m3, scales = fp8.powers(weight)
    rounded, steps = fp8.quantise(x)
    exact = x.double() @ (e4m3.double() * scales).t()
    plain = (rounded.double() * steps) @ (e4m3.double() * scales).t()
    # A scale that is off by its last bit rounds a few numbers to their other neighbour.
    found = decode.vector(*on_gpu((x, e4m3, scales, None)))
    assert error(found, exact) < 1.2 * error(plain, exact)
    found, own = decode.quantise(weight.cuda())
    plain, wanted_scales = fp8.quantise(weight)
    assert error(own, wanted_scales) < 1e-6
    exact = weight.double()
    assert error(found.double() * own, exact) < 1.01 * error(plain.double() * wanted_scales, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_transformers_says(family: str) -> None:
    described = QUICK[family] | {"sliding_window": 64}
    tuned = make(described, place="cuda")
    own = wanted(tuned)
    one = speaker(tuned)
    assert one.decoding, one.remarks
    assert said(one) == own
    with tuned.disable_adapter():
        base = wanted(tuned)
    assert said(one, adapted=False) == base != own


@pytest.mark.parametrize(
    ("precision", "roomy"), [("bf16", True), ("fp8", True), ("nf4", True), ("nf4", False)]
)
def test_a_base_in_few_bits(precision: str, roomy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NF4 dequantised once, as a large GPU has room for, and at every product."""
    described = QUICK["llama3"] | SIZES
    monkeypatch.setattr(decoder, "has_room_unpacked", lambda causal: roomy)
    tuned = make(described, dtype=torch.bfloat16, place="cuda", convert=CONVERT[precision]).eval()
    exact = exact_twin(tuned, described).eval()
    one = speaker(tuned, precision)
    held_against_plain(one, exact)
    assert all(said(one))


def test_int8_answers_as_transformers_has_it() -> None:
    tuned = make(QUICK["llama3"], dtype=torch.bfloat16, place="cuda", convert=in_int8)
    one = speaker(tuned, "int8")
    assert one.decoding is None
    assert "int8" in one.remarks[0]
    assert all(said(one))


def test_places_that_are_free_are_taken_by_the_next() -> None:
    """Graphs of other sizes, and parts of the cache that others had."""
    tuned = make(QUICK["llama3"], place="cuda")
    for how in (Sampling(), Sampling(1.0, 20, 0.9, 1.2, seed=3)):
        together = said(speaker(tuned, how=how))
        for at_once in (1, 2, 4):
            assert said(speaker(tuned, how=how, at_once=at_once)) == together
