"""What a run's settings are to Trainer: its arguments, and the learning rate of each step."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from stages.lib.model import load


def learning_rate(schedule: str, warmup: float, done: int, steps: int) -> float:
    """The share of the peak learning rate that the next step has.

    Args:
        schedule: `cosine` or `linear`, to 0 behind the last step, or `constant`. warmup: share of the steps.
        done: steps that are behind.
    """
    rising = math.ceil(warmup * steps)
    if done < rising:
        return (done + 1) / rising
    left = max(steps - done, 0) / max(steps - rising, 1)
    return {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}[
        schedule
    ]


def arguments(scratch: Path, slots: int, precision: str, **given: Any) -> TrainingArguments:
    """Trainer's arguments from our settings; `slots`: passes of an optimizer step.

    Saving, evaluating and logging are the callback's, and gradients are cut in the optimizer: where Trainer
    does it, the host waits for the GPU.
    """
    found = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=slots,
        num_train_epochs=1,  # of `Bins`, which holds the whole run
        learning_rate=given["learning_rate"],
        max_grad_norm=0,
        weight_decay=given["weight_decay"],
        optim=given["optimizer"],
        seed=given["seed"],
        bf16=precision != "fp32",
        use_cpu=load.device().type == "cpu",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    found._n_gpu = min(found.n_gpu, 1)  # else Trainer splits a batch over all GPUs that it sees
    return found
