"""How far plans were off: of runs that were measured for `bench/`, and of those that lie beside this one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.model import plan, speed
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.plan import Choice
from stages.lib.run import artifact, cards
from stages.lib.run.cards import Card
from stages.lib.run.exits import BadData

SHOWN = 8  # runs, the latest
# Of an adapter's metrics: what `train` records.
RECORDED = (
    "predicted_gpu_bytes", "peak_gpu_bytes", "predicted_tokens_per_second", "tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Past:
    """A run that is over: bytes and tokens/s as they were predicted, and as they were; None is not known."""

    name: str
    predicted_bytes: float | None
    peak_bytes: float | None
    predicted_speed: float | None
    speed: float | None
    facts: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def memory_off(self) -> float | None:
        """Percent that the prediction is above what was measured."""
        return _off(self.predicted_bytes, self.peak_bytes)

    @property
    def speed_off(self) -> float | None:
        """Percent that the prediction is above what was measured."""
        return _off(self.predicted_speed, self.speed)


def _off(predicted: float | None, measured: float | None) -> float | None:
    return 100 * (predicted / measured - 1) if predicted and measured else None


def of_run(
    config: Mapping[str, Any], run: Mapping[str, Any]
) -> tuple[Architecture, Setup, Card, speed.Rows, Choice]:
    """What the plan is given of a measured run."""
    shape, card = Architecture.of(config), cards.known(run["gpu"])
    assert shape
    assert card
    # Where nothing is computed twice, an NF4 base was dequantised once.
    once = not run["recomputed_layers"] and not run["offloaded_layers"]
    setup = Setup(
        run["precision"], run["rank"], tuple(run["targets"].split(",")),
        unpacked=run["precision"] == "nf4" and once,
    )  # fmt: skip
    choice = Choice(run["pass_tokens"], run["recomputed_layers"], offloaded=run["offloaded_layers"])
    return shape, setup, card, speed.Rows([run["row_tokens"]]), choice


def measured() -> list[Past]:
    """The runs behind the plan's figures, predicted as another would be."""
    found = []
    told = speed.measured()
    for run in told["runs"]:
        shape, setup, card, rows, choice = of_run(told["config"], run)
        memory = plan.predict(shape, setup, choice.tokens, choice.recomputed, choice.offloaded)
        fast = speed.tokens_per_second(
            shape, setup, card, rows, choice, run["batch_tokens"], run["gpus"]
        )
        name = f"{run['script']} {run['workload']} {run['precision']}"
        found.append(
            Past(
                name,
                memory.total,
                run["peak_gib"] * 2**30,
                fast,
                run["tokens_per_second"],
                facts=run,
            )
        )
    return found


def beside(run_dir: Path) -> list[Past]:
    """The finished runs in the folder that a run directory lies in, if they were planned; the latest first."""
    folders = run_dir.absolute().parent.glob("*/adapter/manifest.json")
    found = []
    for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[:SHOWN]:
        try:
            made = artifact.load(path.parent)
        except BadData:
            continue  # whoever uses that run is told
        if made:
            values = (_number(made.metrics.get(name)) for name in RECORDED)
            found.append(Past(path.parent.parent.name, *values))
    return [run for run in found if (run.memory_off, run.speed_off) != (None, None)]


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None


def spread(found: Sequence[float | None]) -> tuple[float, float] | None:
    """The least and the most of those that are known."""
    known = [value for value in found if value is not None]
    return (min(known), max(known)) if known else None
