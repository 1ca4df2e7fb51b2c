"""The sizes of a model and the names of its weights as llama.cpp has them, for the architectures known here."""

from collections.abc import Iterable
from typing import Any

import torch

from stages.lib.run.exits import CannotRun

KNOWN = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}  # fmt: skip
# Of Llama alone: there llama.cpp rotates neighbours, where transformers rotates the halves of a head.
INTERLEAVED = ("llama",)
NO_WEIGHT = ".rotary_emb.inv_freq"  # what older checkpoints keep, and everybody computes anew
FACTORS = "rope_freqs.weight"


def architecture(config: Any) -> str:
    """llama.cpp's name of it.

    Raises:
        CannotRun: it is none of those known, or a variant that computes something else.
    """
    name = next(iter(config.architectures or ()), config.model_type)
    if name not in KNOWN:
        raise CannotRun(
            f"{name} cannot be exported: {', '.join(KNOWN)} can; convert it with llama.cpp's own script"
        )
    rope, kind = config.rope_parameters, config.rope_parameters["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise CannotRun(
            f"rope scaling {kind!r} cannot be exported: default, linear and llama3 can; convert the model with "
            "llama.cpp's own script"
        )
    odd = {
        "hidden_act": getattr(config, "hidden_act", "silu") != "silu",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for key in (key for key, is_odd in odd.items() if is_odd):
        raise CannotRun(
            f"this {name} has an unusual {key}, which llama.cpp's has not; choose another base"
        )
    return KNOWN[name]


def sizes(config: Any) -> dict[str, Any]:
    """What llama.cpp is told of the model, by its keys; integers and floats as it wants them."""
    kind, rope = architecture(config), config.rope_parameters
    # It has no window for these: within one, there is no difference.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": min(window, config.max_position_embeddings),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_width(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {f"{kind}.{key}": value for key, value in found.items()}


def head_width(config: Any) -> int:
    """Elements of a head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def names(config: Any, weights: Iterable[str]) -> dict[str, str]:
    """llama.cpp's name of each weight.

    Raises:
        CannotRun: it has none for one.
    """
    import gguf

    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture(config))
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for name in weights:
        if name.endswith(NO_WEIGHT):
            continue
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise CannotRun(
                f"the weight {name} has no place in llama.cpp's {architecture(config)}; use a plain model"
            )
        found[name] = theirs
    return found


def heads(config: Any, name: str) -> int | None:
    """How many heads' rows stand in another order there, or None where the order is the same."""
    if architecture(config) not in INTERLEAVED:
        return None
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def interleaved(rows: int, heads: int) -> torch.Tensor:
    """Our number of each of their rows: int64 [rows]."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def halved(rows: int, heads: int) -> torch.Tensor:
    """Their number of each of our rows: int64 [rows]; undoes `interleaved`."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def rope_factors(config: Any) -> torch.Tensor | None:
    """By what llama.cpp divides each frequency: fp32 [head_width / 2]; None where it need not."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_width(config)
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / config.rope_parameters["rope_theta"] ** steps
    return (plain / scaled).float()
