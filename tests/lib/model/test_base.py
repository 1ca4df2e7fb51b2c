"""Bases and adapters that are refused by their files alone, before anything of them is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.model import adapter, adapter_files, load
from stages.lib.model.base import Base
from stages.lib.run.exits import BadData, BadSetting, CannotRun, Missing


def changed(tiny: Path, folder: Path, file: str = "config.json", **more: Any) -> Base:
    """The tiny model with more in one of its configs."""
    shutil.copytree(tiny, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return Base(str(folder), None)


@pytest.mark.case("C7")
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_never_run(tiny: Path, tmp_path: Path, file: str) -> None:
    base = changed(tiny, tmp_path / "base", file, auto_map={"AutoTokenizer": ["own.Own", None]})
    (tmp_path / "base" / "own.py").write_text("open('/tmp/was-run', 'w')\n")
    with pytest.raises(CannotRun, match="needs code of its own"):
        base.fetch(weights=False)


@pytest.mark.case("C9")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantised already \(gptq\)",
        ),
        ({"quantization_config": []}, "quantised already"),
        ({"vision_config": {}, "text_config": {}}, "sees or hears"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_what_cannot_be_tuned_is_named(
    tiny: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(CannotRun, match=words):
        changed(tiny, tmp_path / "base", **more).fetch(weights=False)


@pytest.mark.case("C9")
@pytest.mark.parametrize("kind", ["vit", "of-tomorrow"])
def test_what_is_no_causal_language_model(tiny: Path, tmp_path: Path, kind: str) -> None:
    base = changed(tiny, tmp_path / "base", model_type=kind)
    base.fetch()
    with pytest.raises(CannotRun, match=f"no causal language model.*'{kind}'"):
        load.load(base, "fp32")


@pytest.mark.case("C9")
def test_a_mixture_of_experts_is_a_base_like_others(tmp_path: Path, tiny: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    base = Base(str(tmp_path / "base"), None)
    base.fetch()
    tuned = adapter.attach(load.load(base, "fp32"), base, 2, 4, 0.0, ("q_proj", "v_proj"), 0)
    loss = tuned(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert loss.isfinite()
    assert {name.split(".")[-4] for name, p in tuned.named_parameters() if p.grad is not None} == {
        "q_proj", "v_proj",
    }  # fmt: skip


@pytest.mark.case("C11")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_that_are_tied_are_no_target(tiny: Path, target: str) -> None:
    base = Base(str(tiny), None)
    base.fetch()
    with pytest.raises(BadSetting, match=f"LORA_TARGETS names {target}"):
        adapter.attach(load.load(base, "fp32"), base, 2, 4, 0.0, (target,), 0)


@pytest.mark.case("C6", "C8")
@pytest.mark.parametrize("below", ["", "adapter"])
def test_an_adapter_that_is_a_pickle_is_not_opened(tmp_path: Path, below: str) -> None:
    """It would make a file, were it loaded as pickles are."""

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was-run",)

    folder = tmp_path / "theirs" / below
    folder.mkdir(parents=True)
    torch.save({"a": Bomb()}, folder / adapter_files.PICKLE)
    (folder / adapter_files.CONFIG).write_text("{}")
    with pytest.raises(BadData, match="a pickle, which can hold a program and is never read"):
        adapter_files.find(tmp_path / "theirs")
    (folder / adapter_files.PICKLE).unlink()
    with pytest.raises(Missing, match=r"adapter_model\.safetensors"):
        adapter_files.find(tmp_path / "theirs")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.case("C4")
@pytest.mark.parametrize("change", ["none", "more", "fewer"])
def test_an_adapter_of_others_is_held_against_the_base(
    tiny: Path, tmp_path: Path, change: str
) -> None:
    """Without a manifest, its tensors alone say whether it fits."""
    from safetensors.torch import load_file, save_file

    base = Base(str(tiny), None)
    base.fetch()
    adapter.save(
        adapter.attach(load.load(base, "fp32"), base, 2, 4, 0.0, ("q_proj",), 0), tmp_path / "it"
    )
    path = tmp_path / "it" / adapter_files.WEIGHTS
    weights = load_file(path)
    first = sorted(weights)[0]
    if change == "more":
        weights[first.replace("layers.0", "layers.9")] = weights[first].clone()
    elif change == "fewer":
        del weights[first]
    save_file(weights, path)
    if change == "none":
        adapter.load(load.load(base, "fp32"), tmp_path / "it", base)
        return
    with pytest.raises(BadData, match="made for another base"):
        adapter.load(load.load(base, "fp32"), tmp_path / "it", base)
