"""What a refusal looks like: one sentence, the right exit code, and nothing half-written."""

import json
import subprocess
from pathlib import Path

Result = subprocess.CompletedProcess[str]


def write_preset(path: Path, **values: object) -> Path:
    path.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return path


def sentences(result: Result) -> list[str]:
    """What standard error says to a person: neither JSON lines nor click's two lines about usage."""
    lines = [
        line for line in result.stderr.splitlines() if line.strip() and not line.startswith("{")
    ]
    # The bad rows of a data set are listed below the sentence, and what to do about them behind.
    within = ("Usage: ", "Try '", "  ", "mend them")
    return [line for line in lines if not line.startswith(within)]


def run_dir_of(result: Result) -> Path | None:
    args = list(map(str, result.args))
    return Path(args[args.index("--run-dir") + 1]) if "--run-dir" in args else None


def refused(result: Result, code: int, *words: str) -> None:
    """One sentence with these words, this exit code, and no trace of work left behind."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert len(sentences(result)) == 1, result.stderr
    (said,) = sentences(result)
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""
    run = run_dir_of(result)
    if run is not None:
        assert debris(run) == []
        assert not (run / "holder.json").exists()
    if (
        run is not None and run.is_dir() and "[exit " in said
    ):  # before that, click has not learned of a run
        recorded = json.loads((run / "error.json").read_text())
        assert recorded["exit"] == code
        assert recorded["message"] in result.stderr


def debris(run: Path) -> list[str]:
    """Folders of a run that are no whole artifact, and should be."""
    others = ("checkpoints", "attempts", "tensorboard")
    folders = [p for p in run.glob("*") if p.is_dir() and p.name not in others]
    return sorted(p.name for p in [*folders, *run.glob("checkpoints/*")] if not whole(p))


def whole(folder: Path) -> bool:
    path = folder / "manifest.json"
    files = json.loads(path.read_text())["files"] if path.is_file() else {}
    return bool(files) and all((folder / name).is_file() for name in files)
