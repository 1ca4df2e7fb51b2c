"""What `bench.train` measures beside the stage; one peer a process, because they patch what they import.

    python bench/train_peers.py {notebook,trl,unsloth} --model FOLDER --rows ROWS.json --out FOLDER

- notebook, the classic recipe: Trainer, PEFT and bitsandbytes, rows padded to the longest of a batch.
- trl: its trainer with Liger's kernels over the same model.
- unsloth: its model and its patches of TRL; `--packing` lays rows end to end, as the stage does.

All have an NF4 base, doubly quantised, that computes in bf16; adapters of rank 16 with dropout 0.05;
8-bit AdamW; loss on all tokens, logged at every step. ROWS.json is a list of rows of token ids.
Prints one JSON line: real (not padding) tokens a second after the first three steps, the peak of
what tensors held from the third step on, and the time at the end of the second step.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import time
from typing import Any

PEERS = ("notebook", "trl", "unsloth")
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger_kernel", "unsloth",
    "unsloth_zoo", "xformers", "triton",
)  # fmt: skip
WARM_STEPS = 3


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    for name in ("model", "rows", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--packing", action="store_true")
    return parser.parse_args()


def adapted(given: argparse.Namespace) -> Any:
    """The peer's model in NF4 with its adapter."""
    import torch

    targets = given.targets.split(",")
    if given.peer == "unsloth":
        from unsloth import FastLanguageModel

        base, _ = FastLanguageModel.from_pretrained(
            given.model, max_seq_length=given.length, load_in_4bit=True, dtype=torch.bfloat16
        )
        return FastLanguageModel.get_peft_model(
            base, r=16, lora_alpha=16, target_modules=targets, lora_dropout=0.05, bias="none",
            use_gradient_checkpointing="unsloth" if given.checkpointing else False,
        )  # fmt: skip
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    place = 0 if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.bfloat16, device_map={"": place}, quantization_config=four_bit
    )
    if given.peer == "notebook":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=given.checkpointing)
    lora = LoraConfig(
        r=16, lora_alpha=16, target_modules=targets, lora_dropout=0.05, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora)


def trainer_of(given: argparse.Namespace, model: Any, rows: list[list[int]]) -> Any:
    """The peer's trainer over rows, which are tokenised already."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    columns: dict[str, Any] = {"input_ids": rows}
    if not given.packing:
        columns |= {"labels": rows, "attention_mask": [[1] * len(row) for row in rows]}
    data, tokenizer = Dataset.from_dict(columns), AutoTokenizer.from_pretrained(given.model)
    common = {
        "output_dir": given.out, "per_device_train_batch_size": given.batch, "max_steps": given.steps,
        "gradient_accumulation_steps": 1,  # Unsloth's own default is 2
        "learning_rate": 2e-4, "bf16": True, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "optim": "adamw_8bit", "remove_unused_columns": False,
        "gradient_checkpointing": given.checkpointing, "use_liger_kernel": given.peer == "trl",
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    if given.peer == "notebook":
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        padded = DataCollatorForSeq2Seq(tokenizer)
        settings = TrainingArguments(**common)
        return Trainer(model=model, args=settings, train_dataset=data, data_collator=padded)
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        **common, max_length=given.length, packing=given.packing,
        dataset_kwargs=None if given.packing else {"skip_prepare_dataset": True},
    )  # fmt: skip
    return SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)


def measure(given: argparse.Namespace, trainer: Any) -> dict[str, Any]:
    """Train, and say how it went."""
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []
    tokens = [0]  # of each step, whose passes may be several; the last has just begun
    gpu = torch.cuda.is_available()

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.time())
            tokens.append(0)
            if gpu and state.global_step == 2:
                torch.cuda.reset_peak_memory_stats()

    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        tokens[-1] += int((inputs["labels"] != -100).sum())
        return step(model, inputs, *rest, **options)

    trainer.training_step = counted
    trainer.add_callback(Clock())
    loss = trainer.train().training_loss
    return {
        "tokens_per_second": round(sum(tokens[WARM_STEPS:]) / (ends[-1] - ends[WARM_STEPS - 1]), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else 0.0,
        "second_step_at": ends[1], "loss": round(loss, 4), "steps": len(ends),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    """Train one peer and print what was measured."""
    given = arguments()
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if given.peer == "unsloth":
        import unsloth  # noqa: F401  # before transformers, which it patches
    with open(given.rows) as file:
        rows = [row[: given.length] for row in json.load(file)]
    rows *= -(-given.batch * given.steps * (8 if given.packing else 1) // len(rows))
    random.Random(0).shuffle(rows)
    found = measure(given, trainer_of(given, adapted(given), rows))
    print(json.dumps(found | {"versions": versions()}))


if __name__ == "__main__":
    main()
