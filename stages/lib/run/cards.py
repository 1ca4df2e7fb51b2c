"""Common GPUs before one is rented: memory, speed by the maker's word, and what their architecture can do.

Rates are of dense products with sums in fp32; where a data sheet counts sparsity, half of it. `derived` are
rates that no paper states: cores times clock, at what the architecture's white paper gives for a core.
"""

import re
from dataclasses import dataclass

from stages.lib.run import gpu
from stages.lib.run.exits import BadSetting
from stages.lib.run.settings import did_you_mean

CONTEXT = 1 << 29  # bytes that CUDA itself takes of a GPU before torch has any


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Args:
        name: as it is shown. gigabytes: as it is sold. mebibytes: that the driver has, as nvidia-smi says.
        bf16, fp8, fp32: TFLOP/s, 0 where it has none. bandwidth: of its memory, GB/s. source: of the rates.
        pattern: of the driver's name for it.
    """

    name: str
    gigabytes: int
    mebibytes: int
    capability: gpu.Version
    bf16: float
    fp8: float
    fp32: float
    bandwidth: int
    source: str
    pattern: str

    @property
    def room(self) -> int:
        """Bytes that torch can have."""
        return (self.mebibytes << 20) - CONTEXT

    def lacks(self, precision: str) -> str | None:
        """Why it cannot compute in a BASE_PRECISION; None where it can."""
        why = gpu.lacks(precision, self.name, self.capability)
        return why[0] if why else None

    def rate(self, precision: str) -> float | None:
        """FLOP/s of products with a base in this precision; None where the card has none, and for int8."""
        rates = {"fp8": self.fp8, "fp32": self.fp32, "nf4": self.bf16, "bf16": self.bf16}
        return rates.get(precision, 0) * 1e12 or None


ADA, AMPERE, BLACKWELL = (
    f"NVIDIA white paper, {name} architecture" for name in ("Ada", "GA102", "RTX Blackwell")
)
SHEET = "NVIDIA data sheet"
CARDS = (
    Card("RTX 4060", 8, 8188, (8, 9), 30.2, 60.5, 15.1, 272, f"{ADA}, derived", r"RTX 4060(?! Ti)"),
    Card("RTX 3060", 12, 12288, (8, 6), 25.5, 0, 12.7, 360, f"{AMPERE}, derived", r"RTX 3060(?! Ti)"),
    Card("T4", 16, 15360, (7, 5), 0, 0, 8.1, 320, SHEET, r"\bT4\b"),
    Card("A10G", 24, 23028, (8, 6), 70, 0, 35, 600, "AWS and NVIDIA, A10G product page", r"\bA10G\b"),
    Card("A10", 24, 23028, (8, 6), 125, 0, 31.2, 600, SHEET, r"\bA10\b"),
    Card("L4", 24, 23034, (8, 9), 121, 242, 30.3, 300, SHEET, r"\bL4\b"),
    Card("RTX 3090", 24, 24576, (8, 6), 71, 0, 35.6, 936, AMPERE, r"RTX 3090(?! Ti)"),
    Card("RTX 4090", 24, 24564, (8, 9), 165.2, 330.3, 82.6, 1008, ADA, r"RTX 4090(?! [DL])"),
    Card("RTX 5090", 32, 32607, (12, 0), 209.5, 419, 104.8, 1792, BLACKWELL, r"RTX 5090(?! [DL])"),
    Card("A100 40GB", 40, 40960, (8, 0), 312, 0, 19.5, 1555, SHEET, r"\bA100\b.*\b40 ?GB"),
    Card("L40S", 48, 46068, (8, 9), 362, 733, 91.6, 864, SHEET, r"\bL40S\b"),
    Card("A100 80GB", 80, 81920, (8, 0), 312, 0, 19.5, 2039, SHEET, r"\bA100\b.*\b80 ?GB"),
    Card("H100 PCIe", 80, 81559, (9, 0), 756, 1513, 51, 2000, SHEET, r"\bH100 PCIe\b"),
    Card("H100", 80, 81559, (9, 0), 989.4, 1978.9, 67, 3350, SHEET, r"\bH100\b(?!.*(NVL|PCIe))"),
    Card("H200", 141, 143771, (9, 0), 989.4, 1978.9, 67, 4800, SHEET, r"\bH200\b(?!.*NVL)"),
    Card("B200", 180, 183359, (10, 0), 2250, 4500, 75, 8000, SHEET, r"\bB200\b"),
)  # fmt: skip


def known(name: str) -> Card | None:
    """The card of a driver's name, such as `NVIDIA H100 80GB HBM3`; None for others, and parts of one."""
    if re.search(r"MIG|Laptop", name):
        return None
    return next((card for card in CARDS if re.search(card.pattern, name, re.I)), None)


def named(words: str) -> list[Card]:
    """The cards that a person means: `H100`, `rtx-4090`, `a100-80gb`, or several with commas between them.

    Raises:
        BadSetting: there is none of that name.
    """
    found = []
    for word in words.split(","):
        asked = _plain(word).removeprefix("nvidia").removeprefix("tesla").removeprefix("geforce")
        exact = [card for card in CARDS if _plain(card.name) == asked]
        like = exact or [card for card in CARDS if asked and _plain(card.name).startswith(asked)]
        if not like and (card := known(re.sub(r"[-_]", " ", word))):
            like = [card]
        if not like:
            names = [card.name for card in CARDS]
            raise BadSetting(
                f"GPU {word.strip()!r} is not one that is known here: {', '.join(names)}."
                f"{did_you_mean(word.strip().upper(), names)}"
            )
        found += [card for card in like if card not in found]
    return found


def prices(given: str | None) -> dict[str, float]:
    """What an hour of each card costs, from a setting of `Prices`; a price without a name is that of all.

    Raises:
        BadSetting: a name is not known.
    """
    found: dict[str, float] = {}
    for word in given.split(",") if given else ():
        name, _, price = word.rpartition("=")
        meant = named(name) if name.strip() else CARDS
        found |= dict.fromkeys([card.name for card in meant], float(price))
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
