"""The page of what goes wrong: docs/troubleshooting.md, what is said, why, and what to do.

`python -m tests.troubleshooting > docs/troubleshooting.md` writes it. What is said is read off the code that
says it; the exit codes are those of `stages.lib.run.endings`; why, and the test in which a real command says
so, are in troubles.py beside this file.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from stages.lib.run import endings, exits
from tests.troubles import TROUBLES, Trouble

ROOT = Path(__file__).parent.parent
CLASSES = {
    name: kind
    for name, kind in vars(exits).items()
    if isinstance(kind, type) and issubclass(kind, exits.StageError)
}
INTRODUCTION = """# Troubleshooting

Made by `make docs` from the code and `tests/troubles.py`: do not edit.

Every end but 0 has a code, and one sentence that names the value, the rule and the remedy; `error.json` in the
run directory has both, and `python -m stages runs` shows them for all runs.
Find the code first, then the sentence.
`...` stands for what differs. Each is shown to be said by the test that is linked behind it.

## Exit codes

| code | name | what it means | what to do | the same command again? |
| --- | --- | --- | --- | --- |"""


def said(node: ast.expr) -> str:
    """A message as the code writes it, with `...` for what it fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(said(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return said(node.left) + said(node.right)
    return "..."


@functools.cache
def messages() -> frozenset[tuple[str, str]]:
    """The (class, message) of every error that the code makes, wherever it is raised."""
    return frozenset(_messages())


def _messages() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "stages").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if named and node.func.id in CLASSES and node.args:
                yield node.func.id, " ".join(said(node.args[0]).split())


def found(trouble: Trouble) -> tuple[str, str]:
    """The class and the whole message of an entry.

    Raises:
        LookupError: the code says that nowhere, or in several sentences.
    """
    fitting = [each for each in messages() if trouble.says in each[1]]
    if len(fitting) != 1:
        raise LookupError(f"{trouble.says!r} is said by {len(fitting)} errors of the code")
    return fitting[0]


def _entry(trouble: Trouble) -> list[str]:
    _, message = found(trouble)
    path, _, name = trouble.test.partition("::")
    return [
        f"**{message}** ([{name}](../{path}))",
        "",
        f"- Why: {trouble.why}",
        f"- Do: {trouble.do}",
        "",
    ]


def page() -> str:
    """docs/troubleshooting.md."""
    lines = [INTRODUCTION]
    for row in endings.ENDINGS:
        again = "yes, it goes on" if row.retry else "no"
        lines.append(f"| {row.code} | {row.slug} | {row.meaning} | {row.hint} | {again} |")
    for row in endings.ENDINGS:
        entries = [t for t in TROUBLES if t.says and CLASSES[found(t)[0]].slug == row.slug]
        if entries:
            lines += ["", f"## {row.code} {row.slug}: {row.meaning}", ""]
            for trouble in entries:
                lines += _entry(trouble)
            lines.pop()
    lines += ["", "## Nothing fails, and it is not what you wanted", ""]
    for trouble in TROUBLES:
        if not trouble.says:
            path, _, name = trouble.test.partition("::")
            lines += [f"**{trouble.title}** ([{name}](../{path}))", ""]
            lines += [f"- Why: {trouble.why}", f"- Do: {trouble.do}", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
