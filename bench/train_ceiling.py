"""How fast the GPU multiplies at a model's own shapes: the ceiling of any training on it.

    python -m bench.train_ceiling FOLDER bf16    # or fp8: e4m3, one scale a row

The products are those of one decoder layer, forward, and backward to the input: the base is frozen,
so nothing is multiplied for its own gradient. Numbers are random: zeros would go faster. They run
for SECONDS, because a GPU that was idle is faster for a moment than it is for an hour. Prints one
JSON line.
"""

import json
import sys
from pathlib import Path

TOKENS, SECONDS = 8192, 4.0


def shapes(config: dict[str, int]) -> list[tuple[int, int]]:
    """Inputs and outputs of each frozen weight of a layer, as q, k, v, o, gate, up, down."""
    hidden, inner, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head = config.get("head_dim") or hidden // heads
    keys = head * config["num_key_value_heads"]
    attention = [(hidden, head * heads), (hidden, keys), (hidden, keys), (head * heads, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def main(folder: str, precision: str) -> None:
    """Multiply for SECONDS, after a quarter of that to warm up."""
    import torch

    from stages.lib.model.ceiling import TURN, product, turns

    both = [
        way
        for inputs, outputs in shapes(json.loads((Path(folder) / "config.json").read_text()))
        for way in ((inputs, outputs), (outputs, inputs))
    ]
    took = turns([product(precision, TOKENS, *way) for way in both], SECONDS)
    flops = TURN * sum(2 * TOKENS * inputs * outputs for inputs, outputs in both)
    found = {
        "tflops": round(flops * len(took) / sum(took) / 1e12, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
