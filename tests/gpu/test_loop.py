"""The training loop on a GPU: the host does not wait for it between evaluations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.lib.data.bins import Schedule
from stages.lib.model import ceiling, fp8, health, history, training
from stages.lib.model.loss import Shape, lay_out, pinned, to
from stages.lib.model.pending import Moment, Numbers
from stages.lib.model.quick import Quick
from tests.decoders import QUICK, make, some
from tests.lib.model.conftest import MemoryRows
from tests.lib.model.test_training import RECIPE, log

if not torch.cuda.is_available():
    pytest.skip("no GPU: the loop is unproven", allow_module_level=True)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
LENGTHS = [100, 57, 90, 40, 64, 100, 30, 77] * 4


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_between_evaluations_nothing_waits_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, precision: str
) -> None:
    """Of twelve steps, 3, 6, 9 and 12 are evaluated; 7 and 8 are watched."""
    convert = fp8.convert if precision == "fp8" else None
    tuned = make(QUICK["llama2"] | SIZES, dtype=torch.bfloat16, place="cuda", convert=convert)
    rows = MemoryRows(some(*LENGTHS, words=512))
    plan = Schedule(rows.lengths, 256, 2, 1, 12, 0)
    quick = Quick(tuned, precision)
    quick.arrange(0)
    bins, last = 0, list[Path]()
    synchronize: Callable[..., None] = torch.cuda.synchronize

    def refuse(*_: object) -> None:
        raise AssertionError("the host waits for the GPU")

    def watch(*_: object) -> None:
        nonlocal bins
        bins += tuned.training
        watched = 12 < bins <= 16
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        monkeypatch.setattr(torch.cuda, "synchronize", refuse if watched else synchronize)

    def done(folder: Path, *_: object) -> None:
        last.append(folder)

    def quiet(*_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

    hook = tuned.register_forward_pre_hook(watch)
    try:
        found = training.train(
            quick, plan, rows, MemoryRows(rows.rows[:4]), quick.shape(rows.lengths, 256), tmp_path,
            RECIPE | {"optimizer": optimizer, "learning_rate": 1e-4}, resume=None, saved=done,
        )  # fmt: skip
    finally:
        hook.remove()
        quiet()
    assert bins == 24
    assert [entry["step"] for entry in log(last[-1])] == list(range(1, 13))
    assert 0 < found["step_seconds"] < 5
    assert found["model_flops_per_second"] > 0
    first = history.first_gradients(last[-1])
    assert first is not None
    assert (first["step"], first["modules"], first["without_input"]) == (1, 14, [])
    assert health.logit_change(tuned, np.arange(3, 40), precision) > 0  # a bin of no round size


def test_a_bin_is_pinned_once_and_copied_whole() -> None:
    batch = lay_out(some(100, 57, words=512), Shape(100, False, 256))
    held = pinned(batch)
    tensors = [name for name, value in held.items() if isinstance(value, torch.Tensor)]
    assert all(held[name].is_pinned() for name in tensors)
    copied = to(held, torch.device("cuda"))
    for name in tensors:
        assert torch.equal(copied[name].cpu(), batch[name])
    assert copied["longest"] == 100


def test_numbers_are_asked_for_without_a_wait_and_are_right() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    torch.stack([x.sum(), x.norm()])  # a kernel's first launch waits for the GPU
    begun = Moment()
    for _ in range(20):
        x = (x @ x).tanh()
    numbers = Numbers(1, 1e-4, torch.stack([x.sum(), x.norm()]))
    assert not numbers.ended._event.query()  # type: ignore[union-attr]
    assert numbers.read() == (float(x.sum()), float(x.norm()))
    assert numbers.ended.since(begun) > 0


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_ceiling_is_a_rate_of_this_gpu_and_leaves_its_memory(precision: str) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("no FP8 here")
    before = torch.cuda.memory_allocated()
    rates = [ceiling.highest(precision) for _ in range(2)]
    assert all(rate and 1e13 < rate < 1e16 for rate in rates)
    assert np.isclose(*rates, rtol=0.2)
    # cuBLAS keeps its workspace.
    assert torch.cuda.memory_allocated() - before < 2**28
