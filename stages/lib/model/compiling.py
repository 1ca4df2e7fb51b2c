"""The compiler, with choices of ours: rows are reduced from registers, and all that it makes is kept."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

from stages.lib.run.progress import say

LONGEST = 8192  # elements of a row; the compiler's own limit is 1,024


class Choices(InductorChoices):
    """The compiler's, but for rows."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """On an H200 this saves a third of the time of normalising and quantising 4,096 columns."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        inner = str(features.get_reduction_hint()).endswith("INNER")
        short = V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST)
        return bool(config.triton.persistent_reductions and inner and short)

    def uuid(self) -> str:
        """For the key of what was compiled."""
        return f"rows up to {LONGEST}"


@cache
def _sources() -> str:
    """A digest of the code beside this one: what was compiled from other code is not found."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled(function: Any, backend: str = "inductor", **options: Any) -> Any:
    """A function, compiled when it is first called.

    Args:
        options: of `torch.compile`.
    """
    # Graphs with autograd functions are kept by no one else, for a key that does not know their code.
    torch.compiler.config.cache_key_tag = _sources()
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # For the whole process: a backward pass may be compiled in another thread than its forward pass.
    config.inductor_choices_class = Choices
    return torch.compile(function, backend=backend, **options)


def tried(function: Any, name: str, **options: Any) -> Any:
    """A function, compiled when it is first called; where that fails it is said, and it stays as it is.

    Args:
        name: what to call it. options: as of `compiled`.
    """
    chosen = compiled(function, **options)

    def call(*given: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*given)
        except TorchDynamoException as error:
            say(f"{name} cannot be compiled here ({reason(error)}): it runs as it is, and slower")
            chosen = function
            return chosen(*given)

    return call


def reason(error: Exception) -> str:
    """What a compiler says, in a line."""
    first, *more = str(error).strip().splitlines()
    return f"{first} {more[0]}" if first.endswith(":") and more else first
