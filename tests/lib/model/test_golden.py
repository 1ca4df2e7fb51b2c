"""Twenty steps whose losses are known: who changes the arithmetic of training learns of it here.

`python -m tests.lib.model.test_golden` makes `golden/losses.json` anew, for a change that is meant. The
conversations are some of OpenAssistant's (Apache-2.0); the weights are drawn by numpy, so that no library's
version matters.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lib.model.conftest import MemoryRows

FOLDER = Path(__file__).parent / "golden"
RECIPE = {
    "learning_rate": 1e-2, "schedule": "cosine", "warmup": 0.1, "max_grad_norm": 1.0, "weight_decay": 0.01,
    "seed": 0,
}  # fmt: skip
OPTIMIZERS = {"fp32": "adamw_torch", "nf4": "adamw_8bit", "fp8": "adamw_8bit"}
# Relative. CPUs sum in different orders, and 20 steps carry on what was rounded otherwise: without AVX, on two
# threads, losses differed by 9e-8, 3e-4 and 1e-3.
TOLERANCE = {"fp32": 1e-5, "nf4": 2e-3, "fp8": 5e-3}
STEPS, TOKENS = 20, 64


def base(folder: Path) -> Path:
    """A tiny Llama in fp32, with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from stages.lib.model import sample

    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    draw(model.named_parameters(), torch)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(sample.folder()).save_pretrained(folder)
    return folder


def draw(named: Any, torch: Any) -> None:
    """Give matrices numbers that depend on their names' order alone."""
    generator = np.random.default_rng(7)
    for _, parameter in sorted(named, key=lambda entry: entry[0]):
        if parameter.dim() > 1:
            drawn = generator.standard_normal(tuple(parameter.shape), dtype=np.float32) * 0.1
            parameter.data.copy_(torch.from_numpy(drawn))


def conversations(folder: Path) -> MemoryRows:
    """Up to 64 tokens of each, the first third not learned."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in (FOLDER / "conversations.jsonl").open()]
    found = [np.array(tokenizer(text)["input_ids"][:TOKENS]) for text in texts]
    return MemoryRows([(ids, np.arange(len(ids)) >= len(ids) // 3) for ids in found])


def train(folder: Path, precision: str, scratch: Path) -> list[dict[str, float]]:
    """Loss and norm of the gradient of each step."""
    import torch

    from stages.lib.data.bins import Schedule
    from stages.lib.model import adapter, load, training
    from stages.lib.model.base import Base
    from stages.lib.model.quick import Quick

    given = Base(str(folder), None)
    given.fetch()
    model = load.load(given, precision, torch.device("cpu"))
    tuned = adapter.attach(model, given, 8, 8, 0.1, ("q_proj", "v_proj"), seed=0)
    draw(((n, p) for n, p in tuned.named_parameters() if "lora_A" in n), torch)
    rows, last = conversations(folder), list[Path]()
    quick = Quick(tuned, precision)
    quick.arrange(0)
    plan = Schedule(rows.lengths, 2 * TOKENS, 2, 1, STEPS, 0)
    training.train(
        quick, plan, rows, MemoryRows(rows.rows[:2]), quick.shape(rows.lengths, 2 * TOKENS), scratch,
        RECIPE | {"optimizer": OPTIMIZERS[precision]}, resume=None, saved=lambda f, *_: last.append(f),
    )  # fmt: skip
    log = json.loads((last[-1] / "trainer_state.json").read_text())["log_history"]
    return [{n: e[n] for n in ("loss", "grad_norm")} for e in log if "loss" in e]


@pytest.fixture(scope="module")
def golden_base(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("golden"))


@pytest.mark.promise("P3")
@pytest.mark.parametrize("precision", OPTIMIZERS)
def test_twenty_steps_are_what_they_were(
    golden_base: Path, tmp_path: Path, precision: str, one_thread: None
) -> None:
    wanted = json.loads((FOLDER / "losses.json").read_text())[precision]
    found = train(golden_base, precision, tmp_path)
    assert len(found) == len(wanted) == STEPS
    for name, much in (("loss", 1), ("grad_norm", 20)):
        values, known = ([entry[name] for entry in side] for side in (found, wanted))
        assert values == pytest.approx(known, rel=much * TOLERANCE[precision]), name
    assert found[-1]["loss"] < 0.99 * found[0]["loss"]


def main() -> None:
    """Write the losses of this program."""
    with tempfile.TemporaryDirectory() as name:
        folder = base(Path(name) / "base")
        found = {p: train(folder, p, Path(name) / p) for p in OPTIMIZERS}
    lines = [
        f'"{p}": [\n' + ",\n".join(" " + json.dumps(entry) for entry in entries) + "\n]"
        for p, entries in found.items()
    ]
    (FOLDER / "losses.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
