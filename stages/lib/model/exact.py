"""Every written weight against base plus adapters as peft computes them: no more than a rounding apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stages.lib.model import proving
from stages.lib.model.folding import PREFIX, Weights
from stages.lib.run import preemption, watchdog
from stages.lib.run.exits import GateFailed

NOISE = 1e-5  # of an adapter's largest entry: its product may be summed in another order


class Deltas:
    """What an adapter adds to each weight by peft's own arithmetic, one when it is asked for.

    Args:
        folder: of the base. adapter: its folder. weight: how much of it.
    """

    def __init__(self, folder: Path, adapter: Path, weight: float) -> None:
        from peft.tuners.lora import LoraLayer

        self.weight, self.factors = weight, proving.Parts({}, adapter)
        self.layers = {
            f"{name.removeprefix(PREFIX)}.weight": (name, module)
            for name, module in proving.unfilled(folder, adapter).named_modules()
            if isinstance(module, LoraLayer)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.layers

    def __getitem__(self, name: str) -> torch.Tensor:
        place, layer = self.layers[name]
        for end in ("lora_A", "lora_B"):
            factor = self.factors[f"{place}.{end}.default.weight"]
            getattr(layer, end)["default"].weight = torch.nn.Parameter(factor, requires_grad=False)
        found: torch.Tensor = layer.get_delta_weight("default").float() * self.weight
        for end in ("lora_A", "lora_B"):
            getattr(layer, end)["default"].to("meta")
        return found


def check(
    folder: Path, written: Weights, base: Weights, adapters: Sequence[tuple[Path, float]]
) -> dict[str, Any]:
    """Hold each written weight against the base's plus the sum of what adapters add.

    Args:
        folder: of the base. written: the merged weights. base: those that were folded into. adapters: and how
            much of each.

    Returns:
        How many weights were changed and how many kept, and the largest distance, in roundings of the type.

    Raises:
        GateFailed: a weight is missing, odd, or further away than rounding moves it.
    """
    deltas = [Deltas(folder, path, weight) for path, weight in adapters]
    odd = sorted(set(written) ^ set(base))
    if odd:
        raise GateFailed(
            f"the merged model and its base differ by {odd[0]}, so it was not published"
        )
    changed, largest = 0, 0.0
    for name in base:
        preemption.check()
        watchdog.alive()
        own = [delta[name] for delta in deltas if name in delta]
        changed += bool(own)
        apart = _apart(written[name], base[name], own)
        largest = max(largest, apart)
        if not apart <= 1:
            raise GateFailed(
                f"{name} as it was written is not base plus adapter: {apart:.3g} roundings away, one is most. "
                "It was not published. Run `merge` again, and report it if it stays"
            )
    return {"changed": changed, "kept": len(base) - changed, "roundings": largest}


def _apart(found: torch.Tensor, base: torch.Tensor, deltas: Sequence[torch.Tensor]) -> float:
    """The largest distance in units of what rounding to the type may move; 0 for a kept weight."""
    if not deltas or found.shape != base.shape or found.dtype != base.dtype:
        return 0.0 if torch.equal(found, base) and found.dtype == base.dtype else torch.inf
    delta = sum(deltas[1:], deltas[0])
    kind = torch.finfo(found.dtype)
    noise = NOISE * float(delta.abs().max()) + kind.tiny * kind.eps
    wanted = base.float() + delta
    return float(((found.float() - wanted).abs() / (wanted.abs() * kind.eps + noise)).max())
