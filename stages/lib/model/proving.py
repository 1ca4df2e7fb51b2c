"""Two or more models on the same text, computed from their files part by part: none is ever whole in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stages.lib.model.adapter_files import WEIGHTS
from stages.lib.model.folding import Derived, Weights, empty

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Difference:
    """How far a model is from another one on a text.

    Attributes:
        kl: mean over the text's tokens of the Kullback-Leibler divergence from the other's distribution, nats.
        agreement: share of tokens after which both find the same one most likely.
        perplexity: of the text.
    """

    kl: float
    agreement: float
    perplexity: float


class Parts(Derived):
    """Weights in fp32 under the names that modules have, peft's among them.

    Args:
        weights: of the model. adapter: folder of one that peft puts on it, or None.
    """

    def __init__(self, weights: Weights, adapter: Path | None) -> None:
        super().__init__(weights)
        self.adapter = adapter

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        if ".lora_" in name and self.adapter:
            with safe_open(self.adapter / WEIGHTS, framework="pt") as file:
                factor: torch.Tensor = file.get_tensor(name.replace(".default.", "."))
            return factor.float()
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name == HEAD and name not in self.source:
            name = EMBEDDINGS  # tied
        return self.source[name].float()


def streamed(folder: Path, weights: Weights, adapter: Path | None, place: torch.device) -> Any:
    """A model that reads each of its parts when it is computed, and then forgets it.

    Args:
        folder: with its config. weights: by name. adapter: see `Parts`. place: where it computes.
    """
    from accelerate.hooks import attach_align_device_hook

    model = empty(folder)
    if adapter:
        from accelerate import init_empty_weights
        from peft import LoraConfig, get_peft_model

        with init_empty_weights(include_buffers=False):
            model = get_peft_model(model, LoraConfig.from_pretrained(str(adapter))).eval()
    attach_align_device_hook(
        model, execution_device=place, offload=True, offload_buffers=False,
        weights_map=Parts(weights, adapter),
    )  # fmt: skip
    return model


@torch.no_grad()
def logits(model: Any, rows: Sequence[Sequence[int]], place: torch.device) -> torch.Tensor:
    """Of all tokens of rows that were padded on the right, fp32 [tokens, vocabulary]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=place)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=place)
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found[mask.bool()].float()


def difference(
    found: torch.Tensor, wanted: torch.Tensor, rows: Sequence[Sequence[int]]
) -> Difference:
    """Of one model's logits [tokens, vocabulary] from another's, on the rows that they are of."""
    near, far = found.log_softmax(-1), wanted.log_softmax(-1)
    kl = (far.exp() * (far - near)).sum(-1).mean()
    agreement = (near.argmax(-1) == far.argmax(-1)).float().mean()
    return Difference(float(kl), float(agreement), perplexity(found, rows))


def perplexity(found: torch.Tensor, rows: Sequence[Sequence[int]]) -> float:
    """Of rows, given the logits of all their tokens [tokens, vocabulary]; 1.0 if every row is one token."""
    parts = found.split([len(row) for row in rows])
    losses = [
        F.cross_entropy(part[:-1], torch.tensor(row[1:], device=part.device), reduction="none")
        for part, row in zip(parts, rows, strict=True)
        if len(row) > 1
    ]
    return float(torch.cat(losses).mean().exp()) if losses else 1.0
