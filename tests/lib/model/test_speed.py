"""How fast a run will be: against what was measured, and how it changes with what is asked for."""

from dataclasses import replace

import numpy as np
import pytest

from stages.lib.model import cutting, known, plan, speed
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.plan import Choice
from stages.lib.model.speed import Rows
from stages.lib.run import cards
from stages.lib.run.cards import Card

CONFIG = known.config("meta-llama/Llama-2-7b-hf") or {}
SHAPE = Architecture(4096, 32, 4096, 4096, 11008, 32000, False)
QV, ALL = ("q_proj", "v_proj"), ("all-linear",)
FP8, BF16, NF4 = (Setup(name, 16, QV) for name in ("fp8", "bf16", "nf4"))
ROWS = Rows([2048])


def card(name: str) -> Card:
    return cards.named(name)[0]


def rate(
    setup: Setup = FP8, gpu: str = "H200", choice: Choice | None = None, rows: Rows = ROWS, gpus: int = 1,
    batch: int = 32768,
) -> float:  # fmt: skip
    cut = choice or Choice(16384, 0)
    found = speed.tokens_per_second(SHAPE, setup, card(gpu), rows, cut, batch, gpus)
    assert found
    return found


# NVIDIA H200, 2026-11-24, bench/results/train.json.
@pytest.mark.parametrize(
    ("setup", "choice", "measured"),
    [
        (FP8, Choice(16384, 0), 32961.6),
        (replace(FP8, targets=ALL), Choice(16384, 0), 28845.4),
        (replace(NF4, unpacked=True), Choice(16384, 0), 20468.1),
        (replace(NF4, targets=ALL, unpacked=True), Choice(16384, 0), 19057.1),
        (NF4, Choice(8192, 0, offloaded=32), 15672.0),
    ],
)
def test_a_prediction_is_within_a_twentieth_of_what_was_measured(
    setup: Setup, choice: Choice, measured: float
) -> None:
    assert rate(setup, choice=choice) == pytest.approx(measured, rel=0.05)


def test_a_faster_gpu_is_faster_and_a_longer_row_slower() -> None:
    assert rate(BF16, "H100") < rate(BF16) < rate(BF16, "B200")
    assert rate(rows=Rows([8192])) < rate() < rate(rows=Rows([128]))
    assert rate(rows=Rows([2048], learned=0.3)) > rate()
    assert rate() > 1.4 * rate(BF16)


def test_what_is_computed_twice_takes_its_time() -> None:
    one, again = rate(), rate(choice=Choice(16384, 32))
    assert one / again == pytest.approx(4 / 3, rel=0.01)
    away = plan.offloading(SHAPE, FP8, 16384, 32)
    assert again < rate(choice=away) < one
    # A checkpoint remembers how the work was cut, and not what it costs.
    assert rate(choice=Choice.kept(away.facts())) == rate(choice=away)


def test_several_gpus_share_the_passes_of_a_step() -> None:
    assert rate(gpus=2) == pytest.approx(1.98 * rate(), rel=0.002)
    assert rate(gpus=4) == pytest.approx(rate(gpus=2)), "two passes, so two are idle"
    assert speed.several(3, 2) == pytest.approx(0.99 * 3 / 2, rel=0.002)
    assert speed.several(8, 8) == pytest.approx(0.99 * 8, rel=0.002)


def test_no_speed_is_made_up() -> None:
    args = (SHAPE, Setup("int8", 16, QV), card("H100"), ROWS, Choice(16384, 0), 16384)
    assert speed.tokens_per_second(*args) is None
    assert speed.tokens_per_second(SHAPE, NF4, card("T4"), *args[3:]) is None
    t4 = speed.tokens_per_second(SHAPE, Setup("fp32", 16, QV), card("T4"), *args[3:])
    assert t4
    assert t4 < 8.1e12 / plan.operations(SHAPE, 8388608, [2048], 2048) * 2048


def test_what_train_records_is_what_plan_says() -> None:
    lengths = np.array([512, 1024, 2048])
    rows = Rows.of(lengths, np.array([100, 200, 596]))
    assert rows == Rows([512, 1024, 2048], 0.25)
    args = (rows, Choice(16384, 0), 32768, 2)
    found = speed.predicted(CONFIG, FP8, "NVIDIA H200", *args)
    assert found == round(rate(rows=rows, gpus=2), 1)
    assert speed.predicted(CONFIG, FP8, "cpu", *args) is None
    assert speed.predicted({"n_embd": 64}, FP8, "NVIDIA H200", *args) is None


def test_nf4_is_dequantised_once_where_nothing_need_be_computed_twice() -> None:
    sizes, large, small = [16384, 8192], 130 * 2**30, 40 * 2**30
    assert cutting.unpacked(SHAPE, NF4, sizes, large, "auto").unpacked
    assert not cutting.unpacked(SHAPE, NF4, sizes, small, "auto").unpacked
    assert not cutting.unpacked(SHAPE, NF4, sizes, large, "all").unpacked
    assert cutting.unpacked(SHAPE, FP8, sizes, large, "auto") == FP8


def test_evaluations_read_a_share_within_bounds() -> None:
    assert [cutting.evaluated(n) for n in (1000, 100_000, 10**9)] == [4096, 7500, 32768]
