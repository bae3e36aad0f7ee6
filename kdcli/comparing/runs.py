"""Runs of ``kd train-student`` as models to compare: what they started from, and who taught them."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from pydantic import BaseModel, ConfigDict

from kdcli.console import console
from kdcli.documents import from_document
from kdcli.errors import BadDataError, KdError, NotFoundError
from kdcli.files import storage_errors
from kdcli.models.grammar import ModelSpec
from kdcli.reading import read_json

RESULT, EXPORT, CONFIG = "result.json", "export", "config.json"
CACHE = "manifest.json"
_NO_MODEL = ("pretrained", "random", "xavier")
_STAGE = re.compile(r"stage-(\d+)-.+")


@final
@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        spec: model spec of its export.
        method: that trained it.
        origin: canonical spec of the model whose weights it started from; None where these were new.
        teachers: id of each cached teacher that it learned from, by the name that it had then.
    """

    folder: Path
    spec: str
    method: str
    origin: str | None
    teachers: dict[str, str]


class _Result(BaseModel):
    model_config = ConfigDict(extra="ignore")
    method: str
    student: str | None = None
    init: str | None = None
    weights: dict[str, float] = {}
    teachers: dict[str, str] = {}


def find_runs(folder: Path) -> list[Run]:
    """The run in a folder, or the finished runs anywhere below it, in the order of their paths.

    A sequence over teachers (``stage-K-TEACHER`` folders) counts as its stages; its own export is that of
    the last one. The runs of a grid of learning rates are not looked at, only the one that was chosen.

    Raises:
        BadDataError: a result.json is not one of ``kd train-student``.
        NotFoundError: a finished run has no export.
        StorageError: a folder cannot be read.
    """
    with storage_errors(folder):
        found = list(_folders(folder))
    return [_read(each) for each in found]


def _folders(folder: Path) -> Iterator[Path]:
    if (folder / CACHE).is_file():
        return  # a cache has a file a chunk, and no runs
    with os.scandir(folder) as entries:  # tells folders without a look at each of a million images
        inside = sorted(folder / entry.name for entry in entries if entry.is_dir())
    if (folder / RESULT).is_file():
        stages = [entry for entry in inside if _STAGE.fullmatch(entry.name) and (entry / RESULT).is_file()]
        yield from sorted(stages, key=_number_of) or [folder]
    elif (folder / "run.json").is_file():
        console.note(f"{folder} is not finished: left out")
    else:
        for entry in inside:
            yield from _folders(entry)


def _number_of(stage: Path) -> int:
    found = _STAGE.fullmatch(stage.name)
    return int(found[1]) if found else 0


def _read(folder: Path) -> Run:
    path = folder / RESULT
    result = from_document(
        _Result, read_json(path), f"{path} is no result of kd train-student", hint="Leave its folder out."
    )
    if not (folder / EXPORT / CONFIG).is_file():
        raise NotFoundError(
            f"{folder} has a result, but no {EXPORT}/{CONFIG}", "Train it again, or leave it out."
        )
    try:
        origin = _origin(result)
    except KdError as error:
        raise BadDataError(f"{path}: {error.message}", "Leave its folder out.") from error
    weighted = {name for name, weight in result.weights.items() if weight > 0} or set(result.teachers)
    return Run(
        folder=folder,
        spec=str(ModelSpec("local-dir", "", (folder / EXPORT).absolute())),
        method=result.method,
        origin=origin,
        teachers={name: id_ for name, id_ in result.teachers.items() if name in weighted},
    )


def _origin(result: _Result) -> str | None:
    """Whose weights it started from; None where these were new."""
    text = result.student if result.init == "pretrained" else result.init
    return None if text is None or text in _NO_MODEL else str(ModelSpec.parse(text))


def name_of(folder: Path, base: Path | None = None) -> str:
    """What a run is called: its folder's name; of runs below one folder, their paths from there.

    Args:
        folder: of the run.
        base: folder that was given, where it is not the run's own.
    """
    own = base is None or base == folder
    text = folder.absolute().name if own else os.path.relpath(folder, base)
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", text).replace(os.sep, "/").strip("-./") or "run"
