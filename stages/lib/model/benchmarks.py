"""Benchmarks of base and tuned model in one load: the adapter switched off and on."""

import importlib.metadata
import math
import random
from collections.abc import Iterator
from typing import Any

from stages.lib.model.tasks import Chat, Tasks, quiet
from stages.lib.run.parts import Done, afresh

# The harness' own, so that a number here is the number there.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
RESAMPLED = 1000  # times, for the error of what is no mean


def run(
    tuned: Any, tokens: Any, precision: str, tasks: Tasks, limit: int | None, chat: Chat | None,
    done: Done = afresh,
) -> dict[str, Any]:  # fmt: skip
    """Ask the tasks of both sides.

    Args:
        tuned: the model with its adapter. tasks: from `stages.lib.model.tasks.prepare`.
        limit: documents of each task; None is all.
        chat: to put them as conversations in the format of the training data. done: see `Parts.of`.

    Returns:
        `harness` (its version), `limit`, `chat`, `seeds`; `truncated`: requests that lost their beginning;
        `scores`: for each task, metric and filter `base`, `tuned`, `difference`, each with its `_stderr` (None
        where none is known), `higher_is_better`, `documents`, `shots`, `version` and `group`.
    """
    from lm_eval.evaluator import evaluate

    from stages.lib.model.harness import Harness

    with quiet():
        harness = Harness(tuned, tokens, precision, chat, done)
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        sides = {}
        for side in ("base", "tuned"):
            _seed(tasks)
            with harness.ask_as(side):
                # `simple_evaluate` would ask git, gcc and the hub besides.
                sides[side] = evaluate(
                    harness,
                    tasks,
                    limit=limit,
                    bootstrap_iters=RESAMPLED,
                    apply_chat_template=chat is not None,
                    fewshot_as_multiturn=chat is not None,
                )
            sides[side]["truncated"] = harness.truncated
    return {
        "harness": f"lm-eval {importlib.metadata.version('lm_eval')}",
        "limit": limit,
        "chat": chat is not None,
        "seeds": SEEDS,
        "truncated": sides["base"]["truncated"],
        "scores": list(_scores(sides["base"], sides["tuned"])),
    }


def _seed(tasks: Tasks) -> None:
    import numpy
    import torch

    random.seed(SEEDS["random"])
    numpy.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _scores(base: dict[str, Any], tuned: dict[str, Any]) -> Iterator[dict[str, Any]]:
    groups = {
        member: group
        for group, members in base["group_subtasks"].items()
        for member in members
        if group in base.get("groups", {})
    }
    for task, measured in base["results"].items():
        for key, value in measured.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or _number(value) is None:
                continue
            other = _number(tuned["results"][task].get(key))
            error = f"{metric}_stderr,{chosen}"
            yield {
                "task": task,
                "group": groups.get(task),
                "metric": metric,
                "filter": chosen,
                "higher_is_better": base["higher_is_better"].get(task, {}).get(metric),
                "base": _number(value),
                "base_stderr": _number(measured.get(error)),
                "tuned": other,
                "tuned_stderr": _number(tuned["results"][task].get(error)),
                "difference": None if other is None else other - float(value),
                "difference_stderr": _paired_error(base, tuned, task, metric, chosen),
                "documents": measured["sample_len"],
                "shots": base["n-shot"].get(task),
                "version": base["versions"].get(task),
            }


def _number(value: Any) -> float | None:
    """A value as JSON holds it; the harness writes N/A where it has none."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if known else None


def _paired_error(
    base: dict[str, Any], tuned: dict[str, Any], task: str, metric: str, chosen: str
) -> float | None:
    """Standard error of the difference, over what each document gained, where the score is a mean of them."""
    sides = []
    for side in (base, tuned):
        values = {
            sample["doc_id"]: _number(sample.get(metric))
            for sample in side["samples"].get(task, [])
            if sample["filter"] == chosen
        }
        score = _number(side["results"][task].get(f"{metric},{chosen}"))
        numbers = [value for value in values.values() if value is not None]
        if len(numbers) < 2 or len(numbers) < len(values) or score is None:
            return None
        if not math.isclose(sum(numbers) / len(numbers), score, abs_tol=1e-9):
            return None
        sides.append(values)
    apart = [float(sides[1][n] or 0) - float(value or 0) for n, value in sides[0].items()]
    mean = sum(apart) / len(apart)
    return math.sqrt(sum((x - mean) ** 2 for x in apart) / (len(apart) - 1) / len(apart))
