"""Two or more models on the same text. One that is large is computed from its files part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stages.lib.model import host
from stages.lib.model.adapter_files import WEIGHTS
from stages.lib.model.folding import PREFIX, Derived, Weights, empty
from stages.lib.run import preemption, watchdog

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
LARGEST_WHOLE = 3 * 2**30  # bytes in fp32 that the host may hold at once: merging stays below 8 GiB
SPOKEN, SPOKEN_STREAMED = 32, 8  # tokens of an answer


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
        name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name == HEAD and name not in self.source:
            name = EMBEDDINGS  # tied
        return self.source[name].float()


def unfilled(folder: Path, adapter: Path | None) -> Any:
    """The model of a folder without its weights, in peft's hands where an adapter is put on it."""
    model = empty(folder)
    if adapter:
        from accelerate import init_empty_weights
        from peft import LoraConfig, get_peft_model

        with init_empty_weights(include_buffers=False):
            model = get_peft_model(model, LoraConfig.from_pretrained(str(adapter))).eval()
    return model


def model(folder: Path, weights: Weights, adapter: Path | None, place: torch.device) -> Any:
    """A model in fp32, whole where it fits, else `streamed`.

    Args:
        folder: with its config. weights: by name. adapter: see `Parts`. place: where it computes.
    """
    size = 4 * sum(parameter.numel() for parameter in empty(folder).parameters())
    room = min(host.room(), LARGEST_WHOLE)
    if place.type == "cuda":
        room = int(host.SHARE * torch.cuda.mem_get_info(place)[0])
    return (whole if size <= room else streamed)(folder, weights, adapter, place)


def whole(folder: Path, weights: Weights, adapter: Path | None, place: torch.device) -> Any:
    """A model with all of its weights; see `model`."""
    from accelerate.utils import set_module_tensor_to_device

    found, parts = unfilled(folder, adapter), Parts(weights, adapter)
    for name, _ in list(found.named_parameters(remove_duplicate=False)):
        set_module_tensor_to_device(found, name, place, value=parts[name])
    return found.to(place)


def streamed(folder: Path, weights: Weights, adapter: Path | None, place: torch.device) -> Any:
    """A model that reads each of its parts when it is computed, and then forgets it; see `model`."""
    from accelerate.hooks import attach_align_device_hook

    found = unfilled(folder, adapter)
    attach_align_device_hook(
        found, execution_device=place, offload=True, offload_buffers=False,
        weights_map=Parts(weights, adapter),
    )  # fmt: skip
    return found


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
    # Of equal ones rounding may leave less than nothing.
    return Difference(max(float(kl), 0.0), float(agreement), perplexity(found, rows))


def perplexity(found: torch.Tensor, rows: Sequence[Sequence[int]]) -> float:
    """Of rows, given the logits of all their tokens [tokens, vocabulary]; 1.0 if every row is one token."""
    parts = found.split([len(row) for row in rows])
    losses = [
        F.cross_entropy(part[:-1], torch.tensor(row[1:], device=part.device), reduction="none")
        for part, row in zip(parts, rows, strict=True)
        if len(row) > 1
    ]
    return float(torch.cat(losses).mean().exp()) if losses else 1.0


@torch.no_grad()
def speak(
    model: Any, prompts: Sequence[Sequence[int]], stops: Sequence[int], place: torch.device
) -> list[list[int]]:
    """What a model says to prompts, greedily, all in one left-padded batch.

    Args:
        stops: ids that end an answer, and are its last. A model that is streamed reads all of its weights for
            every token, so it says fewer.
    """
    is_streamed = any(parameter.is_meta for parameter in model.parameters())
    longest = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in prompts], device=place)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=place
    )
    cache, said = None, torch.empty((len(prompts), 0), dtype=torch.long, device=place)
    for _ in range(SPOKEN_STREAMED if is_streamed else SPOKEN):
        preemption.check()
        watchdog.alive()
        where = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=where, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        mask, said = torch.cat([mask, torch.ones_like(ids)], 1), torch.cat([said, ids], 1)
        if stops and bool(torch.isin(said, torch.tensor(stops, device=place)).any(1).all()):
            break
    return [_ended(row, stops) for row in said.tolist()]


def _ended(said: list[int], stops: Sequence[int]) -> list[int]:
    end = next((n for n, token in enumerate(said, 1) if token in stops), len(said))
    return said[:end]


def follow(
    model: Any, prompts: Sequence[Sequence[int]], said: Sequence[Sequence[int]],
    place: torch.device,
) -> list[list[int]]:  # fmt: skip
    """What a model would have said instead of another one, in one pass: up to the token that differs, with it.

    Args:
        said: what the other said to each prompt. Behind a difference the two go on from different texts.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, said, strict=True)]
    parts = logits(model, rows, place).argmax(-1).split([len(row) for row in rows])
    found = []
    for prompt, answer, part in zip(prompts, said, parts, strict=True):
        own = part[len(prompt) - 1 : -1].tolist()
        same = next((n for n in range(len(answer)) if own[n] != answer[n]), len(answer))
        found.append(own[: same + 1])
    return found
