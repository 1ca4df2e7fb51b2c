"""How the work is cut where nothing can be probed, and what happens where nothing can be compiled."""

import numpy as np
import pytest
import torch

from stages.lib.model import memory
from stages.lib.model.architecture import Setup
from stages.lib.model.plan import Choice
from stages.lib.model.quick import Quick
from tests.decoders import PLAIN, QUICK, make, quick_sum, some


@pytest.mark.parametrize(
    ("batch", "longest", "wanted", "found"),
    [
        (16384, 300, None, [1024, 512]),
        (16384, 300, 4096, [4096]),
        (3000, 700, None, [1000]),
        (1000, 1000, None, [1000]),
        (4096, 2048, None, [2048]),
    ],
)
def test_a_pass_divides_a_step_and_holds_the_longest_row(
    batch: int, longest: int, wanted: int | None, found: list[int]
) -> None:
    assert memory.sizes(batch, longest, wanted) == found


@pytest.mark.case("D9")
@pytest.mark.parametrize(("capability", "found"), [((7, 5), "fp32"), ((8, 0), "nf4")])
def test_auto_precision_is_one_that_the_gpu_has(
    capability: tuple[int, int], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says it of a T4 and an A100; the base is none that is planned for."""
    for name, value in {
        "is_available": True, "get_device_name": "A GPU", "get_device_capability": capability,
        "mem_get_info": (1 << 34, 1 << 34), "memory_reserved": 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    setup = Setup("auto", 4, ("all-linear",))
    assert memory.precision({"model_type": "odd"}, setup, [1024], "auto") == found


def test_on_a_cpu_the_first_cut_is_taken_and_a_resumed_run_keeps_its_own() -> None:
    setup, lengths = Setup("fp32", 4, ("all-linear",)), np.array([40, 20])
    _, choice = memory.prepare(make(QUICK["llama2"]), setup, lengths, [128, 64], "auto", None)
    assert (choice.tokens, choice.recomputed) == (128, 0)
    kept = Choice(64, 2)
    quick, choice = memory.prepare(make(QUICK["llama2"]), setup, lengths, [128], "auto", kept)
    assert choice == kept
    assert [layer.forward for layer, plain in quick.layers] != [p for _, p in quick.layers]


@pytest.mark.parametrize(
    ("recompute", "recomputed", "offloaded"), [("none", 0, 0), ("all", 2, 0), ("offload", 0, 2)]
)
def test_what_was_asked_for_is_done(recompute: str, recomputed: int, offloaded: int) -> None:
    setup, lengths = Setup("fp32", 4, ("all-linear",)), np.array([40, 20])
    quick, choice = memory.prepare(make(QUICK["llama2"]), setup, lengths, [64], recompute, None)
    assert (choice.recomputed, choice.offloaded) == (recomputed, offloaded)
    assert (quick.traffic is not None) == bool(offloaded)


def test_a_model_that_is_not_known_recomputes_instead_of_offloading() -> None:
    setup, lengths = Setup("fp32", 4, ("all-linear",)), np.array([40, 20])
    tuned = make(PLAIN["gpt2"][0])
    _, choice = memory.prepare(tuned, setup, lengths, [64], "offload", None)
    assert (choice.recomputed, choice.offloaded) == (1, 0)
    assert tuned.get_base_model().is_gradient_checkpointing


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = some(40, 20)
    quick = Quick(make(QUICK["llama2"]), "fp32")
    quick.arrange(0)
    plain = quick_sum(quick, rows, 64)
    quick.compiles = True  # on a CPU attention reads where rows begin, which no one graph can hold
    assert memory._passes(quick, np.array([40, 20]), Choice(64, 0))
    assert not quick.compiles
    assert "cannot be compiled here" in capsys.readouterr().err
    assert float(quick_sum(quick, rows, 64).detach()) == pytest.approx(float(plain.detach()))


def test_auto_is_bf16_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    setup = Setup("auto", 4, ("q_proj",))
    assert memory.precision({}, setup, [64], "auto") == "bf16"
    assert "no GPU" in capsys.readouterr().err
