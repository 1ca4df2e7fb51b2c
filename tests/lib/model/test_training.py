"""The arithmetic of a step: packing, accumulation, recompute, dropout, resume."""

import json
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.lib.data.bins import Schedule
from stages.lib.model import load, recipe, training
from stages.lib.model.loss import held_out_bins, lay_out, mean_nll, nll_sum
from stages.lib.model.quick import Quick
from stages.lib.run import checkpoints, preemption
from stages.lib.run.exits import Diverged, TryAgain
from stages.lib.run.fields import MEASURED

RECIPE = {
    "learning_rate": 1e-2, "schedule": "constant", "warmup": 0, "max_grad_norm": 1.0, "weight_decay": 0,
    "optimizer": "adamw_torch", "seed": 0,
}  # fmt: skip


def weights(tuned: Any) -> dict[str, torch.Tensor]:
    """The adapter as it stands."""
    return {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}


def run(
    tuned: Any,
    rows: Any,
    capacity: int,
    per_step: int,
    scratch: Path,
    steps: int = 3,
    **changed: Any,
) -> dict[str, torch.Tensor]:
    """Train some steps; the adapter afterwards."""
    precision = changed.pop("precision", "fp32")
    resume, saved = changed.pop("resume", None), changed.pop("saved", lambda *_: None)
    tracker = changed.pop("tracker", None)
    plan = Schedule(rows.lengths, capacity, per_step, 1, steps, 0)
    held_out = type(rows)(rows.rows[:2])
    quick = Quick(tuned, precision)
    quick.arrange(0)
    shape = quick.shape(rows.lengths, capacity)
    training.train(
        quick, plan, rows, held_out, shape, scratch, RECIPE | changed, resume=resume, saved=saved,
        tracker=tracker,
    )  # fmt: skip
    return weights(tuned)


def test_two_steps_of_two_rows_are_one_step_of_four(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    rows = some_rows(14, 10, 12, 8)
    apart = run(attach(), rows, 24, 2, tmp_path / "a")
    together = run(attach(), rows, 48, 1, tmp_path / "b")
    before = weights(attach())
    for name, tensor in apart.items():
        torch.testing.assert_close(tensor, together[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(apart[n], before[n]) for n in before)


def test_packed_rows_are_blind_to_each_other(
    attach: Callable[..., Any], some_rows: Callable[..., Any]
) -> None:
    rows, tuned = some_rows(5, 17, 1, 9, 30), attach()
    packed = nll_sum(tuned, lay_out([rows[i] for i in range(len(rows))]))
    alone = sum(nll_sum(tuned, lay_out([rows[i]])) for i in (0, 1, 3, 4))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


def test_the_loss_is_that_of_plain_transformers(
    attach: Callable[..., Any], some_rows: Callable[..., Any]
) -> None:
    (ids, mask), tuned = some_rows(23)[0], attach()
    labels = torch.tensor(np.where(mask, ids, -100))[None]
    plain = tuned(input_ids=torch.tensor(ids)[None], labels=labels).loss
    ours = nll_sum(tuned, lay_out([(ids, mask)])) / int(mask[1:].sum())
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_recompute_gives_the_same_gradients(
    attach: Callable[..., Any], some_rows: Callable[..., Any]
) -> None:
    found = []
    for again in (False, True):
        tuned = attach(dropout=0.1)
        if again:
            load.recompute(tuned)
        tuned.train()
        torch.manual_seed(7)
        nll_sum(tuned, lay_out([some_rows(40)[0]])).backward()
        found.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7)


def test_the_held_out_loss_is_the_mean_over_learned_tokens(
    attach: Callable[..., Any], some_rows: Callable[..., Any]
) -> None:
    rows, tuned = some_rows(12, 30, 7), attach()
    total = sum(nll_sum(tuned, lay_out([rows[i]])).item() for i in range(3))
    for capacity in (7, 40, 100):
        bins = held_out_bins(rows.lengths, capacity)
        assert sorted(chain(*bins)) == [0, 1, 2]
        mean = mean_nll(tuned, "fp32", ([rows[r] for r in b] for b in bins))
        assert mean == pytest.approx(total / rows.trained.sum(), rel=1e-5)


# Six steps of three bins, evaluated after 2, 3, 5 and 6 in one pass each: the pass that is behind when the stop
# is asked for, and what is saved by then.
STOPS = {
    "in the first step": (1, []),
    "in an evaluation": (6, []),
    "between two steps": (14, [2, 3, 4]),
    "in the middle of an accumulation": (15, [2, 3, 4]),
    "in a later evaluation": (17, [2, 3]),
    "in the last step": (20, [2, 3, 5]),
    "behind the last step": (21, [2, 3, 5]),
}
WHOLE: dict[tuple[str, str], dict[str, torch.Tensor]] = {}


@pytest.mark.promise("P3")
@pytest.mark.parametrize(
    ("precision", "optimizer", "where", "how"),
    [
        *(("fp8", "adamw_8bit", where, "the wall limit") for where in STOPS),
        ("fp32", "adamw_torch", "in the middle of an accumulation", "SIGTERM"),
        ("nf4", "paged_adamw_8bit", "in the middle of an accumulation", "SIGUSR1"),
        ("bf16", "adamw_8bit", "in the middle of an accumulation", "SIGINT"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path, precision: str,
    optimizer: str, where: str, how: str,
) -> None:  # fmt: skip
    """Dropout on, evaluated on the way, to the last bit."""
    rows = some_rows(*range(8, 28))
    options: dict[str, Any] = {"optimizer": optimizer, "precision": precision, "steps": 6}
    if (precision, optimizer) not in WHOLE:
        tuned = attach(precision, dropout=0.1, rank=16)
        WHOLE[precision, optimizer] = run(tuned, rows, 40, 3, tmp_path / "whole", **options)

    at, kept = STOPS[where]
    saved: list[Path] = []
    tuned, seen = attach(precision, dropout=0.1, rank=16), 0

    def stop(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == at and how == "the wall limit":
            preemption.request("MAX_RUNTIME is over")
        elif seen == at:
            signal.raise_signal(signal.Signals[how])

    hook = tuned.register_forward_hook(stop)
    preemption.listen()
    with pytest.raises(TryAgain, match="MAX_RUNTIME" if how == "the wall limit" else how):
        run(tuned, rows, 40, 3, tmp_path / "cut", saved=lambda f, *_: saved.append(f), **options)
    preemption.listen()
    hook.remove()
    assert [path.name for path in saved] == [f"checkpoint-{step}" for step in kept]

    tuned = attach(precision, dropout=0.1, rank=16)
    resume = saved[-1] if saved else None
    resumed = run(tuned, rows, 40, 3, tmp_path / "on", resume=resume, **options)
    for name, tensor in WHOLE[precision, optimizer].items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.case("A18")
@pytest.mark.parametrize(("takes", "kept"), [(0.0, ["checkpoint-2"]), (1e6, [])])
def test_no_checkpoint_is_begun_that_will_not_be_whole_in_time(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], takes: float, kept: list[str],
) -> None:  # fmt: skip
    """On a slow volume, after a stop was asked for, with two steps behind."""
    monkeypatch.setattr(checkpoints, "_slowest", takes)
    saved, tuned, seen = list[Path](), attach("fp32"), 0

    def stop(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 8:
            preemption.request("enough")

    tuned.register_forward_hook(stop)
    preemption.listen()
    with pytest.raises(TryAgain, match="enough"):
        run(
            tuned, some_rows(*range(8, 28)), 40, 3, tmp_path, steps=16,
            saved=lambda f, *_: saved.append(f),
        )  # fmt: skip
    preemption.listen()
    assert [path.name for path in saved] == kept
    assert ("step 2 is not saved: that took 1000000 s before" in capsys.readouterr().err) == bool(
        takes
    )


def log(checkpoint: Path) -> list[dict[str, Any]]:
    """What a checkpoint remembers of the steps, without evaluations."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [
        {name: value for name, value in entry.items() if name not in MEASURED}
        for entry in state["log_history"] if "loss" in entry
    ]  # fmt: skip


def test_every_checkpoint_has_all_steps_before_it_after_a_resume_too(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    rows, folders = some_rows(*range(8, 28)), dict[str, Path]()

    def saved(folder: Path, *_: object) -> None:
        folders[f"{folder.parent.name}/{folder.name}"] = folder

    run(attach(), rows, 40, 3, tmp_path / "whole", steps=6, saved=saved)
    resumed = folders["whole/checkpoint-3"]
    run(attach(), rows, 40, 3, tmp_path / "on", steps=6, saved=saved, resume=resumed)
    assert list(folders) == [
        "whole/checkpoint-2", "whole/checkpoint-3", "whole/checkpoint-5", "whole/checkpoint-6",
        "on/checkpoint-5", "on/checkpoint-6",
    ]  # fmt: skip
    whole = log(folders["whole/checkpoint-6"])
    for name, folder in folders.items():
        found = log(folder)
        step = int(name.rpartition("-")[2])
        assert [entry["step"] for entry in found] == list(range(1, step + 1))
        assert found == whole[:step]
    assert len({entry["loss"] for entry in whole}) == 6
    assert all(entry["grad_norm"] > 0 for entry in whole)
    assert {entry["learning_rate"] for entry in whole} == {RECIPE["learning_rate"]}


class Told:
    """A tracker that writes down what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str]] = []

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *error: object) -> None:
        self.entries.append((0, "end"))

    def note(self, step: int, entry: dict[str, Any]) -> None:
        self.entries.append((step, "loss" if "loss" in entry else "held-out"))

    def catch_up(self) -> None:
        self.entries.append((0, "save"))


def test_a_tracker_is_told_of_each_step_and_evaluation_once_and_before_each_checkpoint(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    told = Told()
    run(attach(), some_rows(*range(8, 28)), 40, 3, tmp_path, steps=4, tracker=told)
    wanted: list[tuple[int, str]] = []
    for step in range(1, 5):
        wanted += [(step, "loss"), (step, "held-out"), (0, "save")]
    assert told.entries == [*wanted, (0, "end")]


def test_the_logged_loss_is_the_mean_over_a_steps_learned_tokens(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    rows, last = some_rows(14, 10, 12, 8), list[Path]()
    tuned = attach()
    total = sum(float(nll_sum(tuned, lay_out([rows[i]])).detach()) for i in range(4))
    run(attach(), rows, 24, 2, tmp_path, steps=1, saved=lambda f, *_: last.append(f))
    assert log(last[0])[0]["loss"] == pytest.approx(total / rows.trained.sum(), rel=1e-5)


# Of six steps, 2, 3, 5 and 6 are evaluated and saved.
@pytest.mark.case("E7")
@pytest.mark.promise("P4")
@pytest.mark.parametrize(
    ("bad", "kept"), [(1, []), (2, []), (4, [2, 3]), (5, [2, 3]), (6, [2, 3, 5])]
)
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_is_kept_of_a_gradient_that_is_not_finite(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path, bad: int,
    kept: list[int], stopped: bool,
) -> None:  # fmt: skip
    """Nor by a signal, on which a step is saved that nobody has looked at yet; nor in memory."""
    saved: list[Path] = []
    tuned, steps = attach(), 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if stopped and steps == bad:
            signal.raise_signal(signal.SIGTERM)
        return gradient * torch.nan if steps == bad else gradient

    next(p for n, p in tuned.named_parameters() if "lora_B" in n).register_hook(spoil)
    rows = some_rows(*range(8, 28))
    preemption.listen()
    with pytest.raises(Diverged, match=f"gradient of step {bad} is not finite") as caught:
        run(tuned, rows, 40, 1, tmp_path, steps=6, saved=lambda f, *_: saved.append(f))
    preemption.listen()
    assert [path.name for path in saved] == [f"checkpoint-{step}" for step in kept]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [p.name for p in saved]
    for path in saved:
        for tensor in load_file(path / "adapter_model.safetensors").values():
            assert torch.isfinite(tensor).all()
    wanted = Schedule(rows.lengths, 40, 1, 1, 6, 0).rows(bad - 1).tolist()
    expected = [{"bin": 0, "row": row} for row in wanted]
    assert caught.value.facts == {"step": bad, "bins": [0], "rows": expected}
    before = run(attach(), rows, 40, 1, tmp_path / "on", steps=bad - 1) if bad > 1 else None
    for name, tensor in (before or weights(attach())).items():
        assert torch.equal(tensor, weights(tuned)[name]), name


@pytest.mark.case("E7")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
def test_a_loss_that_is_not_finite_names_its_step_and_rows_though_its_gradient_is(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path, optimizer: str
) -> None:
    """The second bin of the second of three steps."""
    rows, tuned, seen = some_rows(*range(8, 28)), attach(rank=16), 0

    def spoil(model: Any, inputs: object, loss: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += model.training
        return loss + torch.nan if model.training and seen == 5 else loss

    hook = tuned.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="the loss after step 2 is not finite; lower") as caught:
        run(tuned, rows, 40, 3, tmp_path / "bad", optimizer=optimizer)
    hook.remove()
    wanted = [{"bin": 1, "row": r} for r in Schedule(rows.lengths, 40, 3, 1, 3, 0).rows(4).tolist()]
    assert caught.value.facts == {"step": 2, "bins": [1], "rows": wanted}
    before = run(attach(rank=16), rows, 40, 3, tmp_path, steps=1, optimizer=optimizer)
    for name, tensor in before.items():
        assert torch.equal(tensor, weights(tuned)[name]), name


@pytest.mark.case("E7")
def test_weights_that_are_no_numbers_end_the_run(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    tuned = attach()
    with torch.no_grad():
        next(p for n, p in tuned.named_parameters() if "lora_A" in n)[0, 0] = torch.inf
    with pytest.raises(Diverged, match="the loss after step 1 is not finite; lower LEARNING_RATE"):
        run(tuned, some_rows(20), 20, 1, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_adapter_that_an_update_threw_out_of_range_is_not_saved(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    """Its losses and gradients were finite, and there is nothing to evaluate it on."""
    rows = some_rows(20)
    plan = Schedule(rows.lengths, 20, 1, 1, 1, 0)
    quick = Quick(attach(), "fp32")
    quick.arrange(0)
    recipe = RECIPE | {"learning_rate": 1e10, "weight_decay": 1e30}  # beyond fp32 together
    with pytest.raises(Diverged, match="the adapter after step 1 is not finite"):
        training.train(
            quick, plan, rows, type(rows)([]), quick.shape(rows.lengths, 20), tmp_path, recipe,
            resume=None, saved=lambda *_: None,
        )  # fmt: skip
    assert not list(tmp_path.glob("checkpoint-*/*"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_step_has_a_learning_rate(schedule: str) -> None:
    """Trainer's own schedules give the first step of a warm-up none."""
    for steps in (1, 2, 10, 100):
        rates = [recipe.learning_rate(schedule, 0.1, done, steps) for done in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        assert max(rates) == 1
        peak = rates.index(1)
        assert rates[:peak] == sorted(rates[:peak])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
