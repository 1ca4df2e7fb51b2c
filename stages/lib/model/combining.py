"""Several adapters as one, through peft: the exact weighted sum of what they add, of the sum of their ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stages.lib.model.base import Base
from stages.lib.model.folding import Pairs, empty
from stages.lib.model.shards import Shards


def one(base: Base, adapters: Sequence[tuple[Path, float]], out: Path) -> Path:
    """The adapter that is the weighted sum of some; where it is one of weight 1, that one.

    Args:
        base: fetched with its weights. adapters: and how much of each. out: a folder to write into.

    Raises:
        CannotRun, BadData, GateFailed: see `Pairs.check`.
    """
    if len(adapters) == 1 and adapters[0][1] == 1:
        return adapters[0][0]
    for path, _ in adapters:
        Pairs(path).check(Shards(base.folder), base.name)
    return combine(base.folder, adapters, out)


def combine(folder: Path, adapters: Sequence[tuple[Path, float]], out: Path) -> Path:
    """Write the adapter that is the weighted sum of others; the folder that it lies in.

    peft's `cat` lays the factors side by side, each A times its weight and scale: exact, and of any ranks. Its
    `linear` adds A to A and B to B, which is something else.

    Args:
        folder: of the base. adapters: and how much of each. out: a folder to write into.
    """
    from peft import PeftModel

    names = [f"a{number}" for number in range(len(adapters))]
    model = _weightless(folder)
    tuned = PeftModel.from_pretrained(
        model, str(adapters[0][0]), adapter_name=names[0], torch_device="cpu"
    )
    for name, (path, _) in list(zip(names, adapters, strict=True))[1:]:
        tuned.load_adapter(str(path), adapter_name=name, torch_device="cpu")
    tuned.add_weighted_adapter(
        names, [weight for _, weight in adapters], "combined", combination_type="cat"
    )
    tuned.save_pretrained(str(out), selected_adapters=["combined"], save_embedding_layers=False)
    return out / "combined"


def _weightless(folder: Path) -> Any:
    """A model whose linear layers have their shapes on the CPU and no memory: peft moves adapters to them."""
    model = empty(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            nothing = torch.zeros(1).expand(module.weight.shape)
            module.weight = torch.nn.Parameter(nothing, requires_grad=False)
    return model
