"""The documents say what is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def printed(*args: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "stages", *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    ("path", "args"),
    [("docs/options.md", ("options",)), ("env/settings.names", ("options", "--names"))],
)
def test_generated_files_are_fresh(path: str, args: tuple[str, ...]) -> None:
    assert (ROOT / path).read_text() == printed(*args), "run `make docs`"


def test_readme_is_short_and_its_links_exist() -> None:
    assert len(README.splitlines()) <= 200
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = ROOT / (path or "README.md")
        assert target.exists(), link
        text = target.read_text() if heading else ""
        known = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines()}
        assert not heading or heading in known, link


def test_readme_shows_the_preset_as_it_ships() -> None:
    shown = README.split("## A preset explained")[1].split("A flag overrides")[0]
    lines = [line.split("#")[0].strip() for line in shown.splitlines() if line.startswith("    ")]
    preset = (ROOT / "env" / "llama2-7b.env").read_text().splitlines()
    assert len(lines) > 10
    assert set(lines) <= set(preset)


def test_every_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = set(re.findall(r"(?:^    |`|&& )make ([a-z-]+)", README, re.M))
    assert {"demo", "train", "generate", "docker-build"} <= used
    assert used <= targets


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = README.split("## What lies where")[1].split("## Develop")[0]
    names = re.findall(r"^ {4,6}([a-z/]+/) ", tree, re.M)
    assert len(names) == 7
    for name in names:
        assert (ROOT / name).is_dir() or (ROOT / "stages" / name).is_dir(), name
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    described = {name.split("/")[0] for name in names} | {"stages"}
    assert top - {"runs", "data", "__pycache__"} <= described


def test_make_alone_lists_every_target() -> None:
    command = ["make", "--no-print-directory"]  # make says where it is when make called it
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(phony[1].split())


def test_the_secrets_example_is_the_subset_that_docker_reads() -> None:
    lines = (ROOT / "env" / "secrets.env.example").read_text().splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[A-Z_]+=[^'\" ]*", line), line


@pytest.mark.case("D10")
@pytest.mark.parametrize(
    "prompt",
    [
        "plain",
        "quo\"ted 'both'",
        "$(touch x) `touch y` $HOME $$",
        "-n --help",
        "two\nlines",
        "X=1 Y=2",
    ],
)
def test_make_passes_a_prompt_on_to_the_letter(prompt: str, tmp_path: Path) -> None:
    """Through make itself, to a stage's first line, by a stand-in interpreter that prints PROMPT."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s" "$PROMPT" > prompt.txt\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    (tmp_path / "requirements.txt").touch()
    subprocess.run(["touch", "-d", "2000-01-01", str(tmp_path / "requirements.txt")], check=True)
    command = ["make", "-f", str(ROOT / "Makefile"), "generate", "RUNNER=local", f"PROMPT={prompt}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "prompt.txt").read_text() == prompt
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".venv",
        "prompt.txt",
        "requirements.txt",
    ]
