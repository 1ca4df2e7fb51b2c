"""Settings that more than one stage uses, declared once."""

from stages.lib.run.settings import Decorator, setting
from stages.lib.run.values import Number

base_model = setting(
    "--base-model", "BASE_MODEL", required=True,
    help="Base model: hub id, folder, or `sample` (the embedded SmolLM2-135M-Instruct).",
)  # fmt: skip
base_revision = setting(
    "--base-revision", "BASE_REVISION", help="Commit, tag or branch of a hub base model."
)
seed = setting(
    "--seed",
    "SEED",
    type=Number(int, low=0, high=2**32 - 1),
    default=0,
    help="Seed of all that is random.",
)


def max_new_tokens(default: int) -> Decorator:
    """The length limit of an answer, whose default differs by stage."""
    return setting(
        "--max-new-tokens", "MAX_NEW_TOKENS", type=Number(int, low=1), default=default,
        help="Longest answer, in tokens.",
    )  # fmt: skip
