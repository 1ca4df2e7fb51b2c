"""The rate at which this GPU multiplies large matrices: what training is held against."""

import time
from collections.abc import Callable, Sequence

import torch

from stages.lib.model import fp8

SIDE, SECONDS, TURN = 8192, 0.3, 20
TYPES = {"fp8": torch.bfloat16, "fp32": torch.float32}  # all others compute in bf16
Multiply = Callable[[], torch.Tensor]


def product(precision: str, rows: int, inputs: int, outputs: int) -> Multiply:
    """A product of activations [rows, inputs] with a weight, in the type of such a base, ready to run.

    The numbers are random: zeros would go faster.
    """
    kind = TYPES.get(precision, torch.bfloat16)
    x = torch.randn(rows, inputs, device="cuda", dtype=kind)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=kind)
    if precision != "fp8":
        return lambda: x @ weight.t()
    left, right = fp8.quantise(x), fp8.quantise(weight)
    return lambda: fp8.product(*left, *right, torch.bfloat16)


def turns(products: Sequence[Multiply], seconds: float, times: int = TURN) -> list[float]:
    """Seconds of each turn of all products so many times, for `seconds`, after a quarter of that to warm up."""
    found: list[float] = []
    for share in (0.25, 1.0):
        found = []
        torch.cuda.synchronize()
        while sum(found) < seconds * share:
            began = time.perf_counter()
            for _ in range(times):
                for multiply in products:
                    multiply()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
    return found


def highest(precision: str) -> float | None:
    """FLOP/s of large products in this precision, the best turn; None without a GPU, or without room on it."""
    if not torch.cuda.is_available():
        return None
    try:
        best = min(turns([product(precision, SIDE, SIDE, SIDE)], SECONDS))
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return 2 * SIDE**3 * TURN / best


def share(rate: float | None, ceiling: float | None, gpus: int = 1) -> float | None:
    """Of the ceiling of so many GPUs, where both are known."""
    return round(rate / ceiling / gpus, 4) if rate and ceiling else None
