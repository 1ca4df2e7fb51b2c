"""Tiny random decoders of every family, their adapters, and plain PEFT to hold the quick path against."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stages.lib.model import int8
from stages.lib.model.loss import Row, lay_out, nll_sum, to
from stages.lib.model.quick import Quick

WORDS = 128
SIZES = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# Windows of 16 are shorter than the longest row.
QUICK: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "smollm": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"model_type": "phi", "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"model_type": "phi3", "sliding_window": 16},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "olmo2": {"model_type": "olmo2"},
    "granite": {
        "model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.05, "logits_scaling": 1.0,
    },
}  # fmt: skip
# What trains as transformers has it, and a word of the remark that says so.
PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (
        {
            "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        "not a decoder known",
    ),
    "gemma2": ({"model_type": "gemma2", "head_dim": 16}, "not a decoder known"),
    "granite-scaled": ({"model_type": "granite", "logits_scaling": 8.0}, "head of granite"),
}  # fmt: skip


def make(
    described: dict[str, Any],
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    place: str = "cpu",
    targets: Sequence[str] | str = "all-linear",
    convert: Any = None,
    lora: dict[str, Any] | None = None,
    **changed: Any,
) -> Any:
    """A tuned decoder whose B is not zero, the same for every dtype and device.

    Args:
        described: its config. dtype: of the base; the adapter is in fp32, or in fp64 with it.
        convert: called with the base before it gets its adapter.
        lora: more of the adapter's config. changed: in the base's.
    """
    described = SIZES | described | changed
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    torch.manual_seed(0)
    # Gemma 3 would take bf16 where its config does not say otherwise.
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, p in base.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 0.0 if "gemma" in config.model_type else 1.0, 0.1)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    base = base.requires_grad_(False).to(torch.bfloat16 if dtype == torch.bfloat16 else base.dtype)
    if dtype == torch.float64:
        base = base.double()
    base = base.to(place)
    if convert:
        convert(base)
    kept = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    settings = LoraConfig(target_modules=targets, **kept | (lora or {}))
    tuned = get_peft_model(base, settings)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0]))
                kind = torch.float64 if dtype == torch.float64 else p.dtype
                p.data = (noise * 0.1).to(p.device, kind)
    return tuned.train()


def replace_projections(base: Any, quantised: Callable[[nn.Linear], Any]) -> None:
    """Quantise every projection of a model, but its head."""
    for parent in list(base.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, quantised(child))


def exact_twin(tuned: Any, described: dict[str, Any], **kept: Any) -> Any:
    """A tuned decoder in fp64 with the numbers that another one stands for, quantised or not."""
    twin = make(described, dtype=torch.float64, place=tuned.device.type, **kept)
    sources = dict(tuned.named_modules())
    with torch.no_grad():
        for name, module in twin.named_modules():
            source = sources[name]
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                module.weight.copy_(_numbers(source))
            if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
                module.bias.copy_(source.bias)
    return twin


def _numbers(source: Any) -> torch.Tensor:
    if source.weight.dtype == torch.int8:
        scales = source.state.SCB if source.weight.SCB is None else source.weight.SCB
        return int8.dequantise(source.weight.data, scales, torch.float64)
    if hasattr(source, "scales"):  # FP8
        return source.weight.double() * source.scales.double()
    if hasattr(source.weight, "quant_state"):
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(source.weight.data, source.weight.quant_state)
    return source.weight


def some(*lengths: int, words: int = WORDS, seed: int = 0) -> list[Row]:
    """Rows of these lengths, their first third not learned."""
    generator = np.random.default_rng(seed)
    return [(generator.integers(3, words, n), np.arange(n) >= n // 3) for n in lengths]


def plain_sum(tuned: Any, rows: Iterable[Row]) -> torch.Tensor:
    """Summed loss of plain PEFT and plain transformers, each row alone."""
    total = 0
    for ids, mask in rows:
        tokens, learned = (torch.from_numpy(t).to(tuned.device) for t in (ids, mask))
        logits = tuned(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits[learned[1:]], tokens[1:][learned[1:]], reduction="sum")
    return torch.as_tensor(total)


def quick_sum(quick: Quick, rows: Sequence[Row], tokens: int) -> torch.Tensor:
    """Summed loss of a quick model, the rows in one bin."""
    shape = quick.shape(np.array([len(ids) for ids, _ in rows]), tokens)
    return nll_sum(quick.tuned, to(lay_out(rows, shape), quick.causal.device))


def adapter(tuned: Any) -> dict[str, torch.nn.Parameter]:
    """What is learned."""
    return {name: p for name, p in tuned.named_parameters() if p.requires_grad}


def gradients(tuned: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of what is learned; none is left behind."""
    tuned.zero_grad()
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in adapter(tuned).items()}
    tuned.zero_grad()
    return found


def error(found: Any, wanted: Any) -> float:
    """Relative error in the 2-norm; of dicts the largest."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        return max(error(found[name], wanted[name]) for name in wanted)
    found, wanted = (torch.as_tensor(t).detach().double().cpu() for t in (found, wanted))
    difference = float((found - wanted).norm() / wanted.norm())
    assert difference == difference, "not a number"
    return difference


def ten_steps(tuned: Any, step_loss: Any) -> dict[str, torch.Tensor]:
    """The adapter's ten steps of AdamW: how far it went. `step_loss` is told the step's number."""
    learned = adapter(tuned)
    before = {name: p.detach().double().clone() for name, p in learned.items()}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-3, weight_decay=0.01)
    for number in range(10):
        optimizer.zero_grad()
        step_loss(number).backward()
        optimizer.step()
    return {name: p.detach().double() - before[name] for name, p in learned.items()}
