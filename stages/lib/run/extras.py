"""Packages that only some settings need; `requirements-EXTRA.txt` and `requirements-dev.txt` have them."""

import importlib.util

from stages.lib.run.exits import CannotRun


def require(
    package: str, variable: str, distribution: str | None = None, extra: str = "eval"
) -> None:
    """Refuse a setting whose package is not installed.

    Args:
        distribution: the name to install it by, if it is only for development.
        extra: whose file of requirements has it otherwise.

    Raises:
        CannotRun: it is not.
    """
    if _is_there(package):
        return
    if distribution:
        raise CannotRun(
            f"{variable} needs the package {distribution}: install requirements-dev.txt with pip"
        )
    raise CannotRun(
        f"{variable} needs the package {package}: install requirements-{extra}.txt with pip, or build "
        f"the image with `make docker-build EXTRAS={extra}`"
    )


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it would be a part of
        return False
