"""The sizes of a decoder and of what is trained in it, from a base's config. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEYS = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
}  # fmt: skip
HALF, FULL = 2, 4


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Llama-like decoder: widths in elements."""

    width: int
    layers: int
    query: int
    key: int
    wide: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Architecture | None":
        """From a config as transformers writes it, all keys filled in; None if it is not Llama-like."""
        if not config.keys() >= KEYS:
            return None
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            config["hidden_size"], config["num_hidden_layers"], heads * head,
            (config.get("num_key_value_heads") or heads) * head, config["intermediate_size"],
            config["vocab_size"], bool(config.get("tie_word_embeddings")),
        )  # fmt: skip

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each projection of a layer."""
        return {
            "q_proj": (self.query, self.width), "k_proj": (self.key, self.width),
            "v_proj": (self.key, self.width), "o_proj": (self.width, self.query),
            "gate_proj": (self.wide, self.width), "up_proj": (self.wide, self.width),
            "down_proj": (self.width, self.wide),
        }  # fmt: skip

    @property
    def frozen(self) -> int:
        """Elements of all projections."""
        return self.layers * sum(out * into for out, into in self.projections.values())

    @property
    def words(self) -> int:
        """Elements of the embeddings and the head."""
        return self.vocabulary * self.width * (1 if self.tied else 2)


@dataclass(frozen=True)
class Setup:
    """A run's choices that memory depends on.

    Args:
        targets: names of the adapted projections, or `all-linear`. unpacked: NF4 also as bf16.
        shared: GPUs that have the base together; 1 where each has all of it.
    """

    precision: str
    rank: int
    targets: tuple[str, ...]
    optimizer: str = "adamw_8bit"
    unpacked: bool = False
    shared: int = 1

    @property
    def element(self) -> int:
        """Bytes of an element of an activation."""
        return FULL if self.precision == "fp32" else HALF
