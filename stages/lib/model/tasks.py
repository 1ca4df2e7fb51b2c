"""Tasks of EleutherAI's harness, by name or as files: found with their data, before a model is loaded."""

import contextlib
import difflib
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.run import extras, hub
from stages.lib.run.artifact import sha256
from stages.lib.run.exits import BadData, BadSetting, CannotRun, Missing, NoPermission, StageError
from stages.lib.run.progress import say

Tasks = dict[str, dict[str, Any]]


class Chat(NamedTuple):
    """How a conversation is written, and what ends an answer.

    Attributes:
        render: messages (`role`, `content`) as the text that the model is to continue.
        stops: see `stages.lib.model.answer.Stops`.
    """

    render: Callable[[list[dict[str, str]]], str]
    stops: Any


def is_path(name: str) -> bool:
    """Whether a benchmark is a file or folder, rather than a name that the harness knows."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def digest(names: Sequence[str]) -> str | None:
    """The sha256 over the files of the local benchmarks, or None where there are none.

    Raises:
        Missing: there is no such file or folder.
    """
    found = []
    for name in filter(is_path, names):
        path = Path(name)
        if not path.exists():
            raise Missing(
                f"there is no benchmark {path.absolute()}; it must be mounted at the same path"
            )
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found += [f"{p} {sha256(p)}\n" for p in files if "__pycache__" not in p.parts]
    return hashlib.sha256("".join(found).encode()).hexdigest() if found else None


def prepare(names: Sequence[str]) -> Tasks:
    """Find the tasks and their data, before a model is loaded.

    Returns:
        `tasks` and `groups` by name, `group_map`: the members of each group; as the harness takes them.

    Raises:
        CannotRun: the harness, or a package of a task, is not installed. BadSetting: no such task, or one that
        cannot be run. Missing, NoPermission, TryAgain, BadData: its data.
    """
    extras.require("lm_eval", "BENCHMARKS")
    found: Tasks = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet():
        from lm_eval.tasks import TaskManager

        folders = [name for name in names if is_path(name) and Path(name).is_dir()]
        manager = TaskManager(include_path=folders, include_defaults=False)
        # The harness' own 14,000 take six seconds to read.
        if not (all(map(is_path, names)) and _grouped(manager) <= manager.task_index.keys()):
            manager = TaskManager(include_path=folders)
        for name in names:
            _check_known(name, manager)
        for name in names:
            for spec in _members(Path(name), manager) if name in folders else [name]:
                say(f"loading the benchmark {spec}")
                loaded = _load(spec, manager)
                found = {key: found[key] | loaded.get(key, {}) for key in found}
    for name, task in found["tasks"].items():
        _check_task(name, task)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness and what tasks print out of the log, and metrics that are code of others off the hub."""
    extras.require("evaluate", "BENCHMARKS")
    import evaluate

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    evaluate.config.HF_EVALUATE_OFFLINE = True
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _check_known(name: str, manager: Any) -> None:
    if is_path(name):
        return
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "its list is `lm-eval ls tasks`;"
        raise BadSetting(
            f"BENCHMARKS: the harness has no task {name!r}; {hint} a file of your own is written as a path"
        )
    if (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise _runs_code(name)


def _runs_code(name: str) -> BadSetting:
    return BadSetting(
        f"BENCHMARKS: {name} runs the code that a model wrote, which this stage does not; leave it out"
    )


def _members(folder: Path, manager: Any) -> list[str]:
    """The groups and tasks of a folder, without the tasks that a group of it has."""
    grouped = _grouped(manager)
    found = [
        name
        for name, entry in manager.task_index.items()
        if name not in grouped and entry.yaml_path and entry.yaml_path.is_relative_to(folder)
    ]
    if not found:
        raise BadSetting(f"BENCHMARKS: {folder} holds no task file (*.yaml with `task`)")
    return found


def _grouped(manager: Any) -> set[str]:
    """What the groups name as theirs."""
    listed = [(entry.cfg or {}).get("task") for entry in manager.task_index.values()]
    parts = [part for several in listed if isinstance(several, list) for part in several]
    return {p if isinstance(p, str) else p.get("task", p.get("group", "")) for p in parts}


def _load(name: str, manager: Any) -> dict[str, Any]:
    import jinja2
    import yaml
    from datasets.exceptions import DatasetsError

    # Its files are read, its data fetched, its templates tried, its functions imported: all of it may fail.
    wrong = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError)
    try:
        return dict(manager.load([name]))
    except ModuleNotFoundError as error:
        first = str(error).splitlines()[0]
        raise CannotRun(
            f"the benchmark {name} needs a package that is not installed: {first}"
        ) from error
    except (DatasetsError, OSError) as error:
        known = _data_error(name, error)
        if known is None:
            raise
        raise known from error
    except (*wrong, yaml.YAMLError, jinja2.TemplateError) as error:
        reason = " ".join(str(error).split())[:200]
        if error.args == (None,):  # the harness looked up what it has not
            reason = "a metric, or the aggregation of one, is none of the harness'"
        raise BadSetting(
            f"BENCHMARKS: {name} is no task that can be run ({type(error).__name__}: {reason}); mend it, or "
            "leave it out"
        ) from error


def _data_error(name: str, error: Exception) -> StageError | None:
    """What keeps the data of a task away; `datasets` tells the hub's errors apart in words alone."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    words = " ".join(str(error).split())[:200]
    if "is a gated dataset" in words:
        return NoPermission(
            f"the data of the benchmark {name}: {words}; set HF_TOKEN of an account with access"
        )
    if isinstance(error, DatasetNotFoundError):
        return Missing(f"the data of the benchmark {name} is not there: {words}")
    if isinstance(error, ConnectionError) and constants.HF_HUB_OFFLINE:
        return Missing(
            f"the data of the benchmark {name} is not in the cache, and HF_HUB_OFFLINE is set"
        )
    if isinstance(error, FileNotFoundError):
        return Missing(
            f"the data of the benchmark {name} is not there: {words}; data_files are sought from the folder "
            "that the stage runs in"
        )
    if isinstance(error, OSError):
        return hub.told_apart(error, f"the data of the benchmark {name}", None)
    return BadData(f"the data of the benchmark {name} cannot be read: {words}; mend it")


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise _runs_code(name)
    if getattr(task, "MULTIMODAL", False):
        raise BadSetting(f"BENCHMARKS: {name} shows pictures or sounds to the model; leave it out")
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None and task.config.process_results is None:
            raise BadSetting(
                f"BENCHMARKS: the harness itself has no metric {metric!r}, which {name} wants, and code "
                "from the hub is not run; choose another metric or task"
            )
