"""What a model folder consists of. Importing this needs no torch."""

from pathlib import Path
from typing import Final

from kdcli.errors import NotFoundError
from kdcli.files import beside

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
_EXPORTS: Final = "kd train-student writes OUT/export."


def require_model_folder(folder: Path) -> None:
    """Refuse what a ``local-dir:`` cannot be: no folder, or one without a configuration.

    Raises:
        NotFoundError: with where it may be meant to be.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no model folder '{folder}'.{beside(folder, folders=True)}",
            f"Check the path; {_EXPORTS}",
        )
    if not (folder / CONFIG_FILE).exists():
        inside = folder / "export"
        hint = f"Write local-dir:{inside}." if (inside / CONFIG_FILE).is_file() else _EXPORTS
        raise NotFoundError(f"'{folder}' is no model folder: it has no {CONFIG_FILE}", hint)
