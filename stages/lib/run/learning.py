"""How a run learns: the settings of `train`, which `plan` takes too, declared once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stages.lib.run import options
from stages.lib.run.settings import setting
from stages.lib.run.values import Number

SETTINGS = (
    options.base_model,
    options.base_revision,
    options.base_precision,
    options.rank,
    setting(
        "--alpha",
        "LORA_ALPHA",
        type=Number(above=0),
        default=16,
        help="The adapter is scaled by alpha / rank.",
    ),
    setting(
        "--dropout",
        "LORA_DROPOUT",
        type=Number(low=0, high=0.99),
        default=0.05,
        help="On the adapter's input.",
    ),
    options.targets,
    setting(
        "--init-adapter",
        "INIT_ADAPTER",
        type=click.Path(path_type=Path),
        help="Adapter folder to start from.",
    ),
    setting(
        "--learning-rate",
        "LEARNING_RATE",
        type=Number(above=0),
        default=2e-4,
        help="Peak learning rate.",
    ),
    setting(
        "--epochs",
        "EPOCHS",
        type=Number(above=0),
        default=1,
        help="Passes over the data; may be a fraction.",
    ),
    setting(
        "--max-steps",
        "MAX_STEPS",
        type=Number(int, low=1),
        help="Optimizer steps, instead of EPOCHS.",
    ),
    setting(
        "--schedule",
        "SCHEDULE",
        type=click.Choice(["cosine", "linear", "constant"]),
        default="cosine",
        help="Learning rate after the warm-up.",
    ),
    setting(
        "--warmup",
        "WARMUP",
        type=Number(low=0, high=0.99),
        default=0.03,
        help="Share of the steps.",
    ),
    setting(
        "--max-grad-norm",
        "MAX_GRAD_NORM",
        type=Number(above=0),
        default=1.0,
        help="Longer gradients are cut.",
    ),
    setting(
        "--weight-decay",
        "WEIGHT_DECAY",
        type=Number(low=0),
        default=0,
        help="Decoupled, on the adapter.",
    ),
    options.optimizer,
    setting(
        "--batch-tokens",
        "BATCH_TOKENS",
        type=Number(int, low=1),
        default=16384,
        help="Tokens a step.",
    ),
    setting(
        "--micro-batch-tokens",
        "MICRO_BATCH_TOKENS",
        type=Number(int, low=1),
        help="Tokens a forward pass; BATCH_TOKENS is a multiple. [default: the largest that fits]",
    ),
    setting(
        "--recompute",
        "RECOMPUTE",
        default="auto",
        type=click.Choice(["auto", "all", "none", "offload"]),
        help="Gradient checkpointing: activations computed again; offload has part of them in the "
        "host's memory instead; auto does what memory asks for.",
    ),
    options.seed,
    setting(
        "--num-gpus",
        "NUM_GPUS",
        type=Number(int, low=1),
        default=1,
        identity=False,
        help="GPUs of this host that share each step's tokens; on the CPU, processes.",
    ),
    setting(
        "--sharding",
        "SHARDING",
        type=click.Choice(["auto", "none", "full"]),
        default="auto",
        identity=False,
        help="Of several GPUs each has a part of the base (full) or all of it (none); auto: a part where all "
        "does not fit.",
    ),
)


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of them."""
    for decorate in reversed(SETTINGS):
        command = decorate(command)
    return command
