"""Settings: each is one click option with an environment name. Beside it, `environment` alone reads that.

Precedence: flag > environment > preset (`--env-file FILE`, read with python-dotenv) > default.
"""

import difflib
import importlib
import os
from collections import UserDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from stages.lib.run import environment, failpoints, fetched, preemption, progress, redaction
from stages.lib.run.exits import BadSetting, CannotWrite

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# What the libraries and `environment.scratch_parent` read, beside the settings; proxies in both spellings.
OTHERS = (
    "SCRATCH_DIR", "MAKE_GIVEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES",
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL", "GOOGLE_APPLICATION_CREDENTIALS",
    "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL",
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_EXPERIMENT_NAME",
    "TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE",
)  # fmt: skip
MAKE_NAMES = (
    "RUNNER", "TARGET", "DATA_DIR", "CACHE_DIR", "EXTRAS", "PYTHON", "HF_HOME",
    "TORCH", "GPUS", "DOCKER_FLAGS", "BUILD_FLAGS", "BASE_IMAGE", "TORCH_INDEX_URL",
)  # fmt: skip
ORIGINS = {
    click.ParameterSource.COMMANDLINE: "flag",
    click.ParameterSource.ENVIRONMENT: "environment",
    click.ParameterSource.DEFAULT_MAP: "preset",
    click.ParameterSource.DEFAULT: "default",
}


class Setting(click.Option):
    """A click option that is part of what a run is.

    `identity` is False for what does not change the artifact: where it goes, whether to redo it. `shown` gives
    a value as it may be shown and recorded, where it may hold a secret.
    """

    def __init__(
        self, *args: Any, identity: bool = True, shown: Callable[[str], str] = str, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.identity = identity
        self.shown = shown

    def consume_value(
        self, ctx: click.Context, opts: Any
    ) -> tuple[Any, click.core.ParameterSource]:
        """As click does; a preset's value of an option that may be repeated is one value."""
        value, source = super().consume_value(ctx, opts)
        if self.multiple and isinstance(value, str):
            value = (value,)
        return value, source

    @property
    def variable(self) -> str:
        """The environment name."""
        return str(self.envvar)


def setting(flag: str, variable: str, *argument: str, **kwargs: Any) -> Decorator:
    """Declare a setting: its flag, environment name, the command's argument for it, default, type and help."""
    return click.option(
        flag,
        *argument,
        cls=Setting,
        envvar=variable,
        show_envvar=True,
        show_default=kwargs.get("default") is not None,
        **kwargs,
    )


class Stage(click.Command):
    """A command that says which settings override its preset, and then runs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Announce, prepare the process, run."""
        outcome = ctx.obj
        outcome.stage = ctx.info_name
        outcome.run_dir = ctx.params.get("run_dir")
        outcome.rank = environment.take_rank() if "num_gpus" in ctx.params else None
        preemption.listen(
            ctx.params.get("grace_seconds", preemption.GRACE_SECONDS),
            ctx.params.get("max_runtime"),
            outcome.last_words,
            patient=outcome.rank is not None,
        )
        fetched.use(outcome.run_dir)
        failpoints.arm(outcome.rank.number if outcome.rank else 0)
        environment.have_home()
        environment.quiet_libraries()
        environment.settle()
        environment.keep_compiled()
        progress.start(str(ctx.info_name), silent=bool(outcome.rank and outcome.rank.number))
        progress.say(announcement(ctx))
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # else click makes it an exit with 1
            if error.filename:
                raise
            redaction.drop_output()
            raise CannotWrite("nobody reads standard output any more; send it to a file") from error


class Commands(UserDict[str, Any]):
    """Commands by name, each imported when it is asked for; made of name -> its module."""

    def __getitem__(self, name: str) -> click.Command:
        found: click.Command = getattr(
            importlib.import_module(super().__getitem__(name)), name.replace("-", "_")
        )
        return found


class Stages(click.Group):
    """All commands, and the preset that they share."""

    command_class = Stage

    def declared(self) -> dict[str, list[tuple[str, Setting]]]:
        """Environment name -> the (command, option) pairs that declare it."""
        found: dict[str, list[tuple[str, Setting]]] = {}
        for name, command in self.commands.items():
            for option in command.params:
                if isinstance(option, Setting):
                    found.setdefault(option.variable, []).append((name, option))
        return found

    def names(self) -> list[str]:
        """Every environment name that a container is to be given."""
        return sorted({*self.declared(), *environment.SECRETS, *OTHERS})

    def use_preset(self, ctx: click.Context, path: Path) -> None:
        """Make a preset's values the defaults of the commands that declare them."""
        values = read_preset(path, self.declared())
        defaults: dict[str, dict[str, str]] = {name: {} for name in self.commands}
        for variable, value in values.items():
            for name, option in self.declared()[variable]:
                defaults[name][str(option.name)] = value
        ctx.default_map = defaults


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known name, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def read_preset(path: Path, declared: Iterable[str]) -> dict[str, str]:
    """The keys and values of a preset file; every key must be a declared setting."""
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path(".")
        near = did_you_mean(path.name, [file.name for file in folder.glob("*.env")])
        raise BadSetting(f"there is no preset {path}.{near}")
    values = environment.lines_of(path)
    for key in values:
        if key in environment.SECRETS:
            raise BadSetting(
                f"{path} holds {key}: secrets belong in the environment or env/secrets.env"
            )
        if key not in declared:
            near = did_you_mean(key, declared)
            raise BadSetting(f"{path} sets {key}, which is no setting.{near}")
    return {key: value for key, value in values.items() if value}


def check_make_overrides(names: Callable[[], list[str]]) -> None:
    """Refuse `make train LEARNIN_RATE=1`, which make itself would pass on without a word.

    Our Makefile puts the names that were given on its command line into MAKE_GIVEN.
    """
    given = os.environ.get("MAKE_GIVEN", "").split()
    known = [*names(), *MAKE_NAMES] if given else []
    for name in given:
        if name not in known:
            near = did_you_mean(name, known)
            raise BadSetting(f"make was given {name}, which is no setting.{near}")


def more_explicit(ctx: click.Context, one: str, other: str) -> bool:
    """Whether `one` of two settings that exclude each other is to be used: flag over environment over preset.

    Raises:
        BadSetting: both were given in the same way.
    """
    if ctx.params[one] is None or ctx.params[other] is None:
        return ctx.params[one] is not None
    ranks = [ctx.get_parameter_source(name) or 0 for name in (one, other)]
    if ranks[0] == ranks[1]:
        raise BadSetting(f"both {one.upper()} and {other.upper()} are set; leave one out")
    return ranks[0] < ranks[1]


def from_environment(ctx: click.Context, commands: Iterable[str]) -> dict[str, str]:
    """The settings of these commands that the environment has a value for."""
    group = ctx.find_root().command
    assert isinstance(group, Stages)
    wanted = set(commands)
    return {
        variable: os.environ[variable]
        for variable, owners in group.declared().items()
        if os.environ.get(variable) and wanted & {name for name, _ in owners}
    }


def recorded(ctx: click.Context) -> dict[str, dict[str, Any]]:
    """Every setting that shapes the artifact: environment name -> value and origin."""
    found = {}
    for option in ctx.command.params:
        if isinstance(option, Setting) and option.identity:
            source = ctx.get_parameter_source(str(option.name))
            value = ctx.params[str(option.name)]
            found[option.variable] = {
                "value": _plain(option, value),
                "from": ORIGINS.get(source, "default") if source else "default",
            }
    return dict(sorted(found.items()))


def _plain(option: Setting, value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, tuple):
        value = list(value) if option.multiple else ",".join(value)
    elif isinstance(value, (Path, str)):
        value = option.shown(str(value))
    return redaction.plain(value)


def expected(ctx: click.Context, variable: str, recorded_from: str) -> Any:
    """What is now said of a setting that an input was made with, or None where nothing was.

    A flag was meant for that one command, and so was an environment variable that has gone since.
    """
    root = ctx.find_root()
    assert isinstance(root.command, Stages)
    for name, option in root.command.declared().get(variable, []):
        said = os.environ.get(variable)
        if not said and recorded_from in ("preset", "default"):
            said = (root.default_map or {}).get(name, {}).get(option.name)
        if said and recorded_from != "flag":
            return _plain(option, option.type_cast_value(ctx, said))
    return None


def announcement(ctx: click.Context) -> str:
    """One line: the preset, and what overrides it from where."""
    root = ctx.find_root()
    path = root.params.get("env_file")
    words = [f"preset {path}" if path else "no preset"]
    for option in ctx.command.params:
        if isinstance(option, Setting):
            source = ctx.get_parameter_source(str(option.name))
            if source in (click.ParameterSource.COMMANDLINE, click.ParameterSource.ENVIRONMENT):
                value = str(_plain(option, ctx.params[str(option.name)]))
                value = value if len(value) <= 60 else value[:57] + "..."
                words.append(f"{option.variable}={value!r} from the {ORIGINS[source]}")
    return "; ".join(words)
