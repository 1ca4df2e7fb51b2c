"""Settings: each is one click option with an environment name. Nothing else reads the environment.

Precedence: flag > environment > preset (`--env-file FILE`, read with python-dotenv) > default.
"""

import contextlib
import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from stages.lib.run import preemption, progress
from stages.lib.run.exits import BadSetting

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SECRETS = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# What the libraries and `scratch_parent` read, beside the settings; proxies in both spellings.
OTHERS = (
    "SCRATCH_DIR", "MAKE_GIVEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES",
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL", "GOOGLE_APPLICATION_CREDENTIALS",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
MAKE_NAMES = ("PRESET", "RUNNER", "DATA_DIR", "CACHE_DIR", "IMAGE", "PYTHON", "HF_HOME")
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

    @property
    def variable(self) -> str:
        """The environment name."""
        return str(self.envvar)


def setting(flag: str, variable: str, **kwargs: Any) -> Decorator:
    """Declare a setting: its flag, environment name, default, type and help."""
    return click.option(
        flag,
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
        preemption.listen()
        _quiet_libraries()
        progress.start(str(ctx.info_name))
        progress.say(announcement(ctx))
        return super().invoke(ctx)


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
        return sorted({*self.declared(), *SECRETS, *OTHERS})

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
    values = _lines_of(path)
    for key in values:
        if key in SECRETS:
            raise BadSetting(
                f"{path} holds {key}: secrets belong in the environment or env/secrets.env"
            )
        if key not in declared:
            near = did_you_mean(key, declared)
            raise BadSetting(f"{path} sets {key}, which is no setting.{near}")
    return {key: value for key, value in values.items() if value}


def _lines_of(path: Path) -> dict[str, str]:
    """The NAME=value lines of a file, as python-dotenv reads them; it passes over others in silence."""
    from dotenv.parser import parse_stream

    values = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in parse_stream(file):
                place = f"{path}:{line.original.line}"
                if line.error:
                    raise BadSetting(f"{place} is no NAME=value: {line.original.string.strip()!r}")
                if line.key and line.value is None:
                    raise BadSetting(
                        f"{place} names {line.key} without a value: write {line.key}=VALUE"
                    )
                if line.key:
                    values[line.key] = line.value or ""
    except UnicodeDecodeError as error:
        raise BadSetting(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    return values


def check_make_overrides(known: Iterable[str]) -> None:
    """Refuse `make train LEARNIN_RATE=1`, which make itself would pass on without a word.

    Our Makefile puts the names that were given on its command line into MAKE_GIVEN.
    """
    for name in os.environ.get("MAKE_GIVEN", "").split():
        if name not in known and name not in MAKE_NAMES:
            near = did_you_mean(name, [*known, *MAKE_NAMES])
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
        return ",".join(value)
    return option.shown(str(value)) if isinstance(value, (Path, str)) else value


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


def load_secrets(folder: Path) -> None:
    """Put the secrets of `env/secrets.env`, where there is one, into the environment of the libraries."""
    path = folder / "secrets.env"
    if path.is_file():
        for key, value in _lines_of(path).items():
            if value and not os.environ.get(key):
                os.environ[key] = value
    for key in SECRETS:
        if os.environ.get(key) == "":  # empty means unset
            del os.environ[key]


def has_token() -> bool:
    """Whether a Hugging Face token was given."""
    return bool(os.environ.get("HF_TOKEN"))


def cache_dir() -> Path:
    """The user's cache folder for this product."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-stages"


def keep_compiled() -> None:
    """Have the compiler keep its results there, if that can be written and its own variables are unset."""
    for variable, kind in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        folder = cache_dir() / "compiled" / kind
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                os.environ.setdefault(variable, str(folder))


def scratch_parent() -> Path:
    """The local folder that holds unfinished work."""
    return Path(os.environ.get("SCRATCH_DIR") or tempfile.gettempdir())


def use_one_thread() -> None:
    """Keep a worker process from starting threads of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of a log that programs read."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "critical",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "BITSANDBYTES_NOWELCOME": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }.items():
        os.environ.setdefault(name, value)
    # It reports a kernel that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.filterwarnings("ignore", module="transformers", category=FutureWarning)
        warnings.filterwarnings("ignore", module="huggingface_hub")
