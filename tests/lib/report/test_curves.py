"""Curves: what a history has is drawn, restarts are where attempts change, and what it lacks is no plot."""

import math

from stages.lib.report import curves
from stages.lib.report.curves import Training
from tests.lib.report.runs import steps


def test_a_restart_is_where_another_attempt_went_on() -> None:
    assert [m.at for m in curves.restarts(Training(steps()))] == [21, 41]
    assert curves.restarts(Training(steps(restarts=()))) == []
    old = Training(steps(recorded=False), resumed=40)
    assert [m.at for m in curves.restarts(old)] == [40]
    for draw in (curves.learning_rate, curves.gradient, curves.losses):
        plot = draw([old])
        assert plot
        assert [m.at for m in plot.marks] == [40]


def test_older_runs_have_fewer_plots() -> None:
    old, new = (Training(steps(recorded=recorded)) for recorded in (False, True))
    for draw in (curves.throughput, curves.memory):
        assert draw([old]) is None
        assert draw([new])
        assert draw([old, new])
    assert curves.clock(old) is None
    assert curves.loss(old)
    assert curves.loss(Training([])) is None


def test_no_step_is_made_between_two_attempts() -> None:
    plot = curves.clock(Training(steps()))
    assert plot
    (line,) = plot.series
    pauses = [(a, b) for a, b in zip(line.points, line.points[1:], strict=False) if b[1] == a[1]]
    assert [step for (_, step), _ in pauses] == [20, 40]
    assert plot.x.startswith("minutes since 2025-11-24 16:00 UTC")
    assert all(round(b[0] - a[0]) == 15 for a, b in pauses)
    assert len(plot.marks) == 2


def test_the_mean_is_told_apart_from_the_steps() -> None:
    plot = curves.loss(Training(steps(), best=60))
    assert plot
    assert [(s.name, s.faint) for s in plot.series] == [
        ("loss of a step", True), ("mean of 5 steps", False), ("held-out loss", False),
    ]  # fmt: skip
    assert "mean of 5 steps" in plot.note
    assert plot.rings == [(60, 1.4)]
    few = curves.loss(Training(steps(10)))
    assert few
    assert [s.name for s in few.series] == ["loss of a step"]


def test_a_loss_that_is_no_number_is_counted_and_not_drawn() -> None:
    past = steps(10)
    past[4]["loss"], past[5]["loss"] = math.nan, math.inf
    plot = curves.losses([Training(past)])
    assert plot
    assert "2 steps had no finite loss" in plot.note
    assert "between 1.3 and 4" in plot.alt


def test_a_prediction_is_a_line_beside_what_was_measured() -> None:
    plot = curves.memory([Training(steps(), predicted={"gpu_bytes": 22 * 2**30})])
    assert plot
    assert plot.y == "GiB"
    measured, predicted = plot.series
    assert predicted.name == "predicted"
    assert {y for _, y in predicted.points} == {22}
    assert math.floor(measured.points[0][1]) == 20


def test_a_tip_says_what_a_step_was() -> None:
    plot = curves.loss(Training(steps()))
    assert plot
    told = dict(plot.tips)
    assert told[20].splitlines()[0] == "step 20"
    assert "loss 1.1500" in told[20]
    assert "held-out loss 1.8000" in told[20]
    assert "9,020 tokens/s" in told[20]
    assert "UTC" in told[20]
