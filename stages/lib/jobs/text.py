"""Specs as text: YAML and JSON that every reader takes alike, and words for a shell."""

import itertools
import json
import re
import shlex
from typing import Any

# Without quotes, readers of YAML differ about the rest: 2e-4 is a text to one and a number to another.
BARE = re.compile(
    r"(?!(?:true|false|yes|no|on|off|y|n|null)$)[A-Za-z/][\w./@-]*(?::[\w./@-]+)*", re.I
)


def to_yaml(value: Any) -> str:
    """As YAML, every text that could be read as something else in quotes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, word: str) -> Any:
        style = "|" if _is_block(word) else None if BARE.fullmatch(word) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", word, style=style)

    Dumper.add_representer(str, text)
    Dumper.ignore_aliases = lambda *_: True
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, width=1 << 20, allow_unicode=True))


def _is_block(word: str) -> bool:
    """Whether it is a script, which is easier to read as a block."""
    lines = word.split("\n")
    return (
        len(lines) > 2 and not lines[-1] and word[0].isalpha() and all(map(str.isprintable, lines))
    )


def from_yaml(text: str) -> Any:
    """What YAML holds.

    Raises:
        ValueError: it is none.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from error


def to_json(value: Any) -> str:
    """As JSON to read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Any:
    """What JSON holds.

    Raises:
        ValueError: it is none.
    """
    return json.loads(text)


def exports(variables: dict[str, str], prefix: str = "") -> list[str]:
    """Lines of a shell that set variables to the letter."""
    return [f"export {prefix}{name}={shlex.quote(value)}" for name, value in variables.items()]


def command(words: list[str], indent: str = "") -> str:
    """A command with one argument a line, an option and its value on one; `words` are quoted already."""
    return f" \\\n{indent}  ".join(words)


def words(text: str) -> list[str]:
    """The words of a shell script, without its comments.

    Raises:
        ValueError: a quote is left open.
    """
    return [
        word for word in shlex.split(text, comments=True) if word != "\n"
    ]  # a line that goes on


def exported(script: list[str]) -> dict[str, str]:
    """What the words of a script export."""
    pairs = itertools.pairwise(script)
    found = (after.partition("=") for before, after in pairs if before == "export" and "=" in after)
    return {name: value for name, _, value in found if name.isidentifier()}


def after(script: list[str], option: str) -> list[str]:
    """The values of an option wherever it is given, as `--option VALUE` or `--option=VALUE`."""
    found = [word.partition("=")[2] for word in script if word.startswith(f"{option}=")]
    pairs = itertools.pairwise(script)
    return found + [value for word, value in pairs if word == option]


def codes_of(text: str) -> list[int]:
    """The exit codes of the branch `75|137|143)` of a script."""
    found = re.search(r"^\s*([\d|]+)\)", text, re.M)
    return [int(code) for code in found[1].split("|")] if found else []
