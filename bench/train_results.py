"""What the results of `bench.train` say.

A result's share of the ceiling is its speed by that of the arithmetic alone, at the rate that
`bench/train_ceiling.py` reaches: 4 operations for each frozen weight and token, 6 for each of the
adapter's, and causal attention. With an FP8 base the products with the layers' weights count at the
FP8 rate, all others at that of bf16. What is computed a second time, to save memory, does not count.
"""

from typing import Any

from bench.train_ceiling import shapes

CEILING, START = "ceiling", "start"
SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
RANK = 16
TITLES = {
    "dense": "full rows of 2,048 tokens",
    "all-linear": "the same, all seven projections",
    "small": "the same as the first, small memory, 16k tokens a step",
    "conversations": "real conversations",
    START: "from the start of the process to the second step",
    CEILING: "products at the model's shapes",
}


def operations(config: dict[str, Any], targets: str, rows: list[int]) -> dict[str, float]:
    """GFLOP a token, of the products with frozen weights in the layers and of all others.

    Args:
        config: of the model. targets: names of modules with an adapter, with commas. rows: their tokens.
    """
    weights = dict(zip(SEVEN.split(","), shapes(config), strict=True))
    layers = config["num_hidden_layers"]
    frozen = layers * sum(inputs * outputs for inputs, outputs in weights.values())
    head = config["hidden_size"] * config["vocab_size"]
    lora = layers * sum(RANK * sum(weights[name]) for name in targets.split(","))
    # Scores and sums over half of the pairs: 2 products forward, 5 backward, of 2 operations each.
    pairs = sum(length**2 for length in rows) / sum(rows) / 2
    attention = layers * 7 * 2 * weights["q_proj"][1] * pairs
    return {"frozen": 4 * frozen / 1e9, "other": (4 * head + 6 * lora + attention) / 1e9}


def with_shares(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results, each with its share of the ceiling where that is known."""
    rates = {r["system"]: r["tflops"] for r in results if r["workload"] == CEILING}
    for result in results:
        base = "FP8" if result["system"].endswith("FP8") else "bf16"
        if "gflop_per_token" in result and {base, "bf16"} <= rates.keys():
            needs = result["gflop_per_token"]
            seconds = (needs["frozen"] / rates[base] + needs["other"] / rates["bf16"]) / 1e3
            result["share_of_ceiling"] = round(result["tokens_per_second"] * seconds, 3)
    return results


def merge(
    old: list[dict[str, Any]], new: dict[str, Any], order: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Results with a new one, which replaces that of its workload and system, in the given order."""
    key = new["workload"], new["system"]
    kept = [r for r in old if (r["workload"], r["system"]) != key]
    return with_shares(
        sorted([*kept, new], key=lambda r: order.index((r["workload"], r["system"])))
    )


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| | system | tokens/s | peak GiB | of the ceiling |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    shown = ""
    for result in (r for r in results if r["workload"] not in (CEILING, START)):
        title = TITLES[result["workload"]]
        share = f"{result['share_of_ceiling']:.0%}" if "share_of_ceiling" in result else ""
        lines.append(
            f"| {title if title != shown else ''} | {result['system']} | {result['tokens_per_second']:,.0f} "
            f"| {result['peak_gib']:.1f} | {share} |"
        )
        shown = title
    return "\n".join(lines)
