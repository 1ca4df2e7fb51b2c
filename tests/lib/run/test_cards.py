"""The GPUs that are known: by the driver's name, and by what a person calls them."""

import pytest

from stages.lib.run import cards, gpu
from stages.lib.run.cards import CARDS
from stages.lib.run.exits import BadSetting

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_the_drivers_name_tells_the_card(name: str, found: str | None) -> None:
    card = cards.known(name)
    assert (card and card.name) == found


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("H100", ["H100"]),
        ("rtx-4090", ["RTX 4090"]),
        ("nvidia-l4", ["L4"]),
        ("nvidia-tesla-t4", ["T4"]),
        ("a100", ["A100 40GB", "A100 80GB"]),
        ("NVIDIA-A100-SXM4-80GB", ["A100 80GB"]),
        ("h200, L40S,h200", ["H200", "L40S"]),
    ],
)
def test_a_person_may_say_it_shorter(words: str, found: list[str]) -> None:
    assert [card.name for card in cards.named(words)] == found


@pytest.mark.parametrize("words", ["Z9", "", "H100,", "g5.xlarge"])
def test_a_name_that_is_not_known_is_refused_with_those_that_are(words: str) -> None:
    with pytest.raises(BadSetting, match=r"RTX 4060, .*, B200"):
        cards.named(words)


def test_prices_are_of_one_kind_or_of_all() -> None:
    assert cards.prices(None) == {}
    assert cards.prices("2.5") == {card.name: 2.5 for card in CARDS}
    assert cards.prices("H100=2.5, a100=1") == {"H100": 2.5, "A100 40GB": 1, "A100 80GB": 1}
    with pytest.raises(BadSetting):
        cards.prices("Z9=1")


def test_the_table_holds_together() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        # What the driver has is what is sold, in one of the two units, less what error correction takes.
        assert 0.93 * card.gigabytes * 1e9 < card.mebibytes << 20 <= card.gigabytes * GIB, card.name
        assert card.room < card.mebibytes << 20
        assert bool(card.bf16) == (card.lacks("bf16") is None) == (card.capability >= gpu.BF16)
        assert bool(card.fp8) == (card.lacks("fp8") is None) == (card.capability >= gpu.FP8)
        assert not card.fp8 or card.fp8 == pytest.approx(2 * card.bf16, rel=0.02), card.name
        assert card.fp32 < card.bf16 or not card.bf16
        assert card.rate("int8") is None
    assert [card.gigabytes for card in CARDS] == sorted(card.gigabytes for card in CARDS)
