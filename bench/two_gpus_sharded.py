"""What a base in parts on two GPUs costs, and what it makes possible, on a machine that has two.

`python -m bench.two_gpus_sharded`, from the root of the repository; no network. Rows are real conversations,
packed, all learned; dropout is 0.05; weights are random. Results are JSON, a line for each part:

- `large`: a Llama with the width of the 70B one, and as many layers as `--layers` says; 50 take 87 GB in bf16,
  which one GPU of 80 GB has not, in `--work` and in the host's memory. Ten steps with `SHARDING=auto`: GPU
  memory by part as predicted, and the peak of each GPU; tokens/s, losses, and seconds that the parts took to
  come from the files.
- `small`: the 7B shape in bf16, FP8 and NF4, with `SHARDING=none` and `full`: tokens/s, their ratio, and how
  far a step's losses are apart at most.

`--shape tiny` tries the script on a CPU. Each part takes about five minutes on two H100, most of them to write
and to compile; `--parts` chooses.
"""

import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench import conversations, train_model
from bench.conversations import ROOT
from bench.two_gpus import PASS, TwoGpus, apart, devices, losses, say

STEPS = 10
WRITERS = 8
POOL = (
    2**24
)  # random numbers, used again and again: drawing 40G of them would take longer than all the rest
# Hidden size, that of the MLP, heads, heads of keys.
WIDE = {"7b": (8192, 28672, 64, 8), "tiny": (64, 176, 4, 2)}


class Sharded(TwoGpus):
    """Runs `train` on two GPUs, with the whole base on each and with a part."""

    def found(self, precision: str, sharding: str, shape: str, rows: Path) -> dict[str, Any]:
        """What a run to its end says of itself."""
        chosen = self.settings(2, precision, shape) | {
            "SHARDING": sharding, "MAX_STEPS": str(STEPS)
        }  # fmt: skip
        began = time.monotonic()
        speed = self.ours(chosen, rows, watched=False)
        took = time.monotonic() - began
        metrics = json.loads((self.work / "run/adapter/manifest.json").read_text())["metrics"]
        names = (
            "sharding", "base_bytes", "base_bytes_here", "predicted_gpu_bytes", "predicted_gpu_parts",
            "peak_gpu_bytes_each", "step_seconds", "held_out_loss", "gpus",
        )  # fmt: skip
        brought = re.search(r"are on this GPU, after (\d+) s", (self.work / "log").read_text())
        return speed | {name: metrics.get(name) for name in names} | {
            "losses": losses(metrics), "wall_seconds": round(took, 1),
            "parts_came_in_seconds": int(brought[1]) if brought else None,
        }  # fmt: skip

    def make_large(self, shape: str, layers: int) -> dict[str, Any]:
        """Write a base of many layers, a file for each."""
        began = time.monotonic()
        self.model.mkdir()
        with self.data.open(encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        train_model.write_tokenizer(texts, str(self.model))
        size = write(self.model, *WIDE[shape], layers)
        return {"gigabytes": round(size / 1e9, 1), "seconds": round(time.monotonic() - began, 1)}


def sizes(width: int, wide: int, heads: int, shared: int) -> dict[str, tuple[int, ...]]:
    """Of a layer's tensors, by their names."""
    key = width // heads * shared
    return {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width), "mlp.down_proj": (width, wide),
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip


def write(folder: Path, width: int, wide: int, heads: int, shared: int, layers: int) -> int:
    """A Llama's config and weights in bf16; the bytes of these."""
    from transformers import LlamaConfig

    words = train_model.VOCABULARY
    LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, max_position_embeddings=4096,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    each = sizes(width, wide, heads, shared)
    files: dict[str, dict[str, tuple[int, ...]]] = {
        f"layer-{number:03}": {f"model.layers.{number}.{n}.weight": s for n, s in each.items()}
        for number in range(layers)
    }
    files["ends"] = {
        "model.embed_tokens.weight": (words, width), "lm_head.weight": (words, width),
        "model.norm.weight": (width,),
    }  # fmt: skip
    index = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    with multiprocessing.get_context("spawn").Pool(min(WRITERS, os.cpu_count() or 1)) as writers:
        total = sum(writers.imap_unordered(_write, [(folder / f, of) for f, of in files.items()]))
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    return total


def _write(job: tuple[Path, dict[str, tuple[int, ...]]]) -> int:
    """One file of random tensors; norms are 1. Its bytes."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    path, names = job
    generator = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
    pool = (torch.randn(POOL, generator=generator) * 0.02).bfloat16()
    tensors = {}
    for place, (name, size) in enumerate(names.items()):
        count = torch.Size(size).numel()
        drawn = pool.roll(place).repeat(-(-count // POOL))[:count].view(size)
        tensors[name] = drawn if len(size) > 1 else torch.ones_like(drawn)
    save_file(tensors, path.with_suffix(".safetensors"), {"format": "pt"})
    return path.with_suffix(".safetensors").stat().st_size


def large(bench: Sharded, shape: str, layers: int, precision: str, sharding: str) -> dict[str, Any]:
    """A base that one GPU may not have room for."""
    made = bench.make_large(shape, layers)
    rows = bench.rows("conversations")
    run = bench.found(precision, sharding, shape, rows)
    return {"precision": precision, "layers": layers, "model": made, "run": run}


def small(bench: Sharded, shape: str, precision: str, rows: Path) -> dict[str, Any]:
    """In parts beside whole."""
    runs = {name: bench.found(precision, name, shape, rows) for name in ("none", "full")}
    rates = {name: run["tokens_per_second"] for name, run in runs.items()}
    return {
        "precision": precision, "tokens_per_second": rates, "times": round(rates["full"] / rates["none"], 3),
        "apart": apart(runs["none"]["losses"], runs["full"]["losses"]), "runs": runs,
    }  # fmt: skip


@click.command()
@click.option("--shape", default="7b", show_default=True, type=click.Choice(list(PASS)))
@click.option("--parts", default="large,small", show_default=True)
@click.option("--layers", default=50, show_default=True, help="Of the large base.")
@click.option("--large-precision", default="bf16", show_default=True)
@click.option("--large-sharding", default="auto", show_default=True)
@click.option("--precisions", default="bf16,fp8,nf4", show_default=True, help="Of the small base.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="For the bases.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A line a part.")
@click.option("--limit", default=480.0, show_default=True, help="Seconds for a process.")
@conversations.option
def main(
    shape: str, parts: str, layers: int, large_precision: str, large_sharding: str, precisions: str,
    work: Path | None, output: Path | None, limit: float, data: Path,
) -> None:  # fmt: skip
    """Measure a base in parts; prints JSON, a line for each part."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    say("machine", {"gpus": devices(), "date": datetime.now(UTC).date().isoformat()}, output)
    for part in parts.split(","):
        with tempfile.TemporaryDirectory(prefix="bench-", dir=work) as name:
            folder = Path(name)
            bench = Sharded(folder, folder / "model", data.resolve(), sys.executable, limit)
            if part == "large":
                found = large(bench, shape, layers, large_precision, large_sharding)
                say("large", found, output)
                continue
            bench.make_model(shape)
            rows = bench.rows("conversations")
            for precision in precisions.split(","):
                say("small", small(bench, shape, precision, rows), output)


if __name__ == "__main__":
    main()
