"""export: from a run's merged model to a GGUF file that llama.cpp reads as we wrote it."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.lib.data.formats import GOLDEN, Format, choose
from stages.lib.data.templates import Segment
from stages.lib.data.tokens import Tokens
from stages.lib.run import artifact
from tests.conftest import ROOT, Stages
from tests.forking import run_forked
from tests.test_bad_input import mounted
from tests.test_hub import Result, sentence

TEXTS = (
    "Hello world", " leading", "trailing  ", "a  b   c    d", "tab\tand\nnew\n\nline\r\n",
    "1234567890 3.14159 12,345", "ünïcode ßtraße мир", "日本語のテキスト", "emoji 🎉👩‍👩‍👧",
    "it's we'll I'd DON'T",
    "def f(x):\n    return x**2  # ok", "<|im_end|> is text", "\u00a0nbsp\u2003em", "e\u0301", "   \n   \n  x",
)  # fmt: skip


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    """Run a command in this test's own folder; most of them load a model or a tokenizer."""
    return partial(run_forked, tmp_path)


def publish(source: Path, target: Path, inputs: dict[str, Any]) -> str:
    """An artifact of what lies in a folder; its digest."""
    manifest = {"stage": "it", "inputs": inputs, "settings": {}, "metrics": {}}
    return artifact.publish(source, target, manifest).digest


def make_run(folder: Path, model: Path, tokens: Tokens, chat_format: Format) -> Path:
    """A run directory with `adapter/` and `merged/`, as far as export reads them."""
    made = folder / "made"
    (made / "adapter").mkdir(parents=True)
    chat_format.save(made / "adapter")
    tokens.save(made / "adapter", chat_format.source)
    shutil.copytree(model, made / "merged")
    tokens.save(made / "merged", chat_format.source)
    adapter = publish(made / "adapter", folder / "run" / "adapter", {})
    inputs = {"adapter": adapter, "base": {"name": str(model), "revision": None}}
    publish(made / "merged", folder / "run" / "merged", inputs)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run directory and what export said of it."""
    folder = tmp_path_factory.mktemp("export")
    tokens = Tokens(tiny)
    run = make_run(folder, tiny, tokens, choose("guanaco", tokens, (), "assistant")[0])
    return run, run_forked(folder, "export", "--run-dir", str(run))


def test_the_artifact(exported: tuple[Path, Result], stages: Stages, tiny: Path) -> None:
    run, result = exported
    assert result.returncode == 0, result.stderr
    made = artifact.load(run / "gguf", deep=True)
    assert made is not None
    assert sorted(made.manifest["files"]) == ["Modelfile", "export_report.json", "model.gguf"]
    report = json.loads((run / "gguf" / "export_report.json").read_text())
    remarks = report.pop("remarks")
    assert made.metrics == report
    assert report["exact_tensors"] == report["tensors"] == 20
    assert report["vocabulary"] == 49152
    assert report["bytes"] == (run / "gguf" / "model.gguf").stat().st_size
    assert len(remarks) == 1
    assert "--reverse-prompt '### Human:'" in result.stderr
    assert str(tiny).encode() not in (run / "gguf" / "model.gguf").read_bytes()
    began = time.monotonic()
    again = stages("export", "--run-dir", run)
    assert again.returncode == 0, again.stderr
    assert "finished and nothing changed" in again.stderr
    assert time.monotonic() - began < 3


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"
)
def test_llama_cpp_says_the_same(exported: tuple[Path, Result], tiny: Path) -> None:
    """Ids of texts, ids of a prompt with its special tokens, and a greedy answer."""
    run, _ = exported
    tokens = Tokens(run / "merged")
    chat_format = Format.load(run / "adapter", tokens)
    prompt = chat_format.prompt(GOLDEN)
    asked = {
        "texts": TEXTS, "prompts": [chat_format.prompt_text(GOLDEN)], "ids": [prompt], "n": 16,
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "llama_cpp.py", run / "gguf" / "model.gguf"],
        input=json.dumps(asked), text=True, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    for text, ids in zip(TEXTS, answer["texts"], strict=True):
        assert tokens.encode([[Segment(text, False)]]).ids.tolist() == ids, text
    assert answer["prompts"] == [prompt]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        said = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert said[0, len(prompt) :].tolist() == answer["ids"][0]


# --- refusals --------------------------------------------------------------------------------------


@pytest.fixture
def run(exported: tuple[Path, Result], tmp_path: Path) -> Path:
    """The run directory before export, to change."""
    return Path(
        shutil.copytree(exported[0], tmp_path / "run", ignore=shutil.ignore_patterns("gguf"))
    )


def test_inputs_that_are_missing_corrupt_or_stale(stages: Stages, run: Path) -> None:
    path = run / "merged" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert str(path) in sentence(stages("export", "--run-dir", run), 65)
    path.write_bytes(content)
    source = shutil.copytree(
        run / "adapter", run.parent / "a", ignore=shutil.ignore_patterns("manifest.json")
    )
    (source / "more.txt").write_text("another")
    shutil.rmtree(run / "adapter")
    publish(source, run / "adapter", {})
    said = sentence(stages("export", "--run-dir", run), 78)
    assert "input adapter was" in said
    assert "run `merge` again" in said
    shutil.rmtree(run / "merged")
    assert "run `merge` first" in sentence(stages("export", "--run-dir", run), 66)
    assert not (run / "gguf").exists()


@pytest.mark.case("C12")
def test_a_small_disk(stages: Stages, run: Path, tmp_path: Path) -> None:
    """The room is looked at before a byte is written."""
    with mounted(tmp_path / "small", "size=16m") as small:
        shutil.copytree(run, small / "run")
        assert "MiB free" in sentence(stages("export", "--run-dir", small / "run"), 73)
        assert not (small / "run" / "gguf").exists()
