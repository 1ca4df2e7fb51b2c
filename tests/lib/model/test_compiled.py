"""One graph for all layers and all bins: what the GPU compiles, compiled on the CPU without its kernels."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from stages.lib.model import attention, carrying, compiling, fp8, load, offload
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.loss import Shape, lay_out, nll_sum
from stages.lib.model.quick import Quick
from tests.decoders import QUICK, error, gradients, make, some
from tests.lib.model.test_int8 import convert as to_int8
from tests.lib.model.test_nf4 import convert as to_nf4

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 128
MORE = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}}
CONVERT = {"fp32": None, "bf16": None, "fp8": fp8.convert, "nf4": to_nf4, "int8": to_int8}


def masked(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    *, bounds: torch.Tensor, scaling: float | None = None, sliding_window: int | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Packed attention by a mask of tokens by tokens, for the compiler cannot follow a row's bounds here."""
    at = torch.arange(query.shape[2])
    row = torch.searchsorted(bounds, at, right=True)
    behind = at[:, None] - at
    mask = (row[:, None] == row) & (behind >= 0) & (behind < (sliding_window or len(at)))
    kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
    q, k, v = attention.hold(module, *(t.to(kind) for t in (query, key, value)))
    found = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2).contiguous(), None


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Nothing that an earlier test compiled, and attention that the compiler takes."""
    torch._dynamo.reset()
    counters.clear()
    AttentionInterface.register(attention.NAME, masked)
    yield
    attention.register()
    torch._dynamo.reset()


def arrange(quick: Quick, recompute: bool) -> None:
    """As the quick model does it on the GPU, with the compiler's front alone."""
    compiled = [
        (layer, torch.compile(plain, fullgraph=True, dynamic=False, backend="aot_eager"))
        for layer, plain in quick.layers
    ]
    quick.layers = compiled
    quick.arrange(recompute)


@pytest.mark.parametrize(
    ("family", "precision", "recompute"),
    [
        ("llama3", "fp32", True),
        ("qwen2", "nf4", True),
        ("qwen2", "fp8", False),
        pytest.param("mistral", "bf16", False, marks=pytest.mark.sweep),
        pytest.param("llama3", "fp8", True, marks=pytest.mark.sweep),
        pytest.param("qwen2", "int8", True, marks=pytest.mark.sweep),
    ],
)
def test_all_layers_and_bins_share_one_graph(
    family: str, precision: str, recompute: bool, compiled_anew: None
) -> None:
    """Bins with other numbers of rows, other seeds and other adapter weights compile nothing anew."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    kept: dict[str, Any] = {"dtype": dtype, "dropout": 0.1, "convert": CONVERT[precision]}
    tuned = make(QUICK[family] | {"num_hidden_layers": 3}, **kept)
    quick = Quick(tuned, precision)
    AttentionInterface.register(attention.NAME, masked)  # instead of the one that it chose
    shape = Shape(40, False, TOKENS)
    # The CPU's autocast, which the compiler keeps for the way back, refuses to join tensors in e4m3.
    autocast = contextlib.nullcontext() if precision == "fp8" else load.compute(precision)
    bins = [some(40, 23, 5), some(5), some(*range(3, 15)), some(40, 30)]

    def walk() -> list[Any]:
        found = []
        for number, rows in enumerate(bins):
            quick.seed.fill_(number)
            batch = lay_out(rows, shape)
            torch._dynamo.mark_dynamic(batch["bounds"], 0)
            with autocast:
                loss = nll_sum(tuned, batch)
            found.append((loss.detach(), gradients(tuned, loss)))
        return found

    eager = walk()
    arrange(quick, recompute)
    assert not counters["stats"]["unique_graphs"]
    compiled = walk()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    close = 1e-5 if precision == "fp32" else 0.05
    for (loss, of_loss), (wanted, of_wanted) in zip(compiled, eager, strict=True):
        assert error(loss, wanted) < close
        assert error(of_loss, of_wanted) < close


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("llama3", "fp8"), ("phi3", "nf4"),
        *(
            pytest.param(*case, marks=pytest.mark.sweep)
            for case in (
                ("llama3", "fp32"), ("llama2", "nf4"), ("qwen3", "bf16"), ("gemma3", "bf16"), ("phi", "nf4"),
                ("olmo2", "nf4"),
            )
        ),
    ],
)  # fmt: skip
def test_offloaded_layers_keep_what_is_planned_and_give_the_same_gradients(
    family: str, precision: str, compiled_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some keep q, k and v, a lean one does not: two graphs, and of each layer no other tensor on the host."""
    monkeypatch.setattr(offload, "LEAST", 1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    described = QUICK[family] | {"num_hidden_layers": 5} | MORE.get(family, {})
    tuned = make(described, dtype=dtype, dropout=0.1, convert=CONVERT[precision])
    quick = Quick(tuned, precision)
    AttentionInterface.register(attention.NAME, masked)
    quick.compiles, quick.backend = True, "aot_eager"
    batch = lay_out(some(40, 23, 5), Shape(40, False, TOKENS))
    torch._dynamo.mark_dynamic(batch["bounds"], 0)
    autocast = contextlib.nullcontext() if precision == "fp8" else load.compute(precision)

    def walk() -> Any:
        with autocast:
            return nll_sum(tuned, batch)

    quick.arrange(0)
    wanted = walk()
    of_wanted = gradients(tuned, wanted)
    before = counters["stats"]["unique_graphs"]
    quick.arrange(0, 5, 1)
    loss = walk()
    assert quick.traffic
    quick.traffic.settle()
    shape = Architecture.of(tuned.config.to_dict())
    assert shape
    setup = Setup(precision, 4, ("all-linear",))
    normaliser = 3 * 4 * tuned.config.num_attention_heads
    small = 3 * 2 * 4  # what a norm kept of a token
    taken = quick.traffic.host.taken / TOKENS - normaliser
    assert 0 <= taken - carrying.host(shape, setup, 5, 1) <= small
    assert torch.equal(loss, wanted)
    found = gradients(tuned, loss)
    for name, gradient in of_wanted.items():
        assert torch.equal(found[name], gradient), name
    types = getattr(tuned.config, "layer_types", None) or [None] * 5
    held = [layer.self_attn.held for layer, _ in quick.layers]
    assert held.count(False) == 1
    assert counters["stats"]["unique_graphs"] - before == len(set(zip(types, held, strict=True)))


def test_what_cannot_be_compiled_runs_as_it_is_and_is_said(
    capfd: pytest.CaptureFixture[str],
) -> None:
    tries = []

    def broken(graph: Any, inputs: Any) -> Any:
        tries.append(graph)
        raise ValueError("no such instruction\nand more")

    double = compiling.tried(lambda x: x * 2, "the double", backend=broken)
    torch._dynamo.reset()
    assert [float(double(torch.tensor(n))) for n in (1.0, 2.0)] == [2.0, 4.0]
    said = capfd.readouterr().err
    assert said.count("the double cannot be compiled here") == len(tries) == 1
    assert "no such instruction" in said
    assert "and more" not in said


AGAIN = """
from stages.lib.run import environment
environment.keep_compiled()
from stages.lib.model import compiling, quick
from stages.lib.model.low_rank import Down
import torch
from torch._dynamo.utils import counters

def branch(x, factors, seeds):
    return Down.apply(x, factors, seeds, 0.0, 1.0)

x, factors = (torch.ones(size).requires_grad_() for size in ((8, 16), (4, 16)))
for sources in {sources}:
    compiling._sources = lambda: sources
    torch._dynamo.reset()
    compiling.compiled(branch)(x, factors, torch.tensor([5], dtype=torch.int32)).sum().backward()
print(*(counters["aot_autograd"][name] for name in ("autograd_cache_hit", "autograd_cache_miss")))
"""


def test_the_next_process_finds_what_was_compiled(tmp_path: Path) -> None:
    """Autograd functions of ours among it, where it belongs; nothing, if our sources are others."""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    env = {name: value for name, value in env.items() if not name.endswith("CACHE_DIR")}
    found = []
    for sources in (["these"], ["these", "others"]):
        command = [sys.executable, "-c", AGAIN.format(sources=sources)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found == [["0", "1"], ["1", "1"]]
    assert any((tmp_path / "lora-stages/compiled/inductor").iterdir())


def test_a_mask_of_all_tokens_says_the_same_as_the_bounds() -> None:
    """The attention of this file is that of the quick path, which it stands in for."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 68, 16), torch.randn(1, 2, 68, 16), torch.randn(1, 2, 68, 16)
    batch = lay_out(some(40, 23, 5), Shape(40))
    given = {name: batch[name] for name in ("bounds", "longest", "uniform")}
    for window in (None, 16, 1):
        found, _ = attention.attend(
            None, q, k, v, None, sliding_window=window, scaling=0.3, **given
        )
        wanted, _ = masked(None, q, k, v, None, sliding_window=window, scaling=0.3, **given)
        assert error(found, wanted) < 1e-6


@pytest.mark.parametrize("name", attention.UNKNOWN)
def test_attention_refuses_what_it_would_leave_out(name: str) -> None:
    q = torch.randn(1, 2, 8, 4)
    given = {"bounds": torch.tensor([0, 8], dtype=torch.int32), "longest": 8, "uniform": True}
    with pytest.raises(NotImplementedError, match=name):
        attention.attend(None, q, q, q, None, **given, **{name: 1.0})
    attention.attend(None, q, q, q, None, **given, **{name: None})
