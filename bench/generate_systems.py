"""What `bench.generate` measures: one system a process, because compilers and caches stay.

    python -m bench.generate_systems SYSTEM MODEL CONVERSATIONS.jsonl

Prints a JSON line for each workload. transformers gets the adapter in bf16
(`autocast_adapter_dtype=False`), which is faster than peft's default, and merged, where it says so.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ONE, FILE = "one", "file"
SYSTEMS = {
    "lora-stages bf16": (ONE, FILE), "lora-stages FP8": (ONE, FILE), "lora-stages NF4": (ONE, FILE),
    "transformers": (ONE, FILE), "transformers, static cache, compiled": (ONE,),
    "transformers, static cache, compiled, merged": (ONE,),
    "transformers, continuous batching": (FILE,),
}  # fmt: skip
PROMPTS, LONGEST, ONE_PROMPT = 256, 512, 100
FEW = 8  # prompts without a GPU, for a look at the script
NEW = {ONE: 256, FILE: 128}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")
Answer = Callable[[list[list[int]], int], int]


class Everything:
    """A tokenizer that is asked for nothing, and stops that never come: all answers have their full length."""

    pad, texts, ids = 0, (), (-1,)

    def decode(self, ids: Any) -> str:
        """Nothing."""
        return ""


def prompts(model: Path, data: Path) -> list[list[int]]:
    """Token ids of the first questions of conversations."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with data.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    count = PROMPTS if torch.cuda.is_available() else FEW
    asked = [text.split("### Assistant:")[0] + "### Assistant:" for text in texts[:count]]
    return [found.ids[-LONGEST:] for found in tokenizer.encode_batch(asked)]


def adapter(model: Path) -> Path:
    """An adapter whose B is not zero, made once."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = model / "adapter"
    if not folder.is_dir():
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        config = LoraConfig(
            r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(base, config).to_empty(device="cpu")
        torch.manual_seed(0)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def ours(precision: str, model: Path) -> Answer:
    """Our own decoder, as the stage has it."""
    from stages.lib.model import adapter as adapters
    from stages.lib.model import load
    from stages.lib.model.answer import Speaker
    from stages.lib.model.base import Base

    base = Base(str(model), None)
    base.fetch()
    tuned = adapters.load(load.load(base, precision), adapter(model), base)
    speaker = Speaker(tuned, precision, Everything(), Everything(), 1)  # type: ignore[arg-type]
    if not speaker.decoding and torch.cuda.is_available():
        raise RuntimeError(str(speaker.remarks))

    def answer(asked: list[list[int]], new: int) -> int:
        speaker.max_new_tokens = new
        return sum(one.tokens for _, one in speaker.each(asked))

    return answer


def theirs(system: str, model: Path) -> Answer:
    """transformers' generate."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place = "cuda" if torch.cuda.is_available() else "cpu"
    found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(place)
    found = PeftModel.from_pretrained(found, str(adapter(model)), autocast_adapter_dtype=False)
    if "merged" in system:
        found = found.merge_and_unload()
    found.eval()
    fixed: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if "static" in system:
        fixed["cache_implementation"] = "static"

    def answer(asked: list[list[int]], new: int) -> int:
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked], device=place)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked], device=place)
        with torch.no_grad():
            out = found.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **fixed
            )
        return int((out.shape[1] - longest) * len(asked))

    def continuously(asked: list[list[int]], new: int) -> int:
        from transformers import GenerationConfig

        inner = found.get_base_model()
        inner.set_attn_implementation("paged|sdpa")
        config = GenerationConfig(
            max_new_tokens=new, eos_token_id=-1, pad_token_id=0, do_sample=False
        )
        out = inner.generate_batch(inputs=asked, generation_config=config)
        return sum(len(one.generated_tokens) for one in out.values())

    return continuously if "continuous" in system else answer


def main() -> None:
    """Measure the system that was named."""
    system, model, data = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    asked = prompts(model, data)
    if system.startswith("lora-stages"):
        answer = ours(system.rpartition(" ")[2].lower(), model)
    else:
        answer = theirs(system, model)
    one = (asked[0] * ONE_PROMPT)[:ONE_PROMPT]
    for workload in SYSTEMS[system]:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            count = answer([one] if workload == ONE else asked, NEW[workload])
            seconds.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        found = {
            "workload": workload, "tokens": count, "tokens_per_second": round(count / seconds[1], 1),
            "first_seconds": round(seconds[0], 2), "seconds": round(seconds[1], 3),
            "peak_gib": round(peak / 2**30, 2),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES if _is(name)},
        }  # fmt: skip
        print(json.dumps(found), flush=True)


def _is(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


if __name__ == "__main__":
    main()
