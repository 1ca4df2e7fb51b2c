"""What an evaluation must reach."""

from typing import Any

import click
import pytest

from stages.lib.report import gate
from stages.lib.run.exits import BadSetting, GateFailed

RESULT: dict[str, Any] = {
    "tuned": {"loss": 1.5, "perplexity": None, "stop_rate": 0.875, "accuracy": 0.5},
    "difference": {
        "loss": {"value": -0.5, "interval": [-0.7, -0.3]}, "stop_rate": {"value": 0.25},
    },
    "benchmarks": {
        "scores": [
            {"task": "arc_easy", "metric": "acc", "filter": "none", "base": 0.4, "tuned": 0.45},
            {"task": "v1.2", "metric": "f1", "filter": "strict", "base": 0.8, "tuned": 0.7},
            {"task": "v1.2", "metric": "f1", "filter": "loose", "base": 0.9, "tuned": 0.9},
        ],
    },
    "judge": {"win_rate": 0.6, "model": "gpt"},
    "method": {"fewest": 6}, "gate": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "met"),
    [
        ("better", True), ("loss<2", True), ("loss<1.5", False), ("loss<=1.5", True), ("loss>1e0", True),
        ("stop_rate >= 0.9", False), ("better, stop_rate>=.8", True), ("better,accuracy>0.5", False),
        ("stop_rate_difference>0.2", True), ("loss_difference<-0.6", False), ("perplexity<8", False),
        ("benchmarks.arc_easy.acc>0.42", True), ("benchmarks.arc_easy.acc>0.45", False),
        ("benchmarks.v1.2.f1>0.7", False), ("benchmarks.other.acc>0", False),
        ("judge.win_rate>0.5", True), ("judge.model>0", False),
    ],
)  # fmt: skip
def test_verdicts(asked: str, met: bool) -> None:
    found = gate.judge(RESULT, asked)
    assert found is not None
    assert found["met"] == met
    if met:
        gate.enforce(RESULT | {"gate": found})
        return
    with pytest.raises(GateFailed) as refused:
        gate.enforce(RESULT | {"gate": found})
    assert refused.value.exit_code == 82
    for condition in found["conditions"]:
        assert (condition["words"] in refused.value.message) == (not condition["met"])


def test_a_refusal_names_value_and_bound() -> None:
    with pytest.raises(GateFailed, match=r"loss is 1\.5, asked is <1;") as refused:
        gate.enforce(RESULT | {"gate": gate.judge(RESULT, "loss<1,better,perplexity<8")})
    assert "perplexity was not measured, asked is <8" in refused.value.message
    assert "interval" not in refused.value.message


@pytest.mark.parametrize(
    ("interval", "words"),
    [([-0.7, 0.1], "-0.7000 to +0.1000"), ([0.1, 0.2], "asked is an interval below 0"),
     (None, "fewer than 6 held-out conversations"), ([-0.5, 0.0], "below 0")],
)  # fmt: skip
def test_better_needs_an_interval_below_0(interval: Any, words: str) -> None:
    result = RESULT | {"difference": {"loss": {"value": -0.5, "interval": interval}}}
    found = gate.judge(result, "better")
    assert found is not None
    assert not found["met"]
    assert words in found["conditions"][0]["words"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("los<2", "Did you mean loss?"), ("beter", "Did you mean better?"), ("loss", "neither"),
        ("loss<x", "'x', the bound of loss"), ("loss<nan", "not a finite number"), ("loss<inf", "finite"),
        ("", "neither"), ("better,", "neither"), ("benchmarks>1", "no metric"), ("loss==2", "neither"),
        ("loss<2<3", "neither"), ("tuned.loss<2", "no metric"), ("stop_rat>=1", "Did you mean stop_rate?"),
    ],
)  # fmt: skip
def test_what_is_no_gate_is_refused(asked: str, words: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        gate.Gate().convert(asked, None, None)
    assert words in str(refused.value)


def test_a_gate_is_kept_as_it_was_asked_for() -> None:
    assert gate.Gate().convert(" better , loss < 2 ", None, None) == "better,loss < 2"
    assert gate.judge(RESULT, None) is None
    gate.enforce(RESULT)


@pytest.mark.case("H9")
def test_what_will_not_be_measured_is_refused_at_once() -> None:
    for asked in ("better", "stop_rate>0,loss<2", "accuracy_difference>0"):
        with pytest.raises(BadSetting, match="VALIDATION_FRACTION"):
            gate.check_measured(asked, held_out=False, prompts=True)
    with pytest.raises(BadSetting, match="EVALUATION_PROMPTS"):
        gate.check_measured("better,stop_rate>0", held_out=True, prompts=False)
    gate.check_measured("better,loss<2", held_out=True, prompts=False)
    gate.check_measured("stop_rate>0,judge.win_rate>0.5", held_out=False, prompts=True)
    gate.check_measured(None, held_out=False, prompts=False)
