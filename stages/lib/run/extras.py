"""Packages that only some settings need; `requirements-eval.txt` has them."""

import importlib.util

from stages.lib.run.exits import CannotRun


def require(package: str, variable: str) -> None:
    """Refuse a setting whose package is not installed.

    Raises:
        CannotRun: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise CannotRun(
            f"{variable} needs the package {package}: install requirements-eval.txt with pip, or build the "
            "image with `make docker-build EXTRAS=eval`"
        )
