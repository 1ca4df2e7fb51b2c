"""What a run will take: memory against measured peaks, time, money, and what the page says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib.model import cutting, known, plan
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.speed import Rows
from stages.lib.report import forecast, forecast_page, past
from stages.lib.report.amount import Amount
from stages.lib.report.forecast import Fit, Order
from stages.lib.run import cards

GIB = 2**30
QV = ("q_proj", "v_proj")


def order(precision: str = "fp8", base: str = "meta-llama/Llama-2-7b-hf", **changed: Any) -> Order:
    shape = Architecture.of(known.config(base) or {})
    assert shape
    facts: dict[str, Any] = {
        "base": base, "where": "a list", "shape": shape, "kind": "llama",
        "setup": Setup(precision, 16, QV), "cuts": cutting.sizes(16384, 1024, None), "batch_tokens": 16384,
        "recompute": "auto", "gpus": 1,
    }  # fmt: skip
    return Order(**facts | changed)


def amount(tokens: int | None = 10_000_000, evaluated: int = 0, at_most: bool = False) -> Amount:
    steps = tokens and -(-tokens // 16384)
    return Amount(tokens, steps, 1024, Rows([1024]), evaluated, at_most, "a test")


def fit(
    name: str, asked: Order | None = None, much: Amount | None = None, price: float | None = None
) -> Fit:
    return forecast.fit(asked or order(), cards.named(name)[0], much or amount(), price)


# NVIDIA H200, 2026-11-24, bench/results/train.json; the peaks are those of the first choice on that GPU.
@pytest.mark.parametrize(
    ("precision", "targets", "measured"),
    [
        ("fp8", QV, 63.83),
        ("nf4", QV, 66.93),
        ("fp8", ("all-linear",), 79.03),
        ("nf4", ("all-linear",), 82.14),
    ],
)
def test_the_choice_on_an_h200_is_what_train_chose_and_as_large_as_that_was(
    precision: str, targets: tuple[str, ...], measured: float
) -> None:
    found = fit("H200", order(setup=Setup(precision, 16, targets)))
    assert found.choice
    assert found.choice.memory
    assert (found.choice.tokens, found.choice.recomputed) == (16384, 0)
    assert found.setup.unpacked == (precision == "nf4")
    assert found.choice.memory.total / GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("precision", ["nf4", "fp8", "bf16", "auto"])
@pytest.mark.parametrize("recompute", ["auto", "none", "all", "offload"])
def test_what_fits_is_within_what_is_planned_for(precision: str, recompute: str) -> None:
    asked = order(precision, recompute=recompute)
    for card in cards.CARDS:
        found = forecast.fit(asked, card, amount(), None)
        if found.choice:
            assert found.choice.memory
            assert found.choice.memory.total <= forecast.room(card) < card.mebibytes << 20
            assert bool(found.choice.offloaded) == (recompute == "offload")
        else:
            assert found.why
            assert not found.least or found.least > forecast.room(card)


def test_a_gpu_that_cannot_compute_so_or_is_too_small_says_why() -> None:
    assert fit("T4", order("nf4")).why == "has no bf16, which BASE_PRECISION=nf4 computes in"
    assert fit("A100-80gb").why.startswith("has no FP8 products")
    small = fit("RTX 4060")
    least = plan.predict(order().shape, order().setup, 1024, 32).total
    assert small.least == least
    assert small.why == f"takes {least / GIB:.1f} GiB at the least, and 7.1 can be planned for"


def test_auto_is_the_fastest_that_fits() -> None:
    asked = order("auto")
    chosen = {n: fit(n, asked).setup.precision for n in ("H100", "A100 80GB", "RTX 4060", "T4")}
    assert chosen == {"H100": "fp8", "A100 80GB": "bf16", "RTX 4060": "nf4", "T4": "fp32"}
    assert not fit("T4", asked).choice


def test_seventy_billion_parameters() -> None:
    asked = order("nf4", "meta-llama/Llama-2-70b-hf")
    fits = {card.name: forecast.fit(asked, card, amount(), None) for card in cards.CARDS}
    assert [name for name, found in fits.items() if found.choice] == [
        "A100 40GB", "L40S", "A100 80GB", "H100 PCIe", "H100", "H200", "B200",
    ]  # fmt: skip
    assert asked.trainable == 80 * 16 * (2 * 8192 + 8192 + 1024)
    assert asked.parameters == pytest.approx(68.98e9, rel=0.001)


def test_time_and_money_by_hand() -> None:
    """30,000 tokens of evaluations cost what 10,000 tokens of training do."""
    much = amount(1_000_000, evaluated=30_000)
    one = fit("H200", order(), much, price=3.6)
    assert one.tokens_per_second
    assert one.seconds == pytest.approx(29.0 + 1_010_000 / one.tokens_per_second)
    assert one.cost == pytest.approx(one.seconds * 0.001)
    assert one.million == pytest.approx(1e6 / one.tokens_per_second)
    assert one.million_cost == pytest.approx(1e3 / one.tokens_per_second)

    # 32 passes a step; a price is that of one GPU.
    many = order(batch_tokens=32 * 16384)
    alone, eight = (fit("H200", Order(**vars(many) | {"gpus": n}), much, 3.6) for n in (1, 8))
    assert alone.tokens_per_second
    assert eight.tokens_per_second == pytest.approx(8 * 0.99 * alone.tokens_per_second, rel=0.01)
    assert eight.seconds
    assert eight.cost == pytest.approx(8 * eight.seconds * 0.001)
    assert fit("H200", order(), much).cost is None
    unknown = fit("H200", order(), amount(None), 3.6)
    assert (unknown.seconds, unknown.cost) == (None, None)
    assert unknown.million_cost


def test_every_precision_and_size_by_part() -> None:
    found = forecast.memory(order())
    named = {(m["base_precision"], m["dequantised_once"], m["pass_tokens"]): m for m in found}
    assert len(named) == len(found) == 6 * 5
    for (precision, once, tokens), parts in named.items():
        setup = Setup(precision, 16, QV, unpacked=once)
        for suffix, layers in (("", 0), ("_recomputed", 32)):
            whole = plan.predict(order().shape, setup, tokens, layers)
            assert parts[f"total{suffix}"] == whole.total
            assert parts[f"activations{suffix}"] == whole.activations
            fixed = sum(parts[name] for name in ("weights", "adapter", "optimizer", "loss"))
            assert fixed + parts[f"activations{suffix}"] == whole.total


def test_the_first_lines_are_the_verdict() -> None:
    asked, much = order(), amount(10_000_000, at_most=True)
    fits = [forecast.fit(asked, card, much, 2.0) for card in cards.CARDS]
    base, where, time, cost = forecast_page.verdict(asked, much, fits)
    assert base.startswith(
        "meta-llama/Llama-2-7b-hf in fp8: 8,388,608 trainable parameters, 0.12% of 6.74 billion"
    )
    assert where == "It fits 8 of 16 kinds of GPU, from 24 GB on (L4)."
    assert time.startswith("At most 10,000,000 tokens in 611 steps: ")
    assert time.endswith(
        f"min on B200 to {forecast_page.duration(fit('L4', asked, much).seconds)} on L4."
    )
    assert cost.startswith("It costs at most ")


def test_the_verdict_on_one_gpu_on_none_and_of_an_unknown_amount() -> None:
    asked = order()
    (one,) = forecast_page.verdict(asked, amount(), [fit("H200")])[1:2]
    assert one == "It fits H200 (141 GB): 62.4 of 139.9 GiB."
    assert (
        "It does not fit RTX 4060: takes"
        in forecast_page.verdict(asked, amount(), [fit("RTX 4060")])[1]
    )
    large = order("fp32", "meta-llama/Llama-2-70b-hf")
    fits = [forecast.fit(large, card, amount(), None) for card in cards.CARDS]
    assert forecast_page.verdict(large, amount(), fits)[1].startswith(
        "It fits none of these GPUs; B200"
    )
    unknown = amount(None)
    said = forecast_page.verdict(asked, unknown, [fit("H200", much=unknown, price=3.0)])[2:]
    assert said == ["A million tokens: 30 s on H200.", "It costs 0.03 on H200."]
    int8 = order("int8")
    assert "not known" in forecast_page.verdict(int8, amount(), [fit("H200", int8)])[2]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_page_is_as_wide_as_the_terminal(width: int, tmp_path: Path) -> None:
    asked = order("nf4")
    fits = [forecast.fit(asked, card, amount(), 2.0) for card in cards.CARDS]
    off = forecast.errors(tmp_path / "runs" / "one")
    page = forecast_page.text(asked, amount(), fits, off, width)
    assert max(map(len, page.splitlines())) <= width
    for word in ("RTX 4060", "tokens/s", "cost", "weights", "optimizer", "loss", "fp32"):
        assert word in page, word
    assert ("again:" in page) == (width > 80)
    assert "\u2026" not in page, "a cell was cut"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (48.2, "48 s"),
        (90, "1.5 min"),
        (900, "15 min"),
        (5400, "1.5 h"),
        (10**6, "278 h"),
    ],
)
def test_time_in_words(seconds: float | None, said: str) -> None:
    assert forecast_page.duration(seconds) == said


def finished(folder: Path, name: str, **metrics: Any) -> None:
    made = folder / name / "adapter"
    made.mkdir(parents=True)
    manifest = {"schema": 1, "files": {}, "settings": {}, "inputs": {}, "metrics": metrics}
    (made / "manifest.json").write_text(json.dumps(manifest))


def test_finished_runs_beside_say_how_far_their_plans_were_off(tmp_path: Path) -> None:
    finished(
        tmp_path, "one", predicted_gpu_bytes=9 * GIB, peak_gpu_bytes=10 * GIB,
        predicted_tokens_per_second=1100.0, tokens_per_second=1000.0,
    )  # fmt: skip
    finished(
        tmp_path,
        "old",
        predicted_gpu_bytes=11 * GIB,
        peak_gpu_bytes=10 * GIB,
        tokens_per_second=7.0,
    )
    finished(
        tmp_path, "on-a-cpu", predicted_gpu_bytes=None, peak_gpu_bytes=None, tokens_per_second=7.0
    )
    (tmp_path / "begun").mkdir()
    runs = {run["run"]: run for run in forecast.errors(tmp_path / "new")["beside"]}
    assert runs.keys() == {"one", "old"}
    assert runs["one"]["memory_percent"] == pytest.approx(-10)
    assert runs["one"]["speed_percent"] == pytest.approx(10)
    assert runs["old"]["memory_percent"] == pytest.approx(10)
    assert runs["old"]["speed_percent"] is None
    shown = forecast_page.beside(forecast.errors(tmp_path / "new"), 100).splitlines()
    (line,) = (line.split() for line in shown if line.split()[0] == "one")
    assert line == ["one", "9.0", "10.0", "-10.0", "%", "1,100", "1,000", "+10.0", "%"]


def test_what_it_rests_on_is_off_by_less_than_a_twentieth() -> None:
    runs = past.measured()
    assert len(runs) >= 13
    for run in runs:
        assert run.memory_off is not None
        assert run.speed_off is not None
        assert abs(run.memory_off) < 5, run.name
        assert abs(run.speed_off) < 5, run.name
