"""How fast `prepare-data` goes from JSONL to a published artifact, beside others on the same rows.

`python -m bench.prepare_data`, from the root of the repository. The rows are real conversations,
repeated with a number before the first question so that none is a duplicate, as JSONL with a
`messages` column. Tokenizer and chat template are the embedded model's; rows are cut at MAX_LENGTH
tokens. The others are `encode_batch_fast` alone (the ceiling), `datasets`, and TRL:
`bench/prepare_data_peers.py` says what each of them calls.

The stage runs with LOSS_ON=assistant and CHAT_FORMAT=tokenizer, and is timed from the start of its
process to the end, as the peers are. All are fresh processes with empty caches, each between two
measurements of the ceiling on the same file; its ratio is to their mean. Start-up is the time of
the same command for FEW rows. Tokens are those before truncation: `tokens_encoded` of the stage,
for the peers what the ceiling counts on the same file.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
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
from bench.memory import Memory
from bench.prepare_data_peers import CEILING, CORES, DATASETS, MAX_LENGTH, TRL

STAGE = "prepare-data"
FEW = 64
WORK = 0.3  # least share of a run that is not start-up, for a rate without start-up
TOLERANCE = 0.01  # of the tokens: the stage ends a row with EOS, the template with a line break
PACKAGES = ("tokenizers", "transformers", "datasets", "pyarrow", "torch", "trl")


class Bench:
    """Runs the contenders.

    Args:
        work: for rows and what is made of them. marked: whether the peers' template marks answers.
    """

    def __init__(self, work: Path, marked: bool) -> None:
        from stages.lib.model import sample

        self.work, self.marked, self.base = work, marked, str(sample.folder())

    def run(self, name: str, rows: Path) -> dict[str, Any]:
        """One process from its start to its end: what it took, and what it wrote or printed."""
        folder = self.work / "run"
        folder.mkdir()
        target = folder / "out"
        caches = {"TMPDIR": str(folder), "HF_DATASETS_CACHE": str(folder / "cache")}
        threads = {} if name == STAGE else {"TOKENIZERS_PARALLELISM": str(name == CEILING).lower()}
        env = os.environ | caches | threads | {"HF_HUB_OFFLINE": "1"}
        with (folder / "log").open("w+") as log:
            begun = time.perf_counter()
            process = subprocess.Popen(
                self._command(name, rows, target), cwd=ROOT, env=env, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            memory = Memory(process.pid)
            memory.start()
            try:
                code = process.wait()
                seconds = time.perf_counter() - begun
            finally:
                memory.ended.set()
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
            memory.join()
            log.seek(0)
            said = log.read()
        if code:
            raise click.ClickException(f"{name} ended with {code}:\n{said[-3000:]}")
        found = {"seconds": seconds, "peak_rss_bytes": memory.rss, "peak_pss_bytes": memory.pss}
        found |= _result(name, target, said)
        shutil.rmtree(folder)
        return found

    def _command(self, name: str, rows: Path, target: Path) -> list[str]:
        if name != STAGE:
            end = [] if name == CEILING else [str(target), "marked" if self.marked else ""]
            own = ["bench.prepare_data_peers", name, self.base, str(rows), *end]
            return [sys.executable, "-m", *own]
        settings = {
            "run-dir": target, "base-model": "sample", "dataset": rows, "chat-format": "tokenizer",
            "loss-on": "assistant", "max-length": MAX_LENGTH, "allow": "nothing-to-learn",
        }  # fmt: skip
        flags = [f"--{flag}={value}" for flag, value in settings.items()]
        return [sys.executable, "-m", "stages", STAGE, *flags]

    def compare(self, name: str, rows: Path, few: Path) -> dict[str, Any]:
        """A contender and its start-up, between two runs of the ceiling on the same rows."""
        before = self.run(CEILING, rows)
        start = self.run(name, few)["seconds"]
        found = self.run(name, rows)
        after = self.run(CEILING, rows)
        # The stage cuts at the end of a turn, the peers at MAX_LENGTH.
        done, due = "tokens_written", "within"
        if name == STAGE:
            done, due = "tokens", "tokens"
        if abs(found[done] / before[due] - 1) > TOLERANCE:
            raise click.ClickException(f"{name}: {found[done]} tokens, {before[due]} were due")
        rates = [before["tokens"] / run["seconds"] for run in (before, after)]
        return found | {
            "tokens": found.get("tokens", before["tokens"]), "startup_seconds": start,
            "ceiling_tokens_per_s": statistics.mean(rates), "ceiling": [before, after],
        }  # fmt: skip


def _result(name: str, target: Path, said: str) -> dict[str, Any]:
    """Tokens before truncation, where known, and tokens written; or what the ceiling printed."""
    if name == CEILING:
        return dict(json.loads(next(x for x in said.splitlines() if x.startswith("{"))))
    if name == STAGE:
        metrics = json.loads((target / "data" / "manifest.json").read_text())["metrics"]
        return {"tokens": metrics["tokens_encoded"], "tokens_written": metrics["tokens"]}
    import pyarrow.compute as pc
    from datasets import load_from_disk

    ids = load_from_disk(str(target)).data.column("input_ids")
    return {"tokens_written": pc.sum(pc.list_value_length(ids)).as_py()}


def write_rows(source: Path, target: Path, count: int) -> Path:
    """Conversations of guanaco's shape as `messages`, each with a number before its question."""
    with source.open(encoding="utf-8") as lines:
        parts = [re.split("### (Human|Assistant): ?", json.loads(line)["text"]) for line in lines]
    roles = {"Human": "user", "Assistant": "assistant"}
    with target.open("w", encoding="utf-8") as out:
        for number in range(count):
            _, *said = parts[number % len(parts)]
            turns = [
                {"role": roles[who], "content": text}
                for who, text in zip(said[::2], said[1::2], strict=True)
            ]
            turns[0]["content"] = f"{number}. {turns[0]['content']}"
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return target


def hardware() -> dict[str, Any]:
    """The machine, and how busy it is before anything starts."""
    model = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[1] if model else platform.machine(), "cores": CORES, "memory_bytes": memory,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python, the packages that are there, and this repository."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return found | {"commit": commit.stdout.strip() or "unknown"}


def summary(runs: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Rates and ratios of some runs, their medians, and the runs themselves.

    Start-up is the least that was seen; where less than WORK of a run is left without it, the rate
    of that would be noise, and is left out.
    """
    start = min(run["startup_seconds"] for run in runs)
    shown = statistics.median(1 - start / run["seconds"] for run in runs) >= WORK
    for run in runs:
        for suffix, out in (("", 0.0), ("_without_startup", start))[: 1 + shown]:
            rate = run["tokens"] / (run["seconds"] - out)
            run[f"tokens_per_s{suffix}"] = rate
            run[f"ratio{suffix}"] = rate / run["ceiling_tokens_per_s"]
    names = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    medians = {name: statistics.median(run[name] for run in runs) for name in names}
    return {"rows": rows} | medians | {"startup_seconds": start, "runs": runs}


def table(contenders: dict[str, dict[str, Any]]) -> str:
    """The medians as Markdown."""
    columns = (
        ("rows", "rows", "{:,.0f}", 1), ("tokens", "tokens", "{:,.0f}", 1),
        ("seconds", "seconds", "{:.1f}", 1), ("tokens/s", "tokens_per_s", "{:,.0f}", 1),
        ("of the ceiling", "ratio", "{:.1%}", 1), ("start-up, s", "startup_seconds", "{:.1f}", 1),
        ("tokens/s without it", "tokens_per_s_without_startup", "{:,.0f}", 1),
        ("of the ceiling", "ratio_without_startup", "{:.1%}", 1),
        ("peak RSS, GB", "peak_rss_bytes", "{:.2f}", 1e9),
        ("peak PSS, GB", "peak_pss_bytes", "{:.2f}", 1e9),
    )  # fmt: skip
    lines = ["| | " + " | ".join(column[0] for column in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for name, found in contenders.items():
        cells = [
            form.format(found[key] / unit) if key in found else "" for _, key, form, unit in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(bench: Bench, data: Path, shares: dict[str, int], repeat: int) -> dict[str, Any]:
    """All contenders, `repeat` times in turn; `shares` has how many rows each gets."""
    files = {
        count: write_rows(data, bench.work / f"{count}.jsonl", count)
        for count in {FEW, *shares.values()}
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in shares}
    for turn in range(repeat):
        for name, count in shares.items():
            runs[name].append(bench.compare(name, files[count], files[FEW]))
            took = runs[name][-1]["seconds"]
            click.echo(f"{turn + 1} of {repeat}: {name} {took:.1f} s", err=True)
    alone = [run for found in runs[STAGE] for run in found["ceiling"]]
    for found in (found for name in shares for found in runs[name]):
        del found["ceiling"]
    for run in alone:
        run |= {"startup_seconds": 0, "ceiling_tokens_per_s": run["tokens"] / run["seconds"]}
    all_runs = {CEILING: (alone, shares[STAGE])} | {n: (runs[n], shares[n]) for n in shares}
    return {name: summary(*found) for name, found in all_runs.items()}


@click.command()
@click.option("--rows", default=200_000, show_default=True, type=click.IntRange(1000))
@click.option("--peer-rows", default=20_000, show_default=True, type=click.IntRange(1000))
@click.option("--peers", default=f"{DATASETS},{TRL}", show_default=True, help="May be empty.")
@click.option("--mark-answers", is_flag=True, help="Let the peers write the assistant's mask too.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@conversations.option
@click.option(
    "--output", default=ROOT / "bench/results/prepare-data.json", show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
)  # fmt: skip
def main(
    rows: int, peer_rows: int, peers: str, mark_answers: bool, repeat: int, data: Path, output: Path
) -> None:
    """Measure prepare-data beside the others, write the result and print it as a table."""
    chosen = [name for name in peers.split(",") if name]
    for name in chosen:
        if name not in (DATASETS, TRL) or importlib.util.find_spec(name) is None:
            raise click.UsageError(f"{name} is no peer that is installed; see bench/README.md")
    shares = {STAGE: rows} | dict.fromkeys(chosen, min(rows, peer_rows))
    settings = {
        "data": data.name, "max_length": MAX_LENGTH, "answers_marked_for_peers": mark_answers,
        "startup_rows": FEW, "repeat": repeat,
    }  # fmt: skip
    result = {
        "date": datetime.now(UTC).date().isoformat(), "hardware": hardware(),
        "versions": versions(), "settings": settings,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        bench = Bench(Path(work), mark_answers)
        result["contenders"] = measure(bench, data, shares, repeat)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(table(result["contenders"]))


if __name__ == "__main__":
    main()
