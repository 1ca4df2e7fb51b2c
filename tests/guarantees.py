"""Which test stands for which promise and fault, and the page that says so: docs/guarantees.md.

`python -m tests.guarantees > docs/guarantees.md` writes the page from the marks on the tests, and from the
counts of the last `make test-faults` in guarantees.json beside this file.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.matrix import AREAS, CASES, NO_TEST, PROMISES

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".json")
KINDS = ("case", "promise")
INTRODUCTION = """# Guarantees

Made by `make test-faults`: do not edit. {when}

How the promises are meant:

- **P1** binds the exits that a command makes itself. A command that is killed from outside exits 137 or 143
  whatever it left, and the same command then finds what is whole. Code 82 of `evaluate` is the one exception:
  the evaluation is published, and says that its gate is not met. `--force` over a finished artifact, if it ends
  otherwise than with 0, leaves the old one whole, or none.
- **P2** and **P3** hold for `train` (by checkpoint), `prepare-data`, `generate` (by prompt), `evaluate`,
  `merge` and `export`: what is compared is the sha256 of every file of the artifact but its manifest, which
  has times in it.
- **P4** does not bind `--force`, which is asked to begin anew.
- A case is *tried* where a test injects it, and *held* where it ended as it should. A sweep counts each of its
  combinations of a command, a point, an arrival there and a failure.
"""


def _names(node: ast.AST, kind: str) -> Iterator[str]:
    """The names in all marks of a kind below a node.

    Raises:
        ValueError: a mark has a name that is no literal, which nobody can look up.
    """
    for call in ast.walk(node):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == kind
            and isinstance(call.func.value, ast.Attribute)
            and call.func.value.attr == "mark"
        ):
            for name in call.args:
                if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
                    raise ValueError(
                        f"line {call.lineno}: write the names of a mark out, as in {kind}('A5')"
                    )
                yield name.value


def _tests(body: list[ast.stmt], prefix: str, around: set[str], kind: str) -> dict[str, set[str]]:
    """The tests among statements, each with its names and those of what is around it."""
    tables: dict[str, set[str]] = {}
    found: dict[str, set[str]] = {}
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    tables[target.id] = set(_names(node, kind))
    around = around | tables.get("pytestmark", set())
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own = set(around)
            for decorator in node.decorator_list:
                own |= set(_names(decorator, kind))
                for name in ast.walk(decorator):  # parametrised by a table that is written above
                    if isinstance(name, ast.Name):
                        own |= tables.get(name.id, set())
            if isinstance(node, ast.ClassDef):
                found |= _tests(node.body, f"{prefix}::{node.name}", own, kind)
            elif node.name.startswith("test"):
                found[f"{prefix}::{node.name}"] = own
    return found


def marks(root: Path = ROOT) -> dict[str, set[str]]:
    """The tests below `root/tests` that carry each name, as `tests/FILE.py::TEST`.

    Raises:
        ValueError: a mark's names cannot be read off.
    """
    carried: dict[str, set[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        for kind in KINDS:
            try:
                found = _tests(tree.body, path.relative_to(root).as_posix(), set(), kind)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            for test, names in found.items():
                for name in names:
                    carried.setdefault(name, set()).add(test)
    return carried


def faults_of_the_matrix(carried: dict[str, set[str]]) -> list[str]:
    """What is wrong between the marks, the cases and the reasons; a sentence each."""
    known = CASES.keys() | PROMISES.keys()
    unknown = [
        f"{sorted(tests)[0]} is marked {name}, which is none"
        for name, tests in carried.items()
        if name not in known
    ]
    missing = [name for name in CASES if name not in carried and name not in NO_TEST]
    both = [name for name in NO_TEST if name in carried]
    return [
        *sorted(unknown),
        *(f"{name} has no test and no line in NO_TEST" for name in missing),
        *(f"{name} has a test and a line in NO_TEST" for name in both),
        *(f"{name} in NO_TEST is no case" for name in NO_TEST if name not in CASES),
        *(f"{name} is promised, and no test says so" for name in PROMISES if name not in carried),
    ]


def _counts(name: str, carried: dict[str, set[str]], results: dict[str, Any]) -> tuple[int, int]:
    """Tried and held, of the tests that carry a name now."""
    counted = results.get("names", {}).get(name, {})
    lines = [counted[test] for test in sorted(carried.get(name, ())) if test in counted]
    return sum(line["tried"] for line in lines), sum(line["held"] for line in lines)


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{name}](../{path})"


def _evidence(name: str, carried: dict[str, set[str]], results: dict[str, Any]) -> str:
    if name in NO_TEST:
        return f"No test: {NO_TEST[name]}"
    if name not in carried:
        return "Nothing yet."
    tried, held = _counts(name, carried, results)
    tests = ", ".join(map(_link, sorted(carried[name])))
    return f"{tests} ({held} of {tried})" if tried else f"{tests} (since the last count)"


def _when(results: dict[str, Any]) -> str:
    if not results:
        return "Nothing was counted yet."
    return (
        f"Counted on {results['date']}: {results['tests']} tests, of which {results['failed']} failed and "
        f"{results['skipped']} were skipped, in {results['seconds'] / 60:.0f} minutes on {results['hardware']}."
    )


def page(carried: dict[str, set[str]], results: dict[str, Any]) -> str:
    """docs/guarantees.md."""
    lines = [INTRODUCTION.format(when=_when(results))]
    lines += ["| | promise | cases tried | cases held |", "| --- | --- | ---: | ---: |"]
    for name, text in PROMISES.items():
        tried, held = _counts(name, carried, results)
        lines.append(f"| {name} | {text} | {tried:,} | {held:,} |")
    injected = sum(name in carried for name in CASES)
    lines += ["", f"## The {len(CASES)} cases", ""]
    lines.append(f"{injected} are injected by a test, {len(NO_TEST)} are not and say why.")
    for area, table in AREAS.items():
        lines += ["", f"### {area}", "", "| | fault | ends with | held by |"]
        lines.append("| --- | --- | --- | --- |")
        for name in (line.partition(" | ")[0] for line in table.strip().splitlines()):
            ends, text = CASES[name]
            lines.append(f"| {name} | {text} | {ends} | {_evidence(name, carried, results)} |")
    return "\n".join(lines) + "\n"


def results_of_the_last_count() -> dict[str, Any]:
    """What `make test-faults` counted last; empty where it never did."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.is_file() else {}


if __name__ == "__main__":
    print(page(marks(), results_of_the_last_count()), end="")
