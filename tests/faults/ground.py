"""All stages on a model so small that each takes half a second, and what must be true whatever fails."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.run import failpoints, lease
from tests.conftest import run_stages
from tests.forking import LIBRARIES, Forking, Result, forking, lines
from tests.refusals import write_preset

STEPS = 4  # of a run; each ends in a checkpoint
RECIPE = {
    "DATASET": "rows.jsonl", "BASE_PRECISION": "fp32", "OPTIMIZER": "adamw_torch",
    "VALIDATION_FRACTION": 0.1, "MAX_LENGTH": 128, "BATCH_TOKENS": 256, "MICRO_BATCH_TOKENS": 128,
    "MAX_STEPS": STEPS, "MAX_NEW_TOKENS": 4, "EVALUATION_PROMPTS": 2, "RUN_DIR": "run",
}  # fmt: skip
# Chunks of rows as large data has them, so that there is something to be killed between.
SMALLER = f"""{LIBRARIES}
from stages.lib.data import json_rows, shards
json_rows.CHUNK_ROWS = 10
shards.SECONDS = shards.SPARING = 0
"""
EVERY = ",".join(f"{point}=1+:note" for point in failpoints.POINTS)


@dataclass(frozen=True)
class Scenario:
    """A command and the state that it finds.

    Attributes:
        args: of the command. artifact: what it makes. start: the state, by the command that left it.
        only: points that it is here for, if not for all that it reaches.
        pause: whether it is stopped for so long that its lease's counter has to move.
    """

    args: tuple[str, ...]
    artifact: str
    start: str
    only: tuple[str, ...] = ()
    pause: bool = False

    @property
    def stage(self) -> str:
        return self.args[0]

    @property
    def forced(self) -> bool:
        return "--force" in self.args


GENERATE = ("generate", "--prompts-file", "prompts.jsonl", "--batch-prompts", "1")
RETIRES = ("retire.manifest",)
SCENARIOS = {
    "prepare-data": Scenario(("prepare-data",), "data", "nothing"),
    "train": Scenario(("train",), "adapter", "prepare-data"),
    "train, resumed": Scenario(("train",), "adapter", "half trained"),
    "evaluate": Scenario(("evaluate",), "evaluation", "train"),
    "generate": Scenario(GENERATE, "generations", "train"),
    "merge": Scenario(("merge",), "merged", "train"),
    "export": Scenario(("export",), "gguf", "merge"),
    "prepare-data again": Scenario(("prepare-data", "--force"), "data", "done", RETIRES),
    "train again": Scenario(("train", "--force"), "adapter", "done", RETIRES),
    "evaluate again": Scenario(("evaluate", "--force"), "evaluation", "done", RETIRES),
    "generate again": Scenario((*GENERATE, "--force"), "generations", "done", RETIRES),
    "merge again": Scenario(("merge", "--force"), "merged", "merge", RETIRES),
    "export again": Scenario(("export", "--force"), "gguf", "done", RETIRES),
    "train, slow": Scenario(("train",), "adapter", "prepare-data", ("lease.beat",), pause=True),
}


def whole(folder: Path) -> dict[str, str] | None:
    """The sha256 of each file that a manifest lists, or None without one; not by way of the code under test.

    Raises:
        AssertionError: the manifest is there, and a file is not as it says.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    found = {}
    for name, entry in manifest["files"].items():
        path = folder / name
        assert path.is_file(), f"{path} is in its manifest and is not there"
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found[name] == entry["sha256"], f"{path} is not as its manifest says"
    return found


def checkpoints(run: Path, damaged: bool = False) -> dict[int, dict[str, str]]:
    """The whole checkpoints by their step; `damaged`: some may be what their manifest does not say."""
    found = {}
    for path in sorted((run / "checkpoints").glob("step-*")):
        with contextlib.suppress(*((AssertionError,) if damaged else ())):
            files = whole(path)
            if files is not None:
                found[int(path.name.removeprefix("step-"))] = files
    return found


def lost(before: dict[int, Any], after: dict[int, Any]) -> list[int]:
    """The checkpoints that were removed, or written over, without a newer one."""
    newest = max(after, default=-1)
    return [step for step in before if after.get(step) != before[step] and newest <= step]


class Ground:
    """Runs commands in one folder, from states that are kept beside it."""

    def __init__(self, stages: Forking) -> None:
        self.stages, self.folder = stages, stages.folder
        self.run_dir = self.folder / "run"
        self.traces: dict[str, list[str]] = {}
        self.references: dict[str, dict[str, str]] = {}

    def restore(self, name: str) -> None:
        """Have the run directory as it was in a state, which is made the first time."""
        if not self._kept(name).exists():
            self._make(name)
            self._keep(name)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self._kept(name), self.run_dir)
        shutil.rmtree(self.folder / "scratch")  # a killed command may have left folders and files
        (self.folder / "scratch").mkdir()

    def _kept(self, name: str) -> Path:
        return self.folder / "states" / name

    def _keep(self, name: str) -> None:
        if not self._kept(name).exists():
            shutil.copytree(self.run_dir, self._kept(name))

    def _make(self, name: str) -> None:
        if name == "nothing":
            self.run_dir.mkdir()
        elif name == "half trained":
            self.restore("prepare-data")
            self.run(SCENARIOS["train"], f"checkpoint.saved={STEPS // 2}:kill")
        elif name == "done":
            self.restore("merge")
            for stage in ("evaluate", "generate", "export"):
                assert self.run(SCENARIOS[stage]).returncode == 0
        else:
            self._pass(name)

    def _pass(self, name: str) -> None:
        """Run a scenario undisturbed, and note what it reaches."""
        scenario = SCENARIOS[name]
        self.restore(scenario.start)
        done = self.run(scenario, EVERY)
        assert done.returncode == 0, done.stderr
        made = self.made(scenario)
        assert made
        if name == scenario.stage:
            self.references[name] = made
            self._keep(name)
        assert made == self.reference(scenario), name
        said = (line.split() for line in done.stderr.splitlines())
        self.traces[name] = [
            words[1] for words in said if len(words) == 2 and words[0] == "failpoint"
        ]

    def trace(self, name: str) -> list[str]:
        """The points that a scenario reaches, in their order."""
        if name not in self.traces:
            self._pass(name)
        return self.traces[name]

    def reference(self, scenario: Scenario) -> dict[str, str]:
        """The files that its command makes undisturbed."""
        if scenario.stage not in self.references:
            self._pass(scenario.stage)
        return self.references[scenario.stage]

    def start(self, scenario: Scenario, armed: str = "") -> int:
        """Start its command; the process id. `self.stages.wait()` waits for its end."""
        args = ("--env-file", "small.env", *scenario.args)
        return self.stages.start(*args, FAILPOINTS=armed)

    def run(self, scenario: Scenario, armed: str = "") -> Result:
        """Run its command in the run directory as it is."""
        pid = self.start(scenario, armed)
        if not scenario.pause or not armed:
            return self.stages.wait()
        deadline = time.monotonic() + 30
        while not (self.run_dir / "checkpoints").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(lease.BEAT_SECONDS + 0.2)
        os.kill(pid, signal.SIGCONT)
        return self.stages.wait()

    def beside(self, scenario: Scenario) -> Result:
        """Run its command while another one runs."""
        return run_stages(self.folder, "--env-file", "small.env", *scenario.args)

    def made(self, scenario: Scenario) -> dict[str, str] | None:
        """The files of its artifact, if that is whole."""
        return whole(self.run_dir / scenario.artifact)

    def metrics(self, scenario: Scenario) -> dict[str, Any]:
        """What the manifest of its artifact says was measured."""
        path = self.run_dir / scenario.artifact / "manifest.json"
        return dict(json.loads(path.read_text())["metrics"])

    def error(self) -> dict[str, Any] | None:
        """error.json."""
        path = self.run_dir / "error.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def answered(self) -> int:
        """The answers that `generate` wrote."""
        return len(lines(self.run_dir / "generations" / "generations.jsonl"))


def _write_base(folder: Path) -> None:
    """A random Llama whose tokens are bytes: what costs time elsewhere is the vocabulary."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "is"]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[("i", "s")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@contextlib.contextmanager
def prepared_ground(folder: Path) -> Iterator[Ground]:
    """Everything that the commands read, in `folder`, and the results of a pass without a fault."""
    _write_base(folder / "base")
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(40):
            text = f"### Human: What is {n} and {n}?### Assistant: {'It is ' * (n % 3 + 1)}{2 * n}."
            file.write(json.dumps({"text": text}) + "\n")
    with (folder / "prompts.jsonl").open("w") as file:
        for n in range(4):
            file.write(json.dumps({"prompt": f"What is {n}?"}) + "\n")
    write_preset(folder / "small.env", BASE_MODEL=folder / "base", **RECIPE)
    with forking(folder, before=SMALLER) as stages:
        yield Ground(stages)
