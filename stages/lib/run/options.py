"""Settings that more than one stage uses, declared once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stages.lib.run.preemption import GRACE_SECONDS
from stages.lib.run.progress import say
from stages.lib.run.settings import Decorator, setting
from stages.lib.run.values import Duration, Names, Number, Texts, flat

base_model = setting(
    "--base-model", "BASE_MODEL", required=True,
    help="Base model: hub id, folder, or `sample` (the embedded SmolLM2-135M-Instruct).",
)  # fmt: skip
base_revision = setting(
    "--base-revision", "BASE_REVISION", help="Commit, tag or branch of a hub base model."
)
expect_gpu = setting(
    "--expect-gpu", "EXPECT_GPU", is_flag=True, identity=False,
    help="A GPU was promised: where there is none, end with 75 instead of computing on the CPU.",
)  # fmt: skip
base_precision = setting(
    "--base-precision", "BASE_PRECISION", default="nf4",
    type=click.Choice(["nf4", "fp8", "int8", "bf16", "fp32", "auto"]),
    help="How the frozen base is held: nf4 in 4 bit, computing in bf16; fp8 in 8, on Ada, Hopper and newer; "
    "auto the fastest that fits.",
)  # fmt: skip
rank = setting(
    "--rank", "LORA_RANK", type=Number(int, low=1), default=16, help="Rank of the adapter."
)
targets = setting(
    "--targets", "LORA_TARGETS", type=Names(), default="q_proj,v_proj",
    help="Linear modules that get an adapter, or `all-linear`.",
)  # fmt: skip
optimizer = setting(
    "--optimizer", "OPTIMIZER", default="adamw_8bit", help="AdamW's state in 8 bit or whole.",
    type=click.Choice(["adamw_8bit", "paged_adamw_8bit", "adamw_torch"]),
)  # fmt: skip
seed = setting(
    "--seed",
    "SEED",
    type=Number(int, low=0, high=2**32 - 1),
    default=0,
    help="Seed of all that is random.",
)

max_rows = setting(
    "--max-rows", "MAX_ROWS", type=Number(int, low=1),
    help="Use only the first rows of each source. [default: all]",
)  # fmt: skip
max_length = setting(
    "--max-length", "MAX_LENGTH", type=Number(int, low=8), default=1024,
    help="Longest row, in tokens with EOS.",
)  # fmt: skip
validation_fraction = setting(
    "--validation-fraction", "VALIDATION_FRACTION", type=Number(low=0, high=0.5), default=0.05,
    help="Share of rows held out, unless the data set has a test split of its own.",
)  # fmt: skip

run_dir = setting(
    "--run-dir", "RUN_DIR", type=click.Path(path_type=Path), identity=False,
    is_eager=True,  # known before another setting is refused, so that the refusal is recorded there
    default=Path("runs/default"), help="Folder of the run: its artifacts and checkpoints.",
)  # fmt: skip
beside = setting(
    "--run-dir", "RUN_DIR", "beside", type=click.Path(path_type=Path), identity=False,
    default=Path("runs/default"), help="A run: without FOLDER, what lies beside it is looked at.",
)  # fmt: skip
force = setting("--force", "FORCE", help="Redo a finished stage.", is_flag=True, identity=False)
verify = setting(
    "--verify", "VERIFY", help="Hash every input and finished file again.", is_flag=True, identity=False
)  # fmt: skip
allow_stale = setting(
    "--allow-stale", "ALLOW_STALE", help="Accept inputs made from other settings.", is_flag=True, identity=False
)  # fmt: skip
max_runtime = setting(
    "--max-runtime", "MAX_RUNTIME", type=Duration(), identity=False,
    help="Stop by itself before so much time is over, with 75: seconds, or as in 90m or 12h.",
)  # fmt: skip
grace_seconds = setting(
    "--grace-seconds", "GRACE_SECONDS", type=Number(above=0), default=GRACE_SECONDS, identity=False,
    help="From a stop signal to the end, at most; less than what the service waits.",
)  # fmt: skip


stall_minutes = setting(
    "--stall-minutes", "STALL_MINUTES", type=Number(low=0), default=30, identity=False,
    help="End with 75 and all stacks when nothing is finished for so long; 0 waits for ever.",
)  # fmt: skip


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every stage has."""
    for decorate in (
        stall_minutes, grace_seconds, max_runtime, force,
    ):  # fmt: skip
        command = decorate(command)
    return reading_options(command)


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that reads a run and makes nothing in it."""
    for decorate in (verify, allow_stale, run_dir):
        command = decorate(command)
    return command


def max_new_tokens(default: int) -> Decorator:
    """The length limit of an answer, whose default differs by stage."""
    return setting(
        "--max-new-tokens", "MAX_NEW_TOKENS", type=Number(int, low=1), default=default,
        help="Longest answer, in tokens.",
    )  # fmt: skip


def speaking(default_tokens: int) -> Decorator:
    """How the tuned model answers: the format, what it draws from, and what ends an answer."""

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorate in reversed(_speaking(default_tokens)):
            command = decorate(command)
        return command

    return decorated


def _speaking(default_tokens: int) -> list[Decorator]:
    return [
        setting("--system", "SYSTEM", help="What stands before the conversation."),
        setting(
            "--temperature", "TEMPERATURE", type=Number(low=0), default=0.0,
            help="What scores are divided by before one token is drawn; 0 takes the likeliest.",
        ),
        setting(
            "--top-p", "TOP_P", type=Number(above=0, high=1), default=1.0,
            help="Draw among the likeliest tokens that have this probability together.",
        ),
        setting(
            "--top-k", "TOP_K", type=Number(int, low=0), default=0,
            help="Draw among so many of the likeliest tokens; 0 is all.",
        ),
        setting(
            "--repetition-penalty", "REPETITION_PENALTY", type=Number(above=0), default=1.0,
            help="Makes what has been said less likely; 1 changes nothing.",
        ),
        setting(
            "--stop", "STOP", type=Texts(), multiple=True, callback=flat,
            help='Text that ends an answer, beside what the format has; repeated, or a list: `["a", "b\\n"]`.',
        ),
        max_new_tokens(default_tokens),
        setting(
            "--chat-format", "CHAT_FORMAT", default="auto",
            help="auto is the format of the training; another is refused.",
        ),
        setting(
            "--force-format", "FORCE_FORMAT", is_flag=True,
            help="Use CHAT_FORMAT although the adapter was trained with another.",
        ),
        seed,
    ]  # fmt: skip


DRAWN = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


def drawn(settings: dict[str, Any]) -> dict[str, Any]:
    """What a `Sampling` is made of; says where it would change nothing."""
    idle = [name.upper() for name, off in (("top_k", 0), ("top_p", 1)) if settings[name] != off]
    if idle and settings["temperature"] == 0:
        say(f"TEMPERATURE is 0, so {' and '.join(idle)} change nothing")
    return {name: settings[name] for name in DRAWN}
