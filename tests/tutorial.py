"""The tutorial, run: `python -m tests.tutorial` puts what its commands print into docs/tutorial.md."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
# A block of commands, and the block of what they print that may follow.
BLOCK = re.compile(r"```sh\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)
END = "--- end of block {}"


def commands(page: str) -> list[str]:
    """The blocks of commands, in their order."""
    return [block[1] for block in BLOCK.finditer(page)]


def checkout(folder: Path) -> None:
    """What a clone of the repository holds, after `make setup`."""
    for name in ("stages", "env", "Makefile", "requirements.txt"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    os.utime(folder / "requirements.txt", (1e9, 1e9))  # installed already
    (folder / ".venv").symlink_to(ROOT / ".venv")


def run(blocks: list[str], folder: Path) -> list[str]:
    """What each block prints to standard output, all in one shell that ends at the first failure.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    script = "".join(f"{block}echo '{END.format(n)}'\n" for n, block in enumerate(blocks))
    kept = ("PATH", "HOME", "LANG", "XDG_CACHE_HOME", "OMP_NUM_THREADS")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    (folder / "scratch").mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, text=True, check=False,
        env=env | {"SCRATCH_DIR": str(folder / "scratch")}, capture_output=True, timeout=1800,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-3000:])
    printed, rest = [], done.stdout
    for number in range(len(blocks)):
        said, _, rest = rest.partition(END.format(number) + "\n")
        printed.append(said)
    return printed


def shown(said: str, folder: Path) -> str:
    """What a page shows of what was printed: make's own lines are left out."""
    lines = [line.rstrip() for line in said.replace(f"{folder}/", "").splitlines()]
    kept = [
        line
        for line in lines
        if not line.startswith((".venv/bin/python -m stages ", "make[", "make: "))
    ]
    return "\n".join(kept).strip("\n") + "\n"


def rewritten(page: str, printed: list[str], folder: Path) -> str:
    """The page with what was printed now."""
    said = iter(printed)

    def block(match: re.Match[str]) -> str:
        output = shown(next(said), folder)
        tail = f"\n```text\n{output}```\n" if match[2] is not None else ""
        return f"```sh\n{match[1]}```\n{tail}"

    where = f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
    page = re.sub(r"(`python -m tests\.tutorial`, )[^)]*\)", rf"\g<1>{where})", page)
    return BLOCK.sub(block, page)


def main() -> None:
    """Run the page and write it anew."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout(folder)
        page = PAGE.read_text()
        PAGE.write_text(rewritten(page, run(commands(page), folder), folder))


if __name__ == "__main__":
    main()
