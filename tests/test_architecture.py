"""The rules of the house, held here and not by memory."""

import ast
import re
from pathlib import Path

import pytest

from stages.lib.run import failpoints

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "stages").rglob("*.py"))
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "pyarrow"}


def name_of(path: Path) -> str:
    """`stages.lib.run.settings` for its file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, top: bool = False) -> set[str]:
    """Modules that a file imports, anywhere or only when it is itself imported."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name_of(file) for file in FILES}
            found |= {name if name in known else node.module for name in whole}
    return found


GRAPH = {name_of(path): imports(path) for path in FILES}
STAGES = {f"stages.{path.stem}" for path in FILES if path.parent == ROOT / "stages"} - {
    "stages.__init__",
    "stages.__main__",
}
COMMANDS = STAGES | {name for name in GRAPH if name.startswith("stages.tools.")}


def below(prefix: str) -> list[str]:
    found = [name for name in GRAPH if name.startswith(prefix)]
    assert found, f"no module below {prefix}"
    return found


def test_there_are_five_stages() -> None:
    names = ("prepare_data", "train", "evaluate", "generate", "merge")
    assert {f"stages.{name}" for name in names} == STAGES


def test_no_command_imports_another() -> None:
    for command in COMMANDS:
        assert not GRAPH[command] & (COMMANDS - {command}), command


def test_lib_imports_no_command() -> None:
    for module in below("stages.lib"):
        assert not GRAPH[module] & COMMANDS, module


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("data", ("model", "jobs")),
        ("model", ("data", "jobs")),
        ("run", ("data", "model", "report", "jobs")),
        ("jobs", ("data", "model", "report")),
    ],
)
def test_rooms_keep_apart(room: str, others: tuple[str, ...]) -> None:
    for module in below(f"stages.lib.{room}"):
        for other in others:
            wrong = {name for name in GRAPH[module] if name.startswith(f"stages.lib.{other}")}
            assert not wrong, f"{module} imports {wrong}"


def test_there_is_no_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in GRAPH[module] & GRAPH.keys():
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_commands_import_nothing_heavy_at_the_top() -> None:
    """What the command line imports before a command runs, by way of our own modules too."""
    seen: set[str] = set()
    waiting = ["stages.__main__", *COMMANDS]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            path = next(file for file in FILES if name_of(file) == module)
            found = imports(path, top=True)
            assert not {name.partition(".")[0] for name in found} & HEAVY, module
            waiting += [name for name in found if name in GRAPH]


def test_modules_do_nothing_when_imported() -> None:
    allowed = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If,
    )  # fmt: skip
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, allowed), f"{path}:{node.lineno}"


def test_owners() -> None:
    for path in FILES:
        name, text = name_of(path), path.read_text()
        packages = {module.partition(".")[0] for module in imports(path)}
        if packages & {"peft", "bitsandbytes"}:
            assert name.startswith("stages.lib.model."), name
        if "os.environ" in text or "dotenv" in packages:
            assert name in ("stages.lib.run.settings", "stages.lib.run.environment"), name


def test_every_failpoint_is_somewhere_in_the_work() -> None:
    reached: list[str] = []
    for path in FILES:
        reached += re.findall(r'failpoints\.reach\("([^"]*)"\)', path.read_text())
    assert set(reached) == set(failpoints.POINTS)


def test_names_say_something() -> None:
    for path in FILES:
        assert path.stem not in ("utils", "common", "helpers", "misc"), path
        classes = [
            n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)
        ]
        assert not [c for c in classes if c.endswith(("Manager", "Handler"))], path


def test_no_broad_except() -> None:
    for path in FILES:
        assert not re.search(r"except\s*(:|\(?(Base)?Exception\b)", path.read_text()), path


def test_modules_stay_readable() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 300, path


def test_makefile_and_dockerfile_hold_no_logic() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for verb in (
        "plan",
        "doctor",
        "fetch",
        "prepare-data",
        "train",
        "evaluate",
        "generate",
        "merge",
        "export",
        "push",
        "report",
    ):
        assert f"\t$(stage) {verb}\n" in makefile
    assert '["tini", "-g", "--", "python", "-m", "stages"]' in (ROOT / "Dockerfile").read_text()
