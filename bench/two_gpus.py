"""What a second GPU brings to `train`, on a machine that has two.

`python -m bench.two_gpus`, from the root of the repository; no network, 15 GB in `TMPDIR`, under ten minutes.
The base has the shape of Llama 2 7B and random weights (`bench/train_model.py`); rows are real conversations,
packed, all learned; dropout is 0.05. In FP8 and in NF4 one GPU and two train the same steps, with the same
bins. Then one of two processes is killed, and the same command goes on. Results are JSON, a line for each part:

- `sums`: milliseconds that the sum of a step's gradient takes, and what hosts take to agree before it.
- `speed`: tokens/s by number of GPUs, and `times`, their ratio; `apart`: how far a step's losses are at most.
- `killed`: the exit code, seconds from the kill to the end, and how far the losses are from those of the
  uninterrupted run.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench import conversations
from bench.conversations import ROOT
from bench.train import Bench, Settings

PASS = {"7b": 16384, "tiny": 2048}
STEPS, KILLED_AT = 20, 12  # checkpoints are after steps 5, 10, 15 and 20
RECIPE: Settings = {"MAX_STEPS": str(STEPS), "LORA_DROPOUT": "0.05"}
ELEMENTS = 32 * 2 * 16 * (4096 + 4096)  # of an adapter of rank 16 on q and v
REPEATS = 50


class TwoGpus(Bench):
    """Runs `train` on one and two GPUs."""

    def settings(self, gpus: int, precision: str, shape: str) -> Settings:
        """The same bins whatever the number of GPUs: two a step."""
        size = PASS[shape]
        return RECIPE | {
            "NUM_GPUS": str(gpus), "BASE_PRECISION": precision,
            "MICRO_BATCH_TOKENS": str(size), "BATCH_TOKENS": str(2 * size),
        }  # fmt: skip

    def measured(self, settings: Settings, rows: Path) -> dict[str, Any]:
        """Speed and losses of a run to its end."""
        began = time.monotonic()
        found = self.ours(settings, rows, watched=False)
        metrics = json.loads((self.work / "run/adapter/manifest.json").read_text())["metrics"]
        kept = {name: metrics[name] for name in ("step_seconds", "held_out_loss", "gpus")}
        return found | kept | {
            "losses": losses(metrics), "wall_seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    def killed(self, settings: Settings, rows: Path, whole: list[float]) -> dict[str, Any]:
        """What becomes of a run that loses a process, and of the same command after it."""
        run = self.work / "killed"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(rows / "data", run / "data")
        env = self._settings(run) | settings
        code, seconds = self._until_lost(env | {"FAILPOINTS": f"train.bin={KILLED_AT}:kill@1"})
        recorded = json.loads((run / "error.json").read_text())
        self._run(self._stage("train"), env)
        metrics = json.loads((run / "adapter/manifest.json").read_text())["metrics"]
        return {
            "exit": code, "seconds_from_kill_to_end": seconds, "error": recorded["message"],
            "resumed_from_step": metrics["resumed_from_step"],
            "apart": apart(losses(metrics), whole),
        }  # fmt: skip

    def _until_lost(self, env: Settings) -> tuple[int, float | None]:
        """The exit code, and seconds from when a process of the run was last seen with its like to the end."""
        with (self.work / "lost.log").open("w") as log:
            process = subprocess.Popen(
                self._stage("train"), cwd=self.work, env=env, stdout=log, stderr=log
            )
            most, fell = 0, None
            while process.poll() is None:
                number = ranks()
                most = max(most, number)
                if fell is None and most > 1 and number < most:
                    fell = time.monotonic()
                time.sleep(0.05)
        return process.returncode, fell and round(time.monotonic() - fell, 1)

    def sums(self) -> dict[str, Any]:
        """The collectives alone."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "bench.two_gpus", "--sums", f"--data={self.data}",
        ]  # fmt: skip
        said = self._run(command, self._settings(self.work)).strip()
        return dict(json.loads(said.splitlines()[-1]))


def ranks() -> int:
    """How many processes of a run there are: those that the launcher told their rank, and that live."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = b"\0STAGES_ENDS=" in b"\0" + (folder / "environ").read_bytes()
            rank = b"\0RANK=" in b"\0" + (folder / "environ").read_bytes()
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        found += told and rank and alive
    return found


def losses(metrics: dict[str, Any]) -> list[float]:
    """Of each step, in nats."""
    return [step["loss"] for step in metrics["history"] if "loss" in step]


def apart(one: list[float], other: list[float]) -> float:
    """The largest difference of a step's loss."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def time_sums() -> None:
    """In each of two processes: a step's sum on the GPUs, and the hosts' agreement before it."""
    from stages.lib.run import environment

    rank = environment.take_rank()  # before CUDA looks which GPUs there are
    import torch

    from stages.lib.model import load
    from stages.lib.model.ranks import Ranks

    group = Ranks(rank)
    gradient = torch.zeros(ELEMENTS + 2, device=load.device())
    spent: dict[str, list[float]] = {"sum_ms": [], "agree_ms": []}
    for _ in range(REPEATS):
        for name, work in (("agree_ms", group.agree), ("sum_ms", lambda: group.sum(gradient))):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name].append(1000 * (time.perf_counter() - began))
    if group.first:
        found = {name: round(statistics.median(times), 3) for name, times in spent.items()}
        click.echo(json.dumps(found | {"megabytes": round(gradient.nbytes / 1e6, 1)}))
    group.close()


def say(part: str, found: dict[str, Any], output: Path | None) -> None:
    """Print a part, and add it to the file."""
    line = json.dumps({"part": part} | found)
    click.echo(line)
    if output:
        with output.open("a") as file:
            file.write(line + "\n")


def devices() -> list[str]:
    """The GPUs, as their driver names them."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if not shutil.which(asked[0]):
        return []
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()


@click.command()
@click.option("--shape", default="7b", show_default=True, type=click.Choice(list(PASS)))
@click.option("--precisions", default="fp8,nf4", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A line a part.")
@click.option("--limit", default=240.0, show_default=True, help="Seconds for a process.")
@click.option("--sums", is_flag=True, hidden=True)
@conversations.option
def main(
    shape: str, precisions: str, output: Path | None, limit: float, sums: bool, data: Path
) -> None:
    """Measure one GPU beside two; prints JSON, a line for each part."""
    if sums:
        time_sums()
        return
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    say("machine", {"gpus": devices(), "date": datetime.now(UTC).date().isoformat()}, output)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work = Path(name)
        bench = TwoGpus(work, work / "model", data.resolve(), sys.executable, limit)
        bench.make_model(shape)
        rows = bench.rows("conversations")
        say("sums", bench.sums(), output)
        for precision in precisions.split(","):
            found = {n: bench.measured(bench.settings(n, precision, shape), rows) for n in (1, 2)}
            rates = {n: each["tokens_per_second"] for n, each in found.items()}
            far = apart(found[1]["losses"], found[2]["losses"])
            facts = {"times": round(rates[2] / rates[1], 3), "apart": far, "runs": found}
            say("speed", {"precision": precision, "tokens_per_second": rates} | facts, output)
            if precision == precisions.split(",")[0]:
                settings = bench.settings(2, precision, shape)
                lost = bench.killed(settings, rows, found[2]["losses"])
                say("killed", {"precision": precision} | lost, output)


if __name__ == "__main__":
    main()
