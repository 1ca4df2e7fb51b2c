"""Configs of bases that the hub gives only to who accepts their terms, and of the embedded one. No torch here.

The sizes are those of `config.json` at https://huggingface.co/NAME. A test adds the weights up to the number of
parameters that the hub shows for each.
"""

from typing import Any

Config = dict[str, Any]

# Hidden size, layers, heads, heads of keys, that of the MLP, vocabulary, context; the family.
SIZES: dict[str, tuple[int, int, int, int, int, int, int, str]] = {
    "meta-llama/Llama-2-7b-hf": (4096, 32, 32, 32, 11008, 32000, 4096, "llama"),
    "meta-llama/Llama-2-13b-hf": (5120, 40, 40, 40, 13824, 32000, 4096, "llama"),
    "meta-llama/Llama-2-70b-hf": (8192, 80, 64, 8, 28672, 32000, 4096, "llama"),
    "meta-llama/Meta-Llama-3-8B": (4096, 32, 32, 8, 14336, 128256, 8192, "llama"),
    "meta-llama/Meta-Llama-3-70B": (8192, 80, 64, 8, 28672, 128256, 8192, "llama"),
    "meta-llama/Llama-3.1-8B": (4096, 32, 32, 8, 14336, 128256, 131072, "llama"),
    "meta-llama/Llama-3.1-70B": (8192, 80, 64, 8, 28672, 128256, 131072, "llama"),
    "meta-llama/Llama-3.2-1B": (2048, 16, 32, 8, 8192, 128256, 131072, "llama"),
    "meta-llama/Llama-3.2-3B": (3072, 28, 24, 8, 8192, 128256, 131072, "llama"),
    "mistralai/Mistral-7B-v0.1": (4096, 32, 32, 8, 14336, 32000, 32768, "mistral"),
    "mistralai/Mistral-7B-v0.3": (4096, 32, 32, 8, 14336, 32768, 32768, "mistral"),
    "google/gemma-2b": (2048, 18, 8, 1, 16384, 256000, 8192, "gemma"),
    "google/gemma-7b": (3072, 28, 16, 16, 24576, 256000, 8192, "gemma"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 30, 9, 3, 1536, 49152, 8192, "llama"),
}
# The same sizes under other names.
ALIKE = {
    "meta-llama/Llama-2-7b-chat-hf": "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-chat-hf": "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-chat-hf": "meta-llama/Llama-2-70b-hf",
    "meta-llama/Meta-Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B-Instruct": "meta-llama/Meta-Llama-3-70B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Meta-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Meta-Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "meta-llama/Meta-Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.3-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "google/gemma-2b-it": "google/gemma-2b",
    "google/gemma-7b-it": "google/gemma-7b",
}
TIED = {
    "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "HuggingFaceTB/SmolLM2-135M-Instruct",
}  # fmt: skip
# What `config.json` may leave out, where it is not what `Architecture.of` supposes: transformers' own defaults.
DEFAULTS: dict[str, Config] = {
    "mistral": {"num_key_value_heads": 8},
    "gemma": {"tie_word_embeddings": True, "head_dim": 256},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4},
    "qwen3": {"head_dim": 128},
    "smollm3": {"tie_word_embeddings": True, "num_key_value_heads": 4},
}
# Families whose layers are those that the plan counts; Phi-3, for one, has q, k and v in one projection.
COUNTED = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "smollm3", "olmo2", "granite",
}  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def config(name: str) -> Config | None:
    """The config of a base by its hub id, as far as the plan reads it; None where it is not in the table."""
    source = ALIKE.get(name, name)
    if source not in SIZES:
        return None
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "vocab_size", "max_position_embeddings", "model_type",
    )  # fmt: skip
    found: Config = dict(zip(names, SIZES[source], strict=True))
    return filled(found | ({"tie_word_embeddings": True} if source in TIED else {}))


def filled(given: Config) -> Config:
    """A `config.json` with what it may leave out."""
    return DEFAULTS.get(str(given.get("model_type")), {}) | given
