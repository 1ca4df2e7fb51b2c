"""What a run will take, before it is paid for: memory by part, which GPUs have it, how long, what it costs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stages.lib.model import carrying, cutting, known, plan, speed
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.base import Base
from stages.lib.model.plan import Choice
from stages.lib.report import past
from stages.lib.report.amount import Amount
from stages.lib.run.cards import Card
from stages.lib.run.exits import BadSetting

SCHEMA = 1
HOST = 1 << 60  # bytes, where offloading is asked for: how much it takes is told
PRECISIONS = ("nf4", "fp8", "int8", "bf16", "fp32")
MILLION = 1_000_000
Prices = Callable[[Card], float | None]


@dataclass(frozen=True)
class Order:
    """A base, what is trained in it, and how the work may be cut.

    Args:
        where: its config is from. cuts: tokens of a pass that may be, from the largest. gpus: share a step.
    """

    base: str
    where: str
    shape: Architecture
    kind: str
    setup: Setup
    cuts: Sequence[int]
    batch_tokens: int
    recompute: str
    gpus: int

    @property
    def trainable(self) -> int:
        """Elements of the adapter."""
        return plan.adapter_parameters(self.shape, self.setup)

    @property
    def parameters(self) -> int:
        """Elements of the base's matrices."""
        return self.shape.frozen + self.shape.words


def architecture(base: Base, targets: Sequence[str]) -> Architecture:
    """The sizes of a consulted base.

    Raises:
        BadSetting: it is none that can be planned for, or lacks a module that is to be adapted.
    """
    config = known.filled(base.config)
    shape, kind = Architecture.of(config), config.get("model_type")
    experts = next((name for name in known.EXPERTS if config.get(name)), None)
    if experts or not shape:
        why = f"experts ({experts})" if experts else "other sizes in its config"
        raise BadSetting(
            f"{base.name} cannot be planned for: {kind} has {why}, and the plan counts decoders like Llama; "
            "name another base, or let `train` find out what fits"
        )
    absent = [name for name in targets if name not in (*shape.projections, "all-linear")]
    if absent and kind in known.COUNTED:
        has = ", ".join(shape.projections)
        raise BadSetting(
            f"LORA_TARGETS names {absent[0]}, which this base has not; it has {has}, or all-linear"
        )
    return shape


@dataclass(frozen=True)
class Fit:
    """A run on one kind of GPU; without a choice it does not fit, and `why` says so.

    Attributes:
        least: bytes that it takes at the least, where that is too much.
        seconds: of the whole run, start and evaluations counted. cost: of that on all its GPUs.
        million, million_cost: the same of a million tokens alone.
    """

    card: Card
    setup: Setup
    choice: Choice | None = None
    why: str = ""
    least: int | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    cost: float | None = None
    million: float | None = None
    million_cost: float | None = None

    def facts(self, shape: Architecture) -> dict[str, Any]:
        """For programs."""
        cut, memory = self.choice, self.choice and self.choice.memory
        host = cut and cut.tokens * carrying.host(shape, self.setup, cut.offloaded, cut.lean)
        return {
            "gpu": self.card.name, "gigabytes": self.card.gigabytes, "fits": cut is not None,
            "why_not": self.why or None, "base_precision": self.setup.precision,
            "dequantised_once": self.setup.unpacked, "pass_tokens": cut and cut.tokens,
            "recomputed_layers": cut and cut.recomputed, "offloaded_layers": cut and cut.offloaded,
            "bytes": memory and memory.total, "bytes_by_part": memory and asdict(memory),
            "bytes_planned_for": room(self.card), "host_bytes": host,
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second, 1),
            "seconds": self.seconds and round(self.seconds, 1), "cost": _cents(self.cost),
            "seconds_per_million_tokens": self.million and round(self.million, 2),
            "cost_per_million_tokens": _cents(self.million_cost),
        }  # fmt: skip


def _cents(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def room(card: Card) -> int:
    """Bytes of a card that are planned for, as `train` does."""
    return int(cutting.SHARE * card.room)


def fit(order: Order, card: Card, amount: Amount, price: float | None) -> Fit:
    """What a run is on a kind of GPU; `price`: of an hour of one."""
    spare = HOST if order.recompute == "offload" else 0
    space, setup = room(card), order.setup
    if setup.precision == "auto":
        names = cutting.possible(card.lacks)
        args = (order.shape, setup, order.cuts, space, order.recompute)
        setup = replace(
            setup, precision="fp32" if names == ["fp32"] else plan.precision(*args, names, spare)
        )
    if why := card.lacks(setup.precision):
        return Fit(card, setup, why=why.removeprefix(f"{card.name} "))
    setup = cutting.unpacked(order.shape, setup, order.cuts, space, order.recompute)
    found = plan.choices(order.shape, setup, order.cuts, space, order.recompute, spare)
    if not found:
        least = _least(order, setup)
        said = f"takes {least / 2**30:.1f} GiB at the least, and {space / 2**30:.1f} can be planned for"
        return Fit(card, setup, why=said, least=least)
    fast = speed.tokens_per_second(
        order.shape, setup, card, amount.rows, found[0], order.batch_tokens, order.gpus
    )
    if not fast:
        return Fit(card, setup, found[0])
    seconds = amount.work and speed.measured()["start_seconds"] + amount.work / fast
    rate = None if price is None else price * order.gpus / 3600
    return Fit(
        card, setup, found[0], tokens_per_second=fast, seconds=seconds,
        cost=rate and seconds and rate * seconds, million=MILLION / fast,
        million_cost=rate and rate * MILLION / fast,
    )  # fmt: skip


def _least(order: Order, setup: Setup) -> int:
    size, layers = order.cuts[-1], order.shape.layers
    if order.recompute == "offload":
        least = plan.offloading(order.shape, setup, size, layers).memory
    else:
        least = plan.predict(order.shape, setup, size, 0 if order.recompute == "none" else layers)
    assert least
    return least.total


def memory(order: Order) -> list[dict[str, Any]]:
    """Bytes by part of every size of a pass in every precision, with all kept, and with all computed again."""
    found = []
    setups = [replace(order.setup, precision=name, unpacked=False) for name in PRECISIONS]
    setups.insert(1, replace(setups[0], unpacked=True))
    for setup in setups:
        for size in order.cuts:
            kept, again = (
                plan.predict(order.shape, setup, size, layers) for layers in (0, order.shape.layers)
            )
            found.append(
                {"base_precision": setup.precision, "dequantised_once": setup.unpacked, "pass_tokens": size}
                | {name: getattr(kept, name) for name in ("weights", "adapter", "optimizer", "loss")}
                | {"activations": kept.activations, "activations_recomputed": again.activations}
                | {"total": kept.total, "total_recomputed": again.total}
            )  # fmt: skip
    return found


def errors(run_dir: Path) -> dict[str, Any]:
    """How far such plans were off, in percent: of the runs that they rest on, and of those beside a run."""
    based, beside = past.measured(), past.beside(run_dir)
    return {
        "measured_runs": len(based),
        "memory_percent": past.spread([run.memory_off for run in based]),
        "speed_percent": past.spread([run.speed_off for run in based]),
        "beside": [
            {
                "run": run.name, "predicted_gpu_bytes": run.predicted_bytes, "peak_gpu_bytes": run.peak_bytes,
                "memory_percent": run.memory_off, "predicted_tokens_per_second": run.predicted_speed,
                "tokens_per_second": run.speed, "speed_percent": run.speed_off,
            }
            for run in beside
        ],
    }  # fmt: skip


def facts(
    order: Order, amount: Amount, fits: Sequence[Fit], off: dict[str, Any], said: dict[str, Any]
) -> dict[str, Any]:
    """All of it for programs; `said`: what a person is told of it, in sentences."""
    setup = order.setup
    return {
        "schema": SCHEMA,
        **said,
        "base": {"name": order.base, "config_from": order.where, "model_type": order.kind,
                 "parameters": order.parameters},
        "adapter": {"rank": setup.rank, "targets": list(setup.targets), "parameters": order.trainable,
                    "optimizer": setup.optimizer},
        "batch_tokens": order.batch_tokens, "recompute": order.recompute, "num_gpus": order.gpus,
        "amount": amount.facts(),
        "gpus": [found.facts(order.shape) for found in fits],
        "memory": memory(order),
        "off": off,
    }  # fmt: skip
