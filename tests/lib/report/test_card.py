"""Cards that the hub reads, for adapters and for merged models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stages.lib.model.base import Base
from stages.lib.report import card

LICENCE = {"license": "other", "license_name": "llama: 3", "license_link": "LICENSE"}
HUB = {"name": "meta/Ll", "revision": "a" * 40, "hub": "meta/Ll", "licence": LICENCE}
TRAINED = {
    "inputs": {"data": "d" * 64},
    "settings": {
        "LORA_RANK": {"value": 8, "from": "preset"}, "MAX_STEPS": {"value": None, "from": "default"},
        "VERBOSE": {"value": False, "from": "default"},
    },
    "metrics": {
        "steps": 1200, "epochs": 2.0, "tokens": 34567, "trained_tokens": 12345, "base_precision": "nf4",
        "held_out_loss": 1.25,
    },
}  # fmt: skip
SOURCES = [
    {"name": "owner/set", "revision": "c" * 40, "weight": 1.0, "files": [{"sha256": "e" * 64}]},
    {"name": "mine/rows.jsonl", "revision": None, "weight": 1.0, "files": []},
]
DATA = {
    "inputs": {"dataset": {"name": "owner/set,mine/rows.jsonl", "sources": SOURCES}},
    "settings": {"MAX_LENGTH": {"value": 512, "from": "flag"}},
    "metrics": {
        "rows_read": 2000, "rows_kept": 1990, "rows_held_out": 100, "tokens": 50000,
        "trainable_tokens": 20000,
    },
}  # fmt: skip
PROMPTS = {
    "template": "x", "golden": {"text": "```\nWhy?"}, "stops": ["### Human:"], "stop_ids": [2, 7],
    "chat_format": "guanaco",
}  # fmt: skip


@pytest.fixture
def made() -> card.Made:
    return card.Made(HUB, PROMPTS, [(TRAINED, 1.0)], {"torch": "2.13.0"}, data=DATA)


def read(made: card.Made) -> ModelCard:
    return ModelCard(card.card(made))


def test_an_adapter_has_a_card_of_pefts_kind(made: card.Made) -> None:
    found = read(made)
    assert found.data.to_dict() == LICENCE | {
        "base_model": "meta/Ll", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "datasets": ["owner/set"], "tags": ["lora", "lora-stages"],
    }  # fmt: skip
    for said in (
        "# Ll-lora", f"`meta/Ll` at revision `{'a' * 40}`", "1,200 steps, 2 epochs", "34,567 tokens",
        f"`owner/set` at revision `{'c' * 40}` (sha256 `{'e' * 64}`)", "1,990 rows of 2,000",
        "LORA_RANK=8\nMAX_LENGTH=512\n", "1.2500", "llama: 3, LICENSE", "torch 2.13.0",
        "`### Human:`, or the token of id 2, or the token of id 7",
    ):  # fmt: skip
        assert said in found.text, said
    assert "````text\n```\nWhy?\n````" in found.text  # a fence that the prompt cannot close
    for unsaid in ("MAX_STEPS", "VERBOSE", "stop_strings", "as trained"):
        assert unsaid not in found.text


def test_a_merged_model_has_its_proof_and_its_evaluation(made: card.Made) -> None:
    sides = {"base": {"loss": 2.5, "by": {}}, "tuned": {"loss": 2.0, "by": {}, "judge": 1.0}}
    found = read(
        replace(
            made, evaluation={"metrics": sides}, merged={"mean_kl": 0.0125, "answers_equal": None},
            closer="MERGE_BASE=original is closer.", adapters=[(TRAINED, 1.0), (TRAINED, -0.5)],
        )
    )  # fmt: skip
    assert found.data.library_name == "transformers"
    assert found.data.to_dict()["base_model_relation"] == "finetune"
    for said in (
        "| loss | 2.5 | 2 |", "| KL from base plus adapter as trained, nats a token | 0.0125 |",
        "MERGE_BASE=original is closer.", 'stop_strings=["### Human:"]', "-0.5 times an adapter",
    ):  # fmt: skip
        assert said in found.text, said
    assert "judge" not in found.text
    assert found.text.count("LORA_RANK=8") == 2
    assert found.text.count("MAX_LENGTH=512") == 1


def test_little_is_known_of_some(made: card.Made) -> None:
    """A local base without a card, plain text, no data, nothing held out."""
    base = {"name": "/models/mine", "revision": None, "hub": None, "licence": {}}
    metrics: dict[str, Any] = TRAINED["metrics"] | {"held_out_loss": None}
    plain = PROMPTS | {"template": None, "stops": []}
    few = replace(
        made, base=base, prompts=plain, data=None, adapters=[(TRAINED | {"metrics": metrics}, 1.0)]
    )
    found = read(few)
    assert set(found.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    for said in (
        "# mine-lora",
        "from `/models/mine`.",
        "plain text",
        "no licence",
        f"`{'d' * 64}`",
    ):
        assert said in found.text, said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# M\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: L\n---\n",
         {"license": "other", "license_name": "own", "license_link": "L"}),
        ("---\nlicense: [\n---\n", {}), ("---\n- license\n---\n", {}), ("# no header\n", {}),
        ("---\nlicense_name: alone\n---\n", {}), (None, {}),
    ],
)  # fmt: skip
def test_the_licence_is_what_the_base_says(
    tmp_path: Path, text: str | None, expected: dict[str, str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    if text:
        (tmp_path / "README.md").write_text(text)
    (tmp_path / "LICENSE.txt").write_text("terms")
    base = Base(str(tmp_path), None)
    base.fetch(weights=False)
    assert base.about() == {
        "name": str(tmp_path), "revision": None, "hub": None, "licence": expected
    }  # fmt: skip
    assert [path.name for path in base.licence_files()] == ["LICENSE.txt"]
