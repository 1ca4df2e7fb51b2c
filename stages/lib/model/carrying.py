"""What offloaded layers have on the host, how long it takes to get there, what they compute again. No torch."""

import math

from stages.lib.model.architecture import Architecture, Setup

RESIDENT = (
    2  # of the last layers that are offloaded: what they keep would be back before it is gone
)
# Operations of a forward pass in bf16, all its overhead counted, in the time that a byte takes to the host: an
# H200 does 606 tera a second of them beside 50 GB. What is carried must not take longer than what is computed.
LINK = 12000
# Time a token at the 7B shape on an H200, against FP8; NF4 takes what bf16 does, and a little more.
SLOWER = {"fp8": 1.0, "bf16": 1.5, "nf4": 1.55}


def carried(shape: Architecture, setup: Setup, lean: bool = False) -> int:
    """Bytes of a token that an offloaded layer has on the host: its input, attention's output, and q, k, v."""
    return setup.element * (
        shape.width + shape.query + (0 if lean else shape.query + 2 * shape.key)
    )


def sent(offloaded: int) -> int:
    """Layers whose part goes to the host."""
    return max(offloaded - RESIDENT, 0)


def host(shape: Architecture, setup: Setup, offloaded: int, lean: int) -> int:
    """Bytes of a token on the host."""
    full = sent(offloaded) - lean
    return full * carried(shape, setup) + lean * carried(shape, setup, lean=True)


def is_lean(place: int, offloaded: int, lean: int) -> bool:
    """Whether a layer is lean: these lie evenly among those that are sent, whose copies need their time."""
    number = sent(offloaded)
    return place < number and (place + 1) * lean // number != place * lean // number


def leanest(shape: Architecture, setup: Setup, offloaded: int) -> int:
    """Of the offloaded layers the fewest that must compute q, k and v again for the copies to keep up."""
    number = sent(offloaded)
    most, least = carried(shape, setup), carried(shape, setup, lean=True)
    room = 2 * shape.frozen * SLOWER.get(setup.precision, SLOWER["bf16"]) / SLOWER["bf16"] / LINK
    return min(max(math.ceil((number * most - room) / (most - least)), 0), number)


def again(shape: Architecture, lean: bool) -> float:
    """Share of a layer's products that are computed again where it is offloaded."""
    products = {name: out * into for name, (out, into) in shape.projections.items()}
    kept = {"down_proj"} if lean else {"down_proj", "q_proj", "k_proj", "v_proj"}
    return sum(size for name, size in products.items() if name not in kept) / sum(products.values())
