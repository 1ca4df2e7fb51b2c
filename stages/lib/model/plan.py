"""What training takes of a GPU's memory, by part, from a base's config. No torch here.

The activations of a layer are counted as what its backward pass reads again; against measured peaks the sum is
within 10 % (tests/lib/model/test_plan.py has them).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stages.lib.model.architecture import HALF, Architecture, Setup
from stages.lib.model.carrying import RESIDENT, SLOWER, again, carried, host, leanest

# Bytes of a frozen weight. FP8 is laid out twice, once for each direction; NF4 has its scales beside it.
WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp8": 2.0, "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
OPTIMIZER = {"adamw_torch": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}
MASTER, GRADIENT, FLAT_GRADIENT = 4, 4, 4  # of an adapter's parameter, in fp32
LOSS_CHUNK = 2048  # tokens whose logits exist at a time
# Of a sharded base: a layer that is computed, with the one that comes and the buffer it comes in.
GATHERED = 3
IN_HAND = 1.65  # of a layer's activations: what its own recompute and backward pass hold
# Tokens that could be computed in the time that starting a pass takes; NF4's weights are dequantised in each:
# 84 us a token in passes of 4,096 tokens, 77 in passes of 8,192, on an H200.
PASS, NF4_PASS = 150, 1150


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak, by part."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    loss: int
    gathered: int = 0  # of a sharded base, what is whole for a moment

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = {name: size for name, size in asdict(self).items() if size or name != "gathered"}
        return " + ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items()) + " GiB"


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
    adapted = _adapted(shape, setup).keys()
    kept = 2 * shape.width  # the layer's input, and what it is after attention
    kept += shape.query + 2 * shape.key  # q, k, v
    kept += shape.query  # attention's output
    kept += 2 * shape.wide  # gate and up
    # What adapters read: o's input is attention's output.
    kept += shape.width if adapted & {"q_proj", "k_proj", "v_proj"} else 0
    kept += shape.width if adapted & {"gate_proj", "up_proj"} else 0
    kept += shape.wide if "down_proj" in adapted else 0
    return setup.element * kept


def predict(
    shape: Architecture, setup: Setup, tokens: int, recomputed: int, offloaded: int = 0
) -> Memory:
    """The peak of a training step on the GPU.

    Args:
        tokens: of a forward pass. recomputed: the first layers, so many, keep their input alone.
        offloaded: or the first layers, so many, keep what they do on the host.
    """
    element = setup.element
    weights = shape.frozen * (WEIGHT[setup.precision] + (HALF if setup.unpacked else 0))
    words = element * shape.words
    gathered = 0.0
    if setup.shared > 1:
        # The head is whole when the loss is computed, beside the buffer it came in, and a layer's.
        head = element * shape.vocabulary * shape.width
        one = weights / shape.layers
        gathered = max(GATHERED * one, one + 2 * head)
    learned = adapter_parameters(shape, setup)
    layer = layer_activations(shape, setup)
    # The first layers are those that recompute: when it is their turn, the others' activations are gone.
    most: float = max(layer * (shape.layers - recomputed), layer * IN_HAND if recomputed else 0)
    if offloaded:
        whole: float = layer * (shape.layers - offloaded)
        whole += layer * (IN_HAND - 1) + RESIDENT * carried(shape, setup) if whole else 0
        most = max(whole, layer * IN_HAND + carried(shape, setup))  # the next one's is on its way
    chunk = min(tokens, LOSS_CHUNK)
    return Memory(
        weights=int((weights + words) / setup.shared),
        adapter=learned * (MASTER + GRADIENT + FLAT_GRADIENT),
        optimizer=int(learned * OPTIMIZER[setup.optimizer]),
        activations=int(tokens * (most + element * shape.width * recomputed)),
        loss=chunk * shape.vocabulary * 2 * element,
        gathered=int(gathered),
    )


@dataclass(frozen=True)
class Choice:
    """How the work is cut, and what that takes, if known.

    Args:
        tokens: of a forward pass. recomputed: layers that keep their input alone. offloaded: or layers that
            keep their part on the host. lean: of these, layers that compute q, k and v again.
        cost: time a token, against a pass without limits.
    """

    tokens: int
    recomputed: int
    memory: Memory | None = None
    offloaded: int = 0
    lean: int = 0
    cost: float = 1.0

    def facts(self) -> dict[str, int]:
        """What a checkpoint remembers of it."""
        return {
            "bin_tokens": self.tokens, "recomputed_layers": self.recomputed,
            "offloaded_layers": self.offloaded, "lean_layers": self.lean,
        }  # fmt: skip

    @classmethod
    def kept(cls, metrics: Mapping[str, Any]) -> "Choice":
        """From a checkpoint's metrics."""
        offloaded, lean = (metrics.get(name, 0) for name in ("offloaded_layers", "lean_layers"))
        return cls(
            metrics["bin_tokens"], metrics["recomputed_layers"], offloaded=offloaded, lean=lean
        )

    def __str__(self) -> str:
        work = f"a pass of {self.tokens} tokens that "
        if self.offloaded:
            return f"{work}keeps what {self.offloaded} layers need on the host"
        return f"{work}recomputes {self.recomputed} layers"


def choices(
    shape: Architecture, setup: Setup, sizes: Iterable[int], room: int, recompute: str, spare: int = 0
) -> list[Choice]:  # fmt: skip
    """What fits, from the fastest on.

    Args:
        sizes: tokens of a forward pass that may be. room: bytes of the GPU. recompute: `auto`, `none`, `all` or
            `offload`. spare: bytes of the host that may be taken.
    """
    found: list[Choice] = []
    for size in sizes:
        for cuts in _cuts(shape, setup, size, recompute, spare):
            fitting = (c for c in cuts if c.memory and c.memory.total <= room)
            held = (
                c for c in fitting if c.tokens * host(shape, setup, c.offloaded, c.lean) <= spare
            )
            found += itertools.islice(held, 1)
    return sorted(found, key=lambda choice: choice.cost)


def fits(
    shape: Architecture, setup: Setup, sizes: Iterable[int], room: int, recompute: str, spare: int,
    cut: Choice | None = None,
) -> bool:  # fmt: skip
    """Whether anything does, or if there is one, this cut of the work; the rest as for `choices`."""
    if cut:
        memory = predict(shape, setup, cut.tokens, cut.recomputed, cut.offloaded)
        return memory.total <= room
    return bool(choices(shape, setup, sizes, room, recompute, spare))


def _cuts(
    shape: Architecture, setup: Setup, size: int, recompute: str, spare: int
) -> Iterator[Iterator[Choice]]:
    """Passes of one size that recompute, and passes that offload if they may, each from the fastest on."""
    layers = shape.layers
    numbers = {"auto": range(layers + 1), "none": range(1), "all": range(layers, layers + 1)}
    yield (
        Choice(size, n, predict(shape, setup, size, n), cost=cost(setup, size, n / layers))
        for n in numbers.get(recompute, ())
    )
    numbers = {"auto": range(RESIDENT + 1, layers + 1), "offload": range(layers, layers + 1)}
    if spare or recompute == "offload":
        yield (offloading(shape, setup, size, n) for n in numbers.get(recompute, ()))


def offloading(shape: Architecture, setup: Setup, tokens: int, offloaded: int) -> Choice:
    """A pass whose first layers, so many, keep their part on the host."""
    lean = leanest(shape, setup, offloaded)
    twice = lean * again(shape, True) + (offloaded - lean) * again(shape, False)
    memory = predict(shape, setup, tokens, 0, offloaded)
    return Choice(tokens, 0, memory, offloaded, lean, cost(setup, tokens, twice / shape.layers))


def cost(setup: Setup, tokens: int, twice: float) -> float:
    """Time a token of a pass that computes a share of its products twice, against one without limits.

    A forward pass is a third of the work.
    """
    packed = setup.precision == "nf4" and not setup.unpacked
    return 1 + twice / 3 + (NF4_PASS if packed else PASS) / tokens


def precision(
    shape: Architecture, setup: Setup, sizes: Sequence[int], room: int, recompute: str, possible: Iterable[str],
    spare: int = 0,
) -> str:  # fmt: skip
    """The fastest of the possible precisions that fits; `nf4`, the smallest, if none does."""
    times = {}
    for name in possible:
        found = choices(shape, replace(setup, precision=name), sizes, room, recompute, spare)
        if found:
            times[name] = SLOWER[name] * found[0].cost
    return min(times, key=lambda name: times[name], default="nf4")
