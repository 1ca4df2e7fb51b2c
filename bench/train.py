"""How fast `train` goes on one GPU, beside Unsloth, TRL with Liger, and the classic notebook.

`python -m bench.train`, from the root of the repository. All train the same rows of the same model,
one after the other, each in a process of its own: ours through `python -m stages train`, with its
logs, evaluations and checkpoints, its speed from the adapter's manifest; the peers as
`bench/train_peers.py` says. The base has the shape of Llama 2 7B and random weights
(`bench/train_model.py`); adapters have rank 16 and dropout 0.05; all tokens are learned. Rows are
prepared once, by `prepare-data`. `bench/train_results.py` says what the ceiling is.
"""

import json
import os
import pty
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench import conversations
from bench.conversations import ROOT
from bench.train_results import CEILING, SEVEN, START, merge, operations, table

RESULTS = ROOT / "bench/results/train.json"
LENGTH = 2048
DENSE_ROWS = 320  # for 38 steps of ours, and what is held out

Settings = dict[str, str]
FP8: Settings = {"BASE_PRECISION": "fp8", "RECOMPUTE": "none", "MAX_STEPS": "32"}
NF4: Settings = {"BASE_PRECISION": "nf4", "RECOMPUTE": "none", "MAX_STEPS": "24"}
SMALL: Settings = {
    "BASE_PRECISION": "nf4", "RECOMPUTE": "offload", "MICRO_BATCH_TOKENS": "8192", "MAX_STEPS": "12",
}  # fmt: skip
FEW: Settings = {"MAX_STEPS": "9"}  # the second is not followed by an evaluation

# Which rows, and what each system gets: ours settings, a peer its name and flags.
WORKLOADS: dict[str, tuple[str, dict[str, Settings | str]]] = {
    "dense": ("dense", {
        "lora-stages FP8": FP8, "lora-stages NF4": NF4, "Unsloth": "unsloth --batch 4",
        "TRL + Liger": "trl --batch 4", "notebook": "notebook --batch 4",
    }),
    "all-linear": ("dense", {
        "lora-stages FP8": FP8 | {"LORA_TARGETS": "all-linear"},
        "lora-stages NF4": NF4 | {"LORA_TARGETS": "all-linear"},
        "Unsloth": f"unsloth --batch 4 --targets {SEVEN}",
        "TRL + Liger": f"trl --batch 4 --targets {SEVEN}",
    }),
    "small": ("dense", {
        "lora-stages NF4": SMALL, "Unsloth": "unsloth --checkpointing --batch 8",
        "notebook": "notebook --checkpointing --batch 8",
    }),
    "conversations": ("conversations", {
        "lora-stages FP8": FP8, "lora-stages NF4": NF4,
        "Unsloth packed": "unsloth --packing --batch 4 --steps 24",
        "Unsloth padded": "unsloth --batch 8 --steps 24",
        "notebook": "notebook --checkpointing --batch 8 --steps 16",
    }),
    START: ("dense", {
        "lora-stages FP8": FP8 | FEW, "lora-stages NF4": NF4 | FEW,
        "Unsloth": "unsloth --batch 4 --steps 5",
    }),
}  # fmt: skip


class Bench:
    """Runs the systems.

    Args:
        work: for the model, rows and runs. model: a folder. data: conversations in JSONL. python: of the peers.
        limit: seconds for a process.
    """

    def __init__(self, work: Path, model: Path, data: Path, python: str, limit: float) -> None:
        self.work, self.model, self.data, self.python, self.limit = work, model, data, python, limit

    def make_model(self, shape: str) -> None:
        """Write it, in a process that gives the GPU back."""
        self.model.mkdir()
        self._own("train_model", str(self.data), str(self.model), shape)

    def rows(self, name: str) -> Path:
        """The run directory where these rows are prepared, once; the peers' are beside `data/`."""
        folder = self.work / name
        if not (folder / "rows.json").is_file():
            source = self.data
            if name == "dense":
                source = write_dense(self.data, self.work / "dense.jsonl")
            settings = {"DATASET": str(source), "LOSS_ON": "all", "MAX_LENGTH": str(LENGTH)}
            self._run(self._stage("prepare-data"), self._settings(folder) | settings)
            write_ids(folder / "data" / "train.arrow", folder / "rows.json")
        return folder

    def ours(self, settings: Settings, rows: Path, watched: bool) -> dict[str, Any]:
        """Our own stage, on prepared rows; where `watched`, with seconds to its second step."""
        run = self.work / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(rows / "data", run / "data")
        env = self._settings(run) | settings
        if watched:
            seconds = self._watch(self._stage("train"), env)
        else:
            self._run(self._stage("train"), env)
        manifest = json.loads((run / "adapter" / "manifest.json").read_text())
        metrics = manifest["metrics"]
        return {
            "tokens_per_second": metrics["tokens_per_second"],
            "peak_gib": round((metrics["peak_gpu_bytes"] or 0) / 2**30, 2),
            "versions": manifest["versions"], "settings": settings,
            "loss": round(metrics["loss"], 4), "steps": metrics["steps"],
            "bin_tokens": metrics["bin_tokens"], "recomputed_layers": metrics["recomputed_layers"],
            "offloaded_layers": metrics["offloaded_layers"],
        } | ({"seconds_to_second_step": seconds} if watched else {})  # fmt: skip

    def peer(self, flags: str, rows: Path) -> dict[str, Any]:
        """A peer, on the same rows."""
        files = {"model": self.model, "rows": rows / "rows.json", "out": self.work / "peer"}
        given = [f"--{name}={path}" for name, path in files.items()]
        begun = time.time()
        found = self._own("train_peers", *flags.split(), *given, python=self.python)
        took = round(found.pop("second_step_at") - begun, 1)
        return found | {"settings": flags, "seconds_to_second_step": took}

    def ceiling(self, precision: str) -> dict[str, Any]:
        """The products alone."""
        command = [sys.executable, "-m", "bench.train_ceiling", str(self.model), precision]
        return _last(self._run(command, self._settings(self.work))) | {"settings": precision}

    def _own(self, script: str, *rest: str, python: str = sys.executable) -> dict[str, Any]:
        """What a script beside this one prints; -P keeps its neighbours out of what it imports."""
        command = [python, "-P", str(ROOT / f"bench/{script}.py"), *rest]
        return _last(self._run(command, dict(os.environ)))

    def _stage(self, name: str) -> list[str]:
        return [sys.executable, "-m", "stages", name]

    def _settings(self, run: Path) -> Settings:
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": paths, "RUN_DIR": str(run), "BASE_MODEL": str(self.model)}
        return os.environ | own | {"HF_HUB_OFFLINE": "1"}

    def _run(self, command: list[str], env: Settings) -> str:
        """Standard output of a process; it starts in the work folder, because Unsloth writes there."""
        with (self.work / "log").open("w+") as log:
            done = subprocess.run(
                command, cwd=self.work, env=env, stdout=subprocess.PIPE, stderr=log, text=True,
                timeout=self.limit, check=False,
            )  # fmt: skip
            log.seek(0)
            if done.returncode:
                said = f"{log.read()}\n{done.stdout}"[-3000:]
                raise click.ClickException(f"{command} ended with {done.returncode}:\n{said}")
        return done.stdout

    def _watch(self, command: list[str], env: Settings) -> float:
        """Seconds until the progress bar, on a terminal that we hold, shows the second step."""
        ours, its = pty.openpty()
        begun, seen, said = time.perf_counter(), 0.0, ""
        process = subprocess.Popen(
            command, cwd=self.work, env=env, stdout=subprocess.DEVNULL, stderr=its
        )
        os.close(its)
        limit = threading.Timer(self.limit, process.kill)
        limit.start()
        while chunk := _read(ours):
            said = (said + re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", chunk))[-3000:]
            shown = re.findall(r"(\d+)/\d+ +steps", said)
            if not seen and shown and int(shown[-1]) >= 2:
                seen = time.perf_counter() - begun
        os.close(ours)
        code = process.wait()
        limit.cancel()
        if code or not seen:
            raise click.ClickException(f"{command} ended with {code}:\n{said}")
        return round(seen, 1)


def _read(terminal: int) -> str:
    """What a terminal shows next; nothing when its other end is closed, which Linux says by an error."""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:
        return ""


def _last(said: str) -> dict[str, Any]:
    """The JSON line that standard output ends with."""
    return dict(json.loads(said.strip().splitlines()[-1])) if said.strip() else {}


def write_dense(source: Path, target: Path) -> Path:
    """Texts that fill a row, each of conversations from another place on and with a number in front."""
    with source.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].replace("###", "") for line in lines]
    with target.open("w", encoding="utf-8") as out:
        for number in range(DENSE_ROWS):
            first = number * 7 % len(texts)
            text = " ".join([str(number), *texts[first:], *texts[:first]])[: 10 * LENGTH]
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return target


def write_ids(arrow: Path, target: Path) -> None:
    """The rows that are trained on as lists of token ids in JSON, for the peers."""
    import pyarrow as pa

    with pa.OSFile(str(arrow)) as file:
        target.write_text(json.dumps(pa.ipc.open_stream(file).read_all()["input_ids"].to_pylist()))


def hardware() -> dict[str, Any]:
    """The GPU, as its driver names it."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if not shutil.which(asked[0]):
        return {"gpu": None}
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    gpu, driver = said.split(", ")
    return {"gpu": gpu, "driver": driver}


def measure(bench: Bench, workload: str, system: str, repeat: int) -> dict[str, Any]:
    """One system on one workload: the median of its runs, and their speeds."""
    rows_name, systems = WORKLOADS[workload]
    what, rows = systems[system], bench.rows(rows_name)
    runs = []
    for _ in range(repeat + (workload == START)):  # the first start compiles
        if isinstance(what, str):
            runs.append(bench.peer(what, rows))
        else:
            runs.append(bench.ours(what, rows, watched=workload == START))
    runs = runs[workload == START :]
    speeds = [run["tokens_per_second"] for run in runs]
    middle = min(runs, key=lambda run: abs(run["tokens_per_second"] - statistics.median(speeds)))
    config = json.loads((bench.model / "config.json").read_text())
    lengths = [len(row) for row in json.loads((rows / "rows.json").read_text())]
    targets = SEVEN if workload == "all-linear" else "q_proj,v_proj"
    return middle | {"runs": speeds, "gflop_per_token": operations(config, targets, lengths)}


def measure_ceiling(bench: Bench, system: str) -> dict[str, Any]:
    """The products alone; as tokens a second, what they would allow on full rows."""
    config = json.loads((bench.model / "config.json").read_text())
    needs = operations(config, "q_proj,v_proj", [LENGTH])
    found = bench.ceiling(system.lower())
    return found | {"tokens_per_second": round(found["tflops"] * 1e3 / sum(needs.values()), 1)}


def wanted(workloads: str, systems: str) -> list[tuple[str, str]]:
    """Workloads and systems to measure; a system is chosen by how its name begins."""
    known = {CEILING: ["bf16", "FP8"]} | {name: list(found[1]) for name, found in WORKLOADS.items()}
    chosen = [name for name in workloads.split(",") if name]
    for name in chosen:
        if name not in known:
            raise click.UsageError(f"{name} is none of {', '.join(known)}")
    beginnings = tuple(systems.split(","))
    return [
        (name, system)
        for name in chosen
        for system in known[name]
        if name == CEILING or system.lower().startswith(beginnings)
    ]


@click.command()
@click.option("--workloads", default=",".join([CEILING, *WORKLOADS]), show_default=True)
@click.option(
    "--systems", default="lora-stages,unsloth,trl,notebook", show_default=True,
    help="Beginnings of names.",
)  # fmt: skip
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--model", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Llama-like folder. [default: one of --shape is made]",
)  # fmt: skip
@click.option("--shape", default="7b", show_default=True, type=click.Choice(["7b", "tiny"]))
@conversations.option
@click.option(
    "--peers-python", default=sys.executable, show_default=True,
    help="Interpreter of the peers, which want other versions than we do.",
)  # fmt: skip
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Kept, if given.")
@click.option("--limit", default=240.0, show_default=True, help="Seconds for a process.")
@click.option(
    "--output", default=RESULTS, show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)
def main(
    workloads: str, systems: str, repeat: int, model: Path | None, shape: str, data: Path,
    peers_python: str, work: Path | None, limit: float, output: Path,
) -> None:  # fmt: skip
    """Measure train beside the others; results go into a file as they come, and are printed as a table."""
    pairs = wanted(workloads, systems)
    order = wanted(",".join([CEILING, *WORKLOADS]), "")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = (work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        base = (model or folder / f"model-{shape}").resolve()
        bench = Bench(folder, base, data.resolve(), peers_python, limit)
        if not (base / "config.json").is_file():
            bench.make_model(shape)
        failed = []
        for workload, system in pairs:
            begun = time.perf_counter()
            try:
                if workload == CEILING:
                    found = measure_ceiling(bench, system)
                else:
                    found = measure(bench, workload, system, repeat)
            except (click.ClickException, subprocess.TimeoutExpired) as error:
                failed.append(f"{workload}, {system}: {error}")
                click.echo(failed[-1], err=True)
                continue
            facts = {"hardware": hardware(), "date": datetime.now(UTC).date().isoformat()}
            new = {"system": system, "workload": workload} | found | facts
            old = json.loads(output.read_text()) if output.is_file() else []
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(merge(old, new, order), indent=1) + "\n")
            took = time.perf_counter() - begun
            click.echo(
                f"{workload}, {system}: {found['tokens_per_second']:,.0f} tokens/s, {took:.0f} s",
                err=True,
            )
    if output.is_file():
        click.echo(table(json.loads(output.read_text())))
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(pairs)} failed; see above")


if __name__ == "__main__":
    main()
