"""The adapter folded into its base, and the proof that nothing changed."""

import gc
import shutil
from pathlib import Path
from typing import Any

import torch

from stages.lib.model import adapter, load
from stages.lib.model.base import Base
from stages.lib.run import preemption
from stages.lib.run.exits import GateFailed
from stages.lib.run.progress import say

# Rounding the merged weights to bf16 moves the logits by far less; a fold gone wrong by far more.
MOST_KL = 1e-2
CPU = torch.device("cpu")


def merge(base: Base, folder: Path, ids: list[int], out: Path) -> dict[str, Any]:
    """Write base plus adapter as one model, in the type that the base was published in.

    The sum is taken in fp32 on the CPU and rounded once.

    Args:
        folder: of the adapter. ids: tokens on which the logits are compared. out: where the model is written.

    Returns:
        `mean_kl` in nats a token and `top1_agreement` between base plus adapter and the written model.

    Raises:
        GateFailed: the written model says something else than base plus adapter.
    """
    tuned = adapter.load(load.load(base, "fp32", CPU), folder, base)
    say("base plus adapter in fp32")
    reference = _log_probabilities(tuned, ids)
    stored = getattr(
        torch, str(base.config.get("dtype") or base.config.get("torch_dtype") or "bfloat16")
    )
    merged = tuned.merge_and_unload(safe_merge=True).to(stored)
    merged.config.use_cache = True
    say(f"writing the merged model in {stored}")
    merged.save_pretrained(out)
    kept = base.folder / "generation_config.json"
    if kept.is_file():
        shutil.copyfile(kept, out / kept.name)
    del tuned, merged
    gc.collect()
    preemption.check()
    return compare(reference, out, ids)


def compare(reference: torch.Tensor, folder: Path, ids: list[int]) -> dict[str, Any]:
    """How far a written model is from reference log-probabilities [tokens, vocabulary].

    Raises:
        GateFailed: too far.
    """
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    found = _log_probabilities(written, ids)
    kl = float((reference.exp() * (reference - found)).sum(-1).mean())
    agreement = float((reference.argmax(-1) == found.argmax(-1)).float().mean())
    if not kl <= MOST_KL:
        raise GateFailed(
            f"the merged model differs from base plus adapter (KL {kl:.3g} nats a token, at most {MOST_KL:g} "
            "is rounding), so it was not published; look for NaN in the adapter, or another base"
        )
    return {"mean_kl": kl, "top1_agreement": agreement, "compared_tokens": len(ids)}


@torch.no_grad()
def _log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    model.eval()
    return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
