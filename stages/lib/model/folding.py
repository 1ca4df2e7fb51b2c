"""Weights by name: as a base was published, as it was trained on, and with an adapter folded in."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stages.lib.model import fp8, int8
from stages.lib.model.adapter_files import CONFIG, WEIGHTS
from stages.lib.model.shards import Shards
from stages.lib.run.exits import BadData, CannotRun, GateFailed

Weights = Mapping[str, torch.Tensor]
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def empty(folder: Path) -> Any:
    """The model of a folder without its weights: they are on the meta device, its buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Derived(Weights):
    """Weights made of others with the same names, one when it is asked for."""

    def __init__(self, source: Weights) -> None:
        self.source = source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


class Trained(Derived):
    """A base as a run had it in memory, dequantised: what its adapter was trained on.

    Args:
        source: as published. model: see `empty`. precision: of the run.
    """

    def __init__(self, source: Weights, model: Any, precision: str) -> None:
        super().__init__(source)
        self.precision = precision
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.quantised = _quantised(model, precision)

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.source[name].to(self.dtype)
        return _rounded(weight, self.precision) if name in self.quantised else weight


def _quantised(model: Any, precision: str) -> set[str]:
    """The names of the weights that a precision does not leave as they are."""
    if precision == "fp8":
        return {f"{name}.weight" for name in fp8.projections(model)}
    if precision not in ("nf4", "int8"):
        return set()
    from transformers.quantizers.base import get_keys_to_not_convert

    left = get_keys_to_not_convert(model)
    linear = (n for n, module in model.named_modules() if type(module) is torch.nn.Linear)
    return {f"{name}.weight" for name in linear if not any(part in name for part in left)}


def _rounded(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """A weight in bf16, there and back through its precision, by the functions that loading uses."""
    import bitsandbytes.functional as bnb

    if precision == "fp8":
        values, scales = fp8.powers(weight)
        return (values.float() * scales).to(weight.dtype)
    if precision == "int8":
        values, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return int8.dequantise(values, scales, weight.dtype)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    rounded: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return rounded


class Pairs:
    """The factors of a saved adapter by the name of the weight that they change.

    Args:
        folder: of the adapter.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.path = folder / WEIGHTS
        self.config = json.loads((folder / CONFIG).read_text())
        with safe_open(self.path, framework="pt") as file:
            self.names = list(file.keys())
        self.scale = self.config["lora_alpha"] / self.config["r"]

    def check(self, weights: Shards, base: str) -> None:
        """Refuse what cannot be folded into a base, or is not worth it.

        Args:
            weights: of the base. base: its name.

        Raises:
            CannotRun: it is more than factor pairs. BadData: it is for another base. GateFailed: a factor is
            not finite, or nothing was learned.
        """
        folder = self.path.parent
        if not self.simple:
            raise CannotRun(
                f"the adapter in {folder} is more than pairs of factors of one scale, as with DoRA or several "
                "ranks; merge it with peft's merge_and_unload"
            )
        learned, shapes = False, dict[str, tuple[int, ...]]()
        for name, factor in self._factors():
            shapes[name] = tuple(factor.shape)
            if not bool(factor.isfinite().all()):
                raise GateFailed(
                    f"the adapter in {folder} has numbers that are not finite in {name}, so it was not merged; "
                    "train it again with a lower LEARNING_RATE"
                )
            learned |= name.endswith(UP) and bool(factor.any())
        for module in (name.removesuffix(DOWN) for name in shapes if name.endswith(DOWN)):
            own, name = (
                (shapes[module + UP][0], shapes[module + DOWN][1]),
                module.removeprefix(PREFIX),
            )
            if weights.shapes.get(f"{name}.weight") != own:
                raise BadData(
                    f"the adapter in {folder} was made for another base: {base} has no {name} of shape {own}"
                )
        if not learned:
            raise GateFailed(
                f"the adapter in {folder} was never trained (every B is zero): merged, it would be the base; "
                "train it, or raise LEARNING_RATE"
            )

    @property
    def simple(self) -> bool:
        """Whether it is pairs of factors of linear layers and nothing else, with one scale."""
        odd = (
            "use_dora",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
            "modules_to_save",
            "lora_bias",
        )
        return all(name.endswith((DOWN, UP)) for name in self.names) and not any(
            self.config.get(key) for key in odd
        )

    def _factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            for name in self.names:
                yield name, file.get_tensor(name)

    def __contains__(self, weight: str) -> bool:
        return self._of(weight) + DOWN in self.names

    def delta(self, weight: str) -> torch.Tensor:
        """What it adds to a weight: alpha / rank * B A, fp32 [out, in]."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            down, up = (file.get_tensor(self._of(weight) + end).float() for end in (DOWN, UP))
        return up @ down * self.scale

    def _of(self, weight: str) -> str:
        return PREFIX + weight.removesuffix(".weight")


class Folded(Derived):
    """Weights with an adapter in them, summed in fp32 and rounded once to the weight's own type."""

    def __init__(self, source: Weights, pairs: Pairs) -> None:
        super().__init__(source)
        self.pairs = pairs

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.source[name]
        if name not in self.pairs:
            return weight
        return (weight.float() + self.pairs.delta(name)).to(weight.dtype)
