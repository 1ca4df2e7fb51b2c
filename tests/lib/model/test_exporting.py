"""A model in a GGUF file is the model: read back by us, and by transformers, which computes the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stages.lib.model import exporting, gguf_layout
from stages.lib.model.exporting import KINDS, Export
from stages.lib.run.exits import CannotRun, GateFailed

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = 320
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"w{n}" for n in range(WORDS)],
    "tokenizer.ggml.token_type": [1] * WORDS, "tokenizer.ggml.merges": ["w 1"],
    "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.scores": [-0.1] * WORDS,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "biased": LlamaConfig(**SIZES, attention_bias=True, rope_parameters=LINEAR),
    "mistral": MistralConfig(**SIZES, sliding_window=128),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=128),
}


def model(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model whose every weight matters."""
    torch.manual_seed(0)
    config = MODELS[name]
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    made.to(dtype).save_pretrained(folder)
    return folder


def exported(folder: Path, kind: str = "auto") -> tuple[Export, Path]:
    job = Export(folder, kind, VOCABULARY, "it")
    path = folder / exporting.FILE
    with path.open("wb") as file:
        job.write(folder, file)
    return job, path


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "AT_ONCE", 1000)  # every weight in several parts
    folder = model(tmp_path, name)
    job, path = exported(folder)
    report, read = job.compare(path)
    assert report["exact_tensors"] == report["tensors"] == len(job.tensors)
    assert report["relative_error"] == 0
    assert job.size < report["bytes"] == path.stat().st_size < job.size + 40_000
    assert read["general.architecture"] == ("llama" if name not in ("qwen2", "qwen3") else name)
    assert read["general.file_type"] == 32  # bf16
    assert read[f"{job.architecture}.context_length"] == (128 if name == "mistral" else 256)
    if name in ("llama3", "biased", "mistral"):  # of which transformers does not read all
        return
    ids = torch.arange(3, 60).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-5)


def test_llama3_frequencies(tmp_path: Path) -> None:
    """llama.cpp divides by them: long waves eightfold, short ones not at all."""
    factors = gguf_layout.rope_factors(MODELS["llama3"])
    assert factors is not None
    assert factors.shape == (8,)
    assert factors[0] == 1
    assert torch.allclose(factors[-1], torch.tensor(8.0))
    assert ((factors[1:] - factors[:-1]) >= -1e-5).all()
    assert gguf_layout.rope_factors(MODELS["llama"]) is None
    job, _ = exported(model(tmp_path, "llama3"))
    assert [tensor.name for tensor in job.tensors][-1] == "rope_freqs.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_types(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    job, path = exported(model(tmp_path, "tied", dtype), kind)
    report, _ = job.compare(path)
    names = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    exact = kind in ("auto", "f32") or names.get(kind) == dtype
    assert (report["relative_error"] == 0) is exact
    least, most = {"bf16": (1e-4, 3e-3), "f16": (0, 4e-4), "q8_0": (1e-3, 1e-2)}.get(kind, (0, 0))
    assert exact or least < report["relative_error"] < most


def test_a_weight_too_large_for_the_type(tmp_path: Path) -> None:
    folder = model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateFailed, match=r"lm_head.weight has numbers that f16 cannot hold"):
        exported(folder, "f16")
    job, path = exported(folder)
    job.compare(path)


@pytest.mark.parametrize("kind", ["auto", "q8_0"])
@pytest.mark.parametrize("where", ["first weight", "last weight", "a word", "a size"])
def test_damage_is_seen(tmp_path: Path, where: str, kind: str) -> None:
    job, path = exported(model(tmp_path, "llama"), kind)
    job.compare(path)
    content = bytearray(path.read_bytes())
    at = {
        "first weight": len(content) - job.size + 1,
        "last weight": len(content) - 1,
        "a word": content.index(b"w17"),
        "a size": content.index(b"llama.block_count") + len("llama.block_count") + 4,
    }[where]
    content[at] ^= 64
    path.write_bytes(content)
    with pytest.raises(GateFailed, match=r"read back from model.gguf otherwise"):
        job.compare(path)


def test_rows_in_the_wrong_order_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_layout, "interleaved", lambda rows, heads: torch.arange(rows))
    job, path = exported(model(tmp_path, "llama"))
    with pytest.raises(GateFailed, match=r"the weight blk.0.attn_[qk].weight"):
        job.compare(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel cannot be exported: LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "unusual hidden_act"),
        ({"num_hidden_layers": 1}, "the weight model.layers.1.* has no place"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = model(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in change:
        config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CannotRun, match=words):
        Export(folder, "auto", VOCABULARY, "it")


def test_the_name_holds_no_path() -> None:
    inputs = {"base": {"name": "/home/me/models/mine"}}
    assert exporting.title(inputs) == "mine tuned"
