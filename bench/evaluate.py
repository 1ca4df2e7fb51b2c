"""How fast `evaluate` reads held-out rows, beside the forward pass that training makes of the same bins.

`python -m bench.evaluate`, from the root of the repository, on a machine with one GPU; about two minutes. One
model in memory, of the shape of Llama 2 7B with random weights and an adapter of rank 16 on q and v, made quick
once:

- `training`: its forward pass as a training step makes it, loss included: in training mode, with dropout,
  keeping what its backward pass would read. Bins are laid out and on the device before the clock starts.
- `tuned` and `base`: the whole of what `evaluate` does with the same rows, laying them out included.

Rows have random tokens and lengths like those of conversations. Everything is read once before it is measured,
which compiles it. Prints one JSON object with real tokens a second of each, the median of the repetitions.
"""

import contextlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click
import numpy as np

from bench.train import hardware
from bench.train_model import SHAPES, VOCABULARY, made

MEAN, SPREAD, LEAST, MOST = 5.8, 0.75, 24, 2048  # of the lengths: lognormal, 427 tokens on average
RANK, DROPOUT = 16, 0.05
LENT = ("torch", "transformers", "peft", "bitsandbytes")


class RandomRows:
    """Rows as `evaluate` takes them, `total` tokens or a little more, their first fifth not learned."""

    def __init__(self, total: int, longest: int) -> None:
        generator = np.random.default_rng(0)
        lengths = np.exp(generator.normal(MEAN, SPREAD, total // LEAST)).astype(np.int64)
        lengths = lengths.clip(LEAST, longest)
        self.lengths = lengths[: int(np.searchsorted(lengths.cumsum(), total)) + 1]
        self.rows = [
            (generator.integers(3, VOCABULARY, n), np.arange(n) >= n // 5) for n in self.lengths
        ]
        self.trained = np.array([int(mask.sum()) for _, mask in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


def model(shape: str, precision: str) -> Any:
    """A tuned Llama with random weights, its base in this precision."""
    from peft import LoraConfig, get_peft_model

    from stages.lib.model import fp8

    base = made(shape).requires_grad_(False)
    if precision == "fp8":
        fp8.convert(base)
    elif precision == "nf4":
        quantise(base)
    targets = ["q_proj", "v_proj"]
    return get_peft_model(base, LoraConfig(r=RANK, lora_dropout=DROPOUT, target_modules=targets))


def quantise(base: Any) -> None:
    """Every projection in NF4, double quantised, as transformers does it."""
    import bitsandbytes as bnb
    import torch

    for parent in list(base.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                made = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, compute_dtype=torch.bfloat16
                )
                made.weight = bnb.nn.Params4bit(
                    child.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=made
                )
                made.support_avx512bf16_for_cpu = False
                setattr(parent, name, made.to(child.weight.device).requires_grad_(False))


def clocked(work: Callable[[], object]) -> float:
    """Seconds on the device from what stood before to the end of `work`."""
    import torch

    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def forward(scorer: Any, batches: list[dict[str, Any]]) -> None:
    """The forward pass of training steps over bins, one after the other; its graph is dropped."""
    from stages.lib.model import load
    from stages.lib.model.loss import nll_sum

    scorer.tuned.train()
    for number, batch in enumerate(batches):
        scorer.quick.seed.fill_(number)
        with load.compute(scorer.precision):
            nll_sum(scorer.tuned, batch)
    scorer.tuned.eval()


@click.command()
@click.option("--shape", default="7b", show_default=True, type=click.Choice(list(SHAPES)))
@click.option(
    "--precision", default="fp8", show_default=True, type=click.Choice(["fp8", "nf4", "bf16"])
)
@click.option("--tokens", default=16384, show_default=True, help="Of a bin.")
@click.option("--bins", default=12, show_default=True, help="How many are read.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
def main(shape: str, precision: str, tokens: int, bins: int, repeat: int) -> None:
    """Measure it, and print one JSON object."""
    import torch

    from stages.lib.model import load
    from stages.lib.model.loss import held_out_bins, lay_out, to
    from stages.lib.model.scoring import Scorer

    began = time.perf_counter()
    rows = RandomRows(tokens * bins, min(MOST, tokens // 2))
    tuned = model(shape, precision)
    seconds: dict[str, list[float]] = {"training": [], "tuned": [], "base": []}
    with Scorer(tuned, precision, rows.lengths, tokens) as scorer:
        cut = held_out_bins(rows.lengths, scorer.tokens)
        batches = [to(lay_out([rows[n] for n in b], scorer.shape), load.device()) for b in cut]
        works: dict[str, Callable[[], object]] = {
            "training": lambda: forward(scorer, batches),
            "tuned": lambda: scorer.sums(rows, True),
            "base": lambda: scorer.sums(rows, False),
        }
        for turn in range(repeat + 1):
            for name, work in works.items():
                took = clocked(work)
                if turn:  # the first compiles
                    seconds[name].append(took)
        remarks, compiles = scorer.quick.remarks, scorer.quick.compiles
    speeds = {
        name: round(int(rows.lengths.sum()) / statistics.median(all_), 1)
        for name, all_ in seconds.items()
    }
    versions: dict[str, str] = {}
    for name in LENT:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    click.echo(json.dumps({
        "shape": shape, "precision": precision, "bin_tokens": scorer.tokens, "bins": len(cut),
        "rows": len(rows), "tokens": int(rows.lengths.sum()), "tokens_per_second": speeds,
        "share_of_training": {n: round(speeds[n] / speeds["training"], 3) for n in ("tuned", "base")},
        "seconds": {name: [round(one, 4) for one in all_] for name, all_ in seconds.items()},
        "compiled": compiles, "remarks": remarks, "hardware": hardware(), "versions": versions,
        "peak_gib": round((torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0) / 2**30, 2),
        "date": datetime.now(UTC).date().isoformat(), "wall_seconds": round(time.perf_counter() - began, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
