"""When the numbers of a step are read, and how its time is measured."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from stages.lib.model.account import Account
from stages.lib.model.conduct import Conduct, check_level
from stages.lib.model.pace import Pace, counter
from stages.lib.model.pending import Moment, Numbers
from stages.lib.model.quick import Quick
from stages.lib.run.exits import Diverged
from stages.lib.run.fields import MEASURED
from tests.decoders import PLAIN, QUICK, make


class Steps:
    """Eight steps of ten tokens; 2, 4, 6 and 8 are evaluated."""

    class plan:  # noqa: N801
        steps = 8

        @staticmethod
        def step(number: int) -> range:
            return range(2 * number, 2 * number + 2)

    def work(self, step: int) -> tuple[int, int]:
        return 10, 1000 + step

    def places(self, step: int, bins: Any) -> list[dict[str, Any]]:
        return [{"bin": place, "row": 10 * step + place} for place in bins]


class Loop:
    """Trainer's calls of one step after the other, with the numbers of each."""

    def __init__(self, folder: Path) -> None:
        self.arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
        self.state, self.control = TrainerState(), TrainerControl()
        self.values = torch.zeros(2)
        steps: Any = Steps()
        self.conduct = Conduct(
            steps, True, lambda *_: None, Account(8, attempt=3), lambda: self.values,
            lambda step, loss, more: {"more": [step, *more]}, words=1000,
        )  # fmt: skip
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (done + 1))

    def step(self, loss: float, norm: float) -> list[int]:
        """Hand over a step of two bins, the second with all its loss; the steps in the log behind it."""
        self.values = torch.tensor([loss, norm, 0, loss])
        given: Any = (self.arguments, self.state, self.control)
        self.conduct.on_optimizer_step(*given, lr_scheduler=self.scheduler)
        self.scheduler.optimizer.step()
        self.scheduler.step()
        self.state.global_step += 1
        self.conduct.on_step_end(*given)
        self.control.should_save = self.control.should_evaluate = False
        return [entry["step"] for entry in self.state.log_history]


def test_a_steps_numbers_are_read_behind_the_next_or_before_a_checkpoint(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    seen = [loop.step(step, 2 * step) for step in range(1, 6)]
    assert seen == [[], [1, 2], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4]]
    loop.conduct.settle(loop.state)
    for entry in loop.state.log_history:
        assert entry["attempt"] == 3
        assert abs(entry["at"] - time.time()) < 60
        assert entry["tokens_per_second"] > 0
        assert ("gpu_bytes" in entry) == torch.cuda.is_available()
    assert [without_times(entry) for entry in loop.state.log_history] == [
        {"loss": step, "grad_norm": 2 * step, "learning_rate": 0.5 / step, "step": step}
        for step in range(1, 6)
    ]


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in MEASURED}


@pytest.mark.parametrize(("loss", "norm"), [(torch.nan, 1.0), (1.0, torch.inf)])
def test_numbers_that_are_none_end_the_run_one_step_late_under_their_own_step(
    tmp_path: Path, loss: float, norm: float
) -> None:
    loop = Loop(tmp_path)
    loop.step(1, 1)
    loop.step(1, 1)
    loop.step(loss, norm)
    with pytest.raises(Diverged, match="step 3 is not finite") as caught:
        loop.step(1, 1)
    bins = [1] if loss != 1 else [0, 1]  # a norm does not say which
    rows = [{"bin": place, "row": 20 + place} for place in bins]
    assert caught.value.facts == {"step": 3, "bins": bins, "rows": rows}
    assert [entry["step"] for entry in loop.state.log_history] == [1, 2]


def entries(*losses: float) -> list[dict[str, Any]]:
    """A log, with an evaluation behind every step."""
    found: list[dict[str, Any]] = []
    for number, loss in enumerate(losses):
        found += [{"step": number + 1, "loss": loss}, {"step": number + 1, "eval_loss": 99.0}]
    return found


@pytest.mark.case("E8")
@pytest.mark.parametrize("before", [[2.0] * 5, [2.0] * 200, [2.0, 40.0, 2.0, 2.0, 40.0]])
def test_a_loss_that_leaves_its_level_for_good_ends_the_run(before: list[float]) -> None:
    """ln 1000 is 6.9, and three times the level 6."""
    check_level(entries(*before, *[7.0] * 19), 1000)
    with pytest.raises(Diverged, match=r"above 6\.91 in all of the last 20 steps") as caught:
        check_level(entries(*before, *[7.0] * 20), 1000)
    assert caught.value.facts == {"step": len(before) + 20}


@pytest.mark.case("E8")
@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 30 + [7.0] * 19 + [5.0] + [7.0] * 19,  # comes back
        [2.0] * 30 + [6.8] * 20,  # no worse than guessing
        [4.0] * 30 + [11.0] * 20,  # less than three times its level
        [2.0] * 4 + [50.0] * 20,  # has no level yet
        [50.0] * 100,  # is its level
    ],
)
def test_a_loss_that_is_merely_high_does_not(losses: list[float]) -> None:
    for end in range(1, len(losses) + 1):
        check_level(entries(*losses[:end]), 1000)


@pytest.mark.case("E8")
def test_the_loop_looks_at_the_level_of_every_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.state.log_history = entries(*[1.0] * 30, *[9.0] * 19)
    loop.step(9.0, 1.0)
    with pytest.raises(Diverged, match="it diverged; lower LEARNING_RATE"):
        loop.step(9.0, 1.0)


def test_numbers_are_those_of_their_moment() -> None:
    values = torch.tensor([1.5, 2.5])
    numbers = Numbers(7, 1e-4, values)
    values.zero_()
    assert numbers.read() == (1.5, 2.5)
    assert (numbers.step, numbers.learning_rate) == (7, 1e-4)


def test_a_pace_leaves_out_the_first_steps_and_what_lies_between() -> None:
    pace = Pace()
    for step, seconds in enumerate((0.2, 0.1, 0.01, 0.03, 0.02)):
        time.sleep(seconds)
        pace.add(10, 500, Moment())
        if step == 3:
            time.sleep(0.1)  # an evaluation
            pace.begin()
    found = pace.metrics()
    assert found["step_seconds"] == pytest.approx(0.02, abs=0.008)
    assert found["train_seconds"] == pytest.approx(0.36, abs=0.04)
    assert found["tokens_per_second"] == pytest.approx(30 / 0.06, rel=0.3)
    assert found["model_flops_per_second"] == pytest.approx(1500 / 0.06, rel=0.3)


def test_of_one_step_alone_its_own_time_counts() -> None:
    pace = Pace()
    time.sleep(0.02)
    pace.add(10, 0, Moment())
    found = pace.metrics()
    assert found["step_seconds"] == pytest.approx(0.02, abs=0.01)
    assert found["model_flops_per_second"] is None


@pytest.mark.parametrize("precision", ["fp32", "fp8", "nf4"])
def test_operations_are_counted_in_every_precision(attach: Any, precision: str) -> None:
    tuned = attach(precision)
    before = counter(tuned)([40, 24], 50)
    Quick(tuned, precision)
    assert before == counter(tuned)([40, 24], 50) > 0
    assert before == counter(attach("fp32"))([40, 24], 50)


@pytest.mark.parametrize("described", [QUICK["phi"], PLAIN["gpt2"][0]])
def test_a_model_of_other_products_is_not_counted(described: Any) -> None:
    """Phi has the sizes of a Llama in its config, but no gate; GPT-2 has neither."""
    assert counter(make(described))([40, 24], 50) == 0
