"""An adapter as files: its names, and where one lies. No torch here."""

from pathlib import Path

from stages.lib.run.exits import Missing

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def find(path: Path) -> Path:
    """The folder of an adapter, given itself or its run directory.

    Raises:
        Missing: it is in neither.
    """
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise Missing(
        f"INIT_ADAPTER: there is no adapter in {path.absolute()}: {CONFIG} and {WEIGHTS} are looked for"
    )
