"""How fast the GPU multiplies at a model's own shapes: the ceiling of any training on it.

    python bench/train_ceiling.py FOLDER bf16    # or fp8: e4m3, one scale a row

The products are those of one decoder layer, forward, and backward to the input: the base is frozen,
so nothing is multiplied for its own gradient. Numbers are random: zeros would go faster. They run
for SECONDS, because a GPU that was idle is faster for a moment than it is for an hour. Prints one
JSON line.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, SECONDS, TURNS = 8192, 4.0, 20


def shapes(config: dict[str, int]) -> list[tuple[int, int]]:
    """Inputs and outputs of each frozen weight of a layer, as q, k, v, o, gate, up, down."""
    hidden, inner, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head = config.get("head_dim") or hidden // heads
    keys = head * config["num_key_value_heads"]
    attention = [(hidden, head * heads), (hidden, keys), (hidden, keys), (head * heads, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def product(precision: str, inputs: int, outputs: int) -> Callable[[], Any]:
    """One product of TOKENS rows with a weight, ready to run."""
    import torch

    x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    if precision == "bf16":
        return lambda: x @ weight.t()
    left, right = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    rows = torch.full((TOKENS, 1), 0.01, device="cuda")
    columns = torch.full((1, outputs), 0.01, device="cuda")
    return lambda: torch._scaled_mm(
        left, right.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def main(folder: str, precision: str) -> None:
    """Multiply for SECONDS, after a quarter of that to warm up."""
    import torch

    both = [
        way
        for inputs, outputs in shapes(json.loads((Path(folder) / "config.json").read_text()))
        for way in ((inputs, outputs), (outputs, inputs))
    ]
    products = [product(precision, *way) for way in both]
    turns, begun = 0, 0.0
    for counted in (False, True):
        torch.cuda.synchronize()
        turns, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < SECONDS * (1 if counted else 0.25):
            for _ in range(TURNS):
                for multiply in products:
                    multiply()
            torch.cuda.synchronize()
            turns += TURNS
    flops = sum(2 * TOKENS * inputs * outputs for inputs, outputs in both)
    found = {
        "tflops": round(turns * flops / (time.perf_counter() - begun) / 1e12, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
