"""When the numbers of a step are read, and how its time is measured."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from stages.lib.model.conduct import Conduct
from stages.lib.model.pace import Pace, counter
from stages.lib.model.pending import Moment, Numbers
from stages.lib.model.quick import Quick
from stages.lib.run.exits import Diverged
from stages.lib.run.progress import Progress
from tests.decoders import PLAIN, QUICK, make


class Steps:
    """Eight steps of ten tokens; 2, 4, 6 and 8 are evaluated."""

    class plan:  # noqa: N801
        steps = 8

    def work(self, step: int) -> tuple[int, int]:
        return 10, 1000 + step


class Loop:
    """Trainer's calls of one step after the other, with the numbers of each."""

    def __init__(self, folder: Path) -> None:
        self.arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
        self.state, self.control = TrainerState(), TrainerControl()
        self.values = torch.zeros(2)
        steps: Any = Steps()
        self.conduct = Conduct(
            steps, True, lambda *_: None, Progress(8, "steps"), lambda: self.values,
            lambda step, loss, more: {"more": [step, *more]},
        )  # fmt: skip
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (done + 1))

    def step(self, loss: float, norm: float) -> list[int]:
        """Hand over a step; the steps that are in the log behind it."""
        self.values = torch.tensor([loss, norm])
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
    assert loop.state.log_history == [
        {"loss": step, "grad_norm": 2 * step, "learning_rate": 0.5 / step, "step": step}
        for step in range(1, 6)
    ]


@pytest.mark.parametrize(("loss", "norm"), [(torch.nan, 1.0), (1.0, torch.inf)])
def test_numbers_that_are_none_end_the_run_one_step_late_under_their_own_step(
    tmp_path: Path, loss: float, norm: float
) -> None:
    loop = Loop(tmp_path)
    loop.step(1, 1)
    loop.step(1, 1)
    loop.step(loss, norm)
    with pytest.raises(Diverged, match="step 3 is not finite"):
        loop.step(1, 1)
    assert [entry["step"] for entry in loop.state.log_history] == [1, 2]


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
