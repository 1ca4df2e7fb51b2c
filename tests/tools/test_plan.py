"""plan: from the command line, without torch, weights, a token or a network."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Stages, clean_environment
from tests.hub_server import Hub

LLAMA = ("--env-file", str(ROOT / "env" / "llama2-7b.env"))
ASKED = """
import json, sys
from stages.__main__ import main
try:
    main()
finally:
    print(json.dumps(sorted({"torch", "transformers", "datasets", "pandas"} & sys.modules.keys())))
"""
KEYS = {
    "schema": None, "verdict": None, "notes": None, "batch_tokens": None, "recompute": None, "num_gpus": None,
    "base": {"name", "config_from", "model_type", "parameters"},
    "adapter": {"rank", "targets", "parameters", "optimizer"},
    "amount": {"tokens", "steps", "longest_row", "evaluated_tokens", "at_most", "source"},
    "gpus": {
        "gpu", "gigabytes", "fits", "why_not", "base_precision", "dequantised_once", "pass_tokens",
        "recomputed_layers", "offloaded_layers", "bytes", "bytes_by_part", "bytes_planned_for", "host_bytes",
        "tokens_per_second", "seconds", "cost", "seconds_per_million_tokens", "cost_per_million_tokens",
    },
    "memory": {
        "base_precision", "dequantised_once", "pass_tokens", "weights", "adapter", "optimizer", "loss",
        "activations", "activations_recomputed", "total", "total_recomputed",
    },
    "off": {"measured_runs", "memory_percent", "speed_percent", "beside"},
}  # fmt: skip
Result = subprocess.CompletedProcess[str]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A base whose weights and tokenizer nobody may ask for."""
    folder = tmp_path / "small"
    folder.mkdir()
    sizes = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000, "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def hub(small: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.push("models", "owner/small", small)
        yield hub


def told(done: Result) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_classic_preset_without_a_token_a_network_or_torch(tmp_path: Path) -> None:
    """Within a second where nothing else runs; what is counted is the time of a core."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", ASKED, *LLAMA, "plan", "--price-per-hour", "3"], text=True, check=False,
        cwd=tmp_path, env=clean_environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}, capture_output=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    *page, heavy = done.stdout.splitlines()
    assert json.loads(heavy) == []
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert page[0].startswith("meta-llama/Llama-2-7b-hf in nf4: 8,388,608 trainable parameters")
    assert "It fits 15 of 16 kinds of GPU, from 8 GB on (RTX 4060)." in page
    assert any(line.startswith("At most 972,800 tokens in 60 steps: ") for line in page)
    assert any(line.startswith("It costs at most ") for line in page)
    assert not list(tmp_path.glob("runs*"))


def test_the_same_for_programs(stages: Stages) -> None:
    found = told(
        stages(*LLAMA, "plan", "--json", env={"PRICE_PER_HOUR": "H200=3.6", "GPU": "h200,t4"})
    )
    assert found.keys() == KEYS.keys()
    for name, keys in KEYS.items():
        for part in found[name] if name in ("gpus", "memory") else [found[name]]:
            assert keys is None or part.keys() == keys, name
    large, small = found["gpus"]
    assert (large["gpu"], small["gpu"], small["fits"]) == ("H200", "T4", False)
    assert sum(large["bytes_by_part"].values()) == large["bytes"]
    assert large["cost"] == pytest.approx(large["seconds"] * 0.001, abs=1e-3)
    assert small["cost"] is small["tokens_per_second"] is None
    assert found["amount"]["at_most"]
    assert found["schema"] == 1


def test_it_takes_every_setting_of_train(stages: Stages) -> None:
    settings = (
        "--rank=8", "--alpha=4", "--learning-rate=1e-3", "--targets=all-linear", "--max-steps=10",
        "--batch-tokens=32768", "--micro-batch-tokens=8192", "--recompute=all", "--num-gpus=2", "--gpu=H100",
    )  # fmt: skip
    found = told(stages(*LLAMA, "plan", "--json", *settings))
    assert found["adapter"]["parameters"] == 8 * 32 * (4 * 8192 + 3 * (4096 + 11008))
    assert (found["amount"]["tokens"], found["amount"]["steps"]) == (327680, 10)
    assert {m["pass_tokens"] for m in found["memory"]} == {8192}
    assert found["gpus"][0]["recomputed_layers"] == 32
    assert found["num_gpus"] == 2


def test_a_folder_with_a_config_and_no_weights(stages: Stages, small: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(small / "config.json", tmp_path / "bare")
    found = told(stages("plan", "--json", "--base-model", "bare", "--max-length", "512"))
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert found["base"]["parameters"] == 2 * 1000 * 64 + 2 * layer
    assert found["base"]["config_from"] == "bare/config.json"


def test_of_the_hub_the_config_alone_is_fetched(stages: Stages, hub: Hub) -> None:
    env = {"BASE_MODEL": "owner/small", "HF_ENDPOINT": hub.url, "MAX_LENGTH": "512"}
    found = told(stages("plan", "--json", env=env))
    assert found["base"]["config_from"].startswith("the hub, at ")
    assert found["amount"]["tokens"] is None
    fetched = [path for _, path, *_ in hub.requests if "/resolve/" in path or "/large/" in path]
    assert fetched
    assert all(path.endswith("/config.json") for path in fetched), fetched
    again = told(stages("plan", "--json", env=env | {"HF_HUB_OFFLINE": "1"}))
    assert again["base"]["config_from"] == "the hub's cache"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--base-model", "/no/where"), 66, "there is no base model at /no/where"),
        (("--base-model", "no/where"), 66, "no/where is not in the cache"),
        (("--gpu", "Z9"), 2, "GPU 'Z9' is not one that is known here"),
        (("--price-per-hour", "1,2"), 2, "has a price without a name"),
        (("--price-per-hour", "H100=0"), 2, "'0' is not a finite number above 0"),
        (("--price-per-hour", "Z9=1"), 2, "GPU 'Z9' is not one"),
        (("--targets", "query"), 2, "LORA_TARGETS names query, which this base has not"),
        (("--micro-batch-tokens", "3000"), 2, "is no multiple of MICRO_BATCH_TOKENS 3000"),
        (("--max-length", "5000"), 2, "over the context of meta-llama/Llama-2-7b-hf, 4096 tokens"),
    ],
)
def test_a_mistake_is_one_sentence(
    stages: Stages, flags: tuple[str, ...], code: int, said: str
) -> None:
    done = stages(*LLAMA, "plan", *flags, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2", "n_embd": 64}, "gpt2 has other sizes in its config"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "mixtral has experts (num_local_experts)",
        ),
    ],
)
def test_a_base_that_cannot_be_planned_for(
    stages: Stages, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    done = stages("plan", "--base-model", "./base")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "let `train` find out" in done.stderr
