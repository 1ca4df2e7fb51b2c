"""Fine-tune a causal language model with LoRA, as batch stages that meet only on disk."""

__version__ = "0.1.0"
