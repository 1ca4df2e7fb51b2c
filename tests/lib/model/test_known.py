"""The bases that are listed, and what a config may leave out."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from stages.lib.model import known, sample
from stages.lib.model.architecture import Architecture
from stages.lib.model.base import Base
from stages.lib.run.exits import BadData, CannotRun, Missing

# Parameters that the hub shows for the safetensors of each.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("name", known.SIZES)
def test_a_listed_base_has_as_many_parameters_as_the_hub_says(name: str) -> None:
    config = known.config(name)
    assert config
    shape = Architecture.of(config)
    assert shape
    norms = (2 * shape.layers + 1) * shape.width
    assert shape.frozen + shape.words + norms == PUBLISHED[name]


def test_other_names_are_those_of_listed_bases() -> None:
    assert set(known.ALIKE.values()) <= known.SIZES.keys()
    assert not known.ALIKE.keys() & known.SIZES.keys()
    assert known.config("meta-llama/Llama-2-7b-chat-hf") == known.config("meta-llama/Llama-2-7b-hf")
    assert known.config("owner/another") is None


def test_the_embedded_base_is_what_is_listed(sample_model: Path) -> None:
    whole = json.loads((sample_model / "config.json").read_text())
    assert Architecture.of(whole) == Architecture.of(known.config(sample.HUB_ID) or {})


@pytest.mark.parametrize("kind", sorted(known.COUNTED))
def test_what_a_config_leaves_out_is_what_transformers_supposes(kind: str) -> None:
    """The sizes that are always written, and the others left to their defaults."""
    whole = AutoConfig.for_model(kind).to_dict()
    always = (
        "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "vocab_size",
    )  # fmt: skip
    written = {name: whole[name] for name in always}
    assert Architecture.of(known.filled(written)) == Architecture.of(whole)


def folder(tmp_path: Path, **config: object) -> str:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "base")


def test_a_folder_needs_its_config_alone(tmp_path: Path) -> None:
    base = Base(folder(tmp_path, hidden_size=64, model_type="llama"), None)
    assert base.consult().endswith("base/config.json")
    assert base.config["hidden_size"] == 64


def test_a_base_that_cannot_be_used_is_refused_by_its_config(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="quantised already"):
        Base(folder(tmp_path, quantization_config={"quant_method": "gptq"}), None).consult()
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(BadData, match="not valid JSON"):
        Base(str(tmp_path / "base"), None).consult()
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(Missing, match=r"no config\.json"):
        Base(str(tmp_path / "base"), None).consult()
