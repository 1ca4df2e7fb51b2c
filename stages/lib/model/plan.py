"""What training takes of a GPU's memory, by part, from a base's config. No torch here.

The activations of a layer are counted as what its backward pass reads again; against measured peaks the sum is
within 10 % (tests/lib/model/test_plan.py has them).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Bytes of a frozen weight. FP8 is laid out twice, once for each direction; NF4 has its scales beside it.
WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp8": 2.0, "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
OPTIMIZER = {"adamw_torch": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}
MASTER, GRADIENT, FLAT_GRADIENT = 4, 4, 4  # of an adapter's parameter, in fp32
HALF, FULL = 2, 4
LOSS_CHUNK = 2048  # tokens whose logits exist at a time
IN_HAND = 1.65  # of a layer's activations: what its own recompute and backward pass hold
KEYS = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
}  # fmt: skip
PASS = 150  # tokens that could be computed in the time that starting a pass takes


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
    """

    precision: str
    rank: int
    targets: tuple[str, ...]
    optimizer: str = "adamw_8bit"
    unpacked: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak, by part."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.adapter + self.optimizer + self.activations + self.loss

    def __str__(self) -> str:
        parts = ("weights", "adapter", "optimizer", "activations", "loss")
        return " + ".join(f"{name} {getattr(self, name) / 2**30:.1f}" for name in parts) + " GiB"


def adapter_parameters(shape: Architecture, setup: Setup) -> int:
    """Elements of the adapter."""
    return shape.layers * setup.rank * sum(map(sum, _adapted(shape, setup).values()))


def _adapted(shape: Architecture, setup: Setup) -> dict[str, tuple[int, int]]:
    every = setup.targets == ("all-linear",)
    return {n: s for n, s in shape.projections.items() if every or n in setup.targets}


def operations(shape: Architecture, adapter: int, lengths: Iterable[int], learned: int) -> int:
    """Floating-point operations of some rows' loss and gradient; what is computed twice counts once.

    A product with P parameters takes 2 P a token, and 2 P more for the gradient of its input. So a frozen
    weight costs 4 a token, one of the head 4 a learned token, and one of the adapter, which has a gradient
    itself, 6. Attention multiplies each token with itself and all before it, over the width of the queries:
    2 products forward and 4 backward, of 2 operations an element. What is no product is left out, and a sliding
    window is not looked at.

    Args:
        adapter: its parameters. lengths: tokens of each row, [rows]. learned: tokens of all rows with a loss.
    """
    tokens = pairs = 0
    for length in lengths:
        tokens += length
        pairs += length * (length + 1) // 2
    head = shape.vocabulary * shape.width
    products = (4 * shape.frozen + 6 * adapter) * tokens + 4 * head * learned
    return products + 6 * 2 * shape.layers * shape.query * pairs


def layer_activations(shape: Architecture, setup: Setup) -> int:
    """Bytes that a layer keeps of a token for its backward pass."""
    element = FULL if setup.precision == "fp32" else HALF
    adapted = _adapted(shape, setup)
    kept = 2 * shape.width  # the layer's input, and what it is after attention
    kept += shape.query + 2 * shape.key  # q, k, v
    kept += 2 * shape.query  # attention's output, and a copy of it
    kept += 2 * shape.wide  # gate and up
    kept += sum(into for _, into in adapted.values())  # each adapter's input with its own dropout
    kept += shape.wide if "down_proj" in adapted else 0
    return element * kept


def predict(shape: Architecture, setup: Setup, tokens: int, recomputed: int) -> Memory:
    """The peak of a training step.

    Args:
        tokens: of a forward pass. recomputed: the first layers, so many, keep their input alone.
    """
    element = FULL if setup.precision == "fp32" else HALF
    weights = shape.frozen * (WEIGHT[setup.precision] + (HALF if setup.unpacked else 0))
    learned = adapter_parameters(shape, setup)
    layer = layer_activations(shape, setup)
    # The first layers are those that recompute: when it is their turn, the others' activations are gone.
    most = max(layer * (shape.layers - recomputed), layer * IN_HAND if recomputed else 0)
    chunk = min(tokens, LOSS_CHUNK)
    return Memory(
        weights=int(weights + element * shape.words),
        adapter=learned * (MASTER + GRADIENT + FLAT_GRADIENT),
        optimizer=int(learned * OPTIMIZER[setup.optimizer]),
        activations=int(tokens * (most + element * shape.width * recomputed)),
        loss=chunk * shape.vocabulary * 2 * element,
    )


@dataclass(frozen=True)
class Choice:
    """How the work is cut: tokens of a forward pass, layers that recompute, and what that takes, if known."""

    tokens: int
    recomputed: int
    memory: Memory | None = None

    def facts(self) -> dict[str, int]:
        """What a checkpoint remembers of it."""
        return {"bin_tokens": self.tokens, "recomputed_layers": self.recomputed}

    @classmethod
    def kept(cls, metrics: Mapping[str, Any]) -> "Choice":
        """From a checkpoint's metrics."""
        return cls(metrics["bin_tokens"], metrics["recomputed_layers"])

    def cost(self, layers: int) -> float:
        """Time a token, against a pass without limits: a forward pass is a third of the work."""
        return 1 + self.recomputed / layers / 3 + PASS / self.tokens


def choices(
    shape: Architecture, setup: Setup, sizes: Iterable[int], room: int, recompute: str
) -> list[Choice]:
    """What fits, from the fastest on.

    Args:
        sizes: tokens of a forward pass that may be. room: bytes of the GPU. recompute: `auto`, `none` or `all`.
    """
    layers = shape.layers
    numbers = {"auto": range(layers + 1), "none": range(1), "all": range(layers, layers + 1)}
    found = []
    for size in sizes:
        for recomputed in numbers[recompute]:
            memory = predict(shape, setup, size, recomputed)
            if memory.total <= room:
                found.append(Choice(size, recomputed, memory))
                break
    return sorted(found, key=lambda choice: choice.cost(layers))


# Time a token at the 7B shape on an H200, against FP8; NF4 takes what bf16 does, and a little more.
SLOWER = {"fp8": 1.0, "bf16": 1.5, "nf4": 1.55}


def precision(
    shape: Architecture, setup: Setup, sizes: Sequence[int], room: int, recompute: str, possible: Iterable[str]
) -> str:  # fmt: skip
    """The fastest of the possible precisions that fits; `nf4`, the smallest, if none does."""
    times = {}
    for name in possible:
        found = choices(shape, replace(setup, precision=name), sizes, room, recompute)
        if found:
            times[name] = SLOWER[name] * found[0].cost(shape.layers)
    return min(times, key=lambda name: times[name], default="nf4")
