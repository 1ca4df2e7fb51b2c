"""Packages that only some settings need; `requirements-eval.txt` and `requirements-dev.txt` have them."""

import importlib.util

from stages.lib.run.exits import CannotRun


def require(package: str, variable: str, distribution: str | None = None) -> None:
    """Refuse a setting whose package is not installed.

    Args:
        distribution: the name to install it by, if it is only for development.

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
        f"{variable} needs the package {package}: install requirements-eval.txt with pip, or build the "
        "image with `make docker-build EXTRAS=eval`"
    )


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it would be a part of
        return False
