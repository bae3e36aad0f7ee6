"""Results of students, read as evidence: which sources taught each, by which scheme, and how well it does."""

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

from pydantic import BaseModel, ConfigDict, Field

from kdcli.console import console
from kdcli.documents import from_document
from kdcli.errors import BadDataError, NotFoundError
from kdcli.files import storage_errors
from kdcli.ranking.documents import weighting_of
from kdcli.ranking.weights import PAPER_POWER
from kdcli.reading import read_json
from kdcli.reading_yaml import read_yaml
from kdcli.registry import METHODS

RESULT = "result.json"
LABELS_ONLY, RANDOM_SELECTION, RANDOM_WEIGHTS = "labels-only", "random-selection", "random-weights"


@final
@dataclass(frozen=True, slots=True)
class Student:
    """One finished student.

    Attributes:
        path: of its result.
        accuracy: on the test set, a fraction.
        weights: of the sources that taught it.
        scheme: ``labels-only``, ``equal``, ``nearest``, ``weighted``, ``inverse`` or ``random-weights``;
            None where it says nothing about a scheme.
        power: p of ``weighted``.
        cache_id: of the cache it read; None without one.
        target: name of its task, where the result gives one.
        data: what it was trained on, where that is known.
        setting: what should be the same for students that are compared.
    """

    path: Path
    accuracy: float
    weights: dict[str, float]
    scheme: str | None
    power: float | None
    cache_id: str | None
    target: str | None
    data: str | None
    setting: dict[str, Any]

    @property
    def single(self) -> str | None:
        """The one source that taught it, if it is one."""
        return next(iter(self.weights)) if len(self.weights) == 1 else None


class _Ranking(BaseModel):
    weighting: dict[str, Any] = {}


class _Test(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    top1: float = Field(ge=0, le=1)


class _Result(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    method: str
    test: _Test | None
    weights: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    cache_id: str | None = None
    target: str | None = None
    data: str | None = None
    student: str | None = None
    images: int | None = Field(None, ge=0, lt=2**63)
    epochs: int | None = Field(None, ge=0, lt=2**63)
    init: str | None = None


def read_students(places: Sequence[str]) -> list[Student]:
    """The students in files, folders (every result.json below) and patterns; those without a test are left out.

    Raises:
        NotFoundError: a place holds no result.
        BadDataError: a file is no result of ``kd train-student``.
    """
    paths = list(dict.fromkeys(path for place in places for path in _paths(place)))
    found = [student for path in paths if (student := _read(path)) is not None]
    left_out = len(paths) - len(found)
    if left_out:
        console.note(f"{left_out} of {len(paths)} results are of other methods or were not tested: left out")
    if not found:
        raise BadDataError(
            f"none of the {len(paths)} results of --against has a test accuracy of a P2 method",
            "Train students with --test DATA: kd train-student DATA --teacher SOURCE --method distill-equal ...",
        )
    return found


def _paths(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        found = sorted(path.rglob(RESULT))
    elif path.is_file():
        found = [path]
    else:
        matches = sorted(glob.glob(place, recursive=True))  # noqa: PTH207 - a pattern may be absolute
        found = [Path(name) for name in matches if Path(name).is_file()]
    if not found:
        raise NotFoundError(
            f"--against {place} holds no result",
            "Name result.json files of kd train-student, or their folder.",
        )
    return found


def _read(path: Path) -> Student | None:
    result = from_document(
        _Result,
        read_json(path),
        f"{path} is no result of kd train-student",
        hint="Leave it out of --against.",
    )
    # A file may name any object as its method; only those that are known by name are looked at.
    scheme = METHODS[result.method].scheme if result.method in METHODS else None
    if result.test is None or scheme is None:
        return None
    weights = {name: weight for name, weight in result.weights.items() if weight > 0}
    used, power = _scheme(scheme, path, weights)
    setting = {
        "student": result.student, "init": result.init, "images": result.images, "epochs": result.epochs,
    }  # fmt: skip
    return Student(
        path, result.test.top1, weights, used, power, result.cache_id, result.target,
        result.data or _data_of(path), setting,
    )  # fmt: skip


def _scheme(scheme: str, path: Path, weights: dict[str, float]) -> tuple[str | None, float | None]:
    """How a student's weights were made; the ranking beside its result says which scheme and which p."""
    if scheme == "equal":
        return (scheme, None) if len(weights) > 1 else (None, None)
    if scheme != "weighted":
        return scheme, None
    file = path.parent / "ranking.json"
    weighting = from_document(_Ranking, read_json(file), file).weighting if file.exists() else {}
    scheme, told, preselected = weighting_of(weighting, f"{file}: weighting")
    if preselected:
        return None, None  # a preselection is none of P2's schemes
    if scheme != "weighted":
        return scheme, None
    power = PAPER_POWER if told is None else told
    if power == 0:
        return "equal", None
    return ("nearest", None) if math.isinf(power) else (scheme, power)


def _data_of(path: Path) -> str | None:
    """The data set in the configuration beside a result."""
    file = path.parent / "config.yaml"
    if not file.exists():
        return None
    with storage_errors(file):
        document = read_yaml(file, error=BadDataError, hint="Restore the file or remove it.")
    data = document.get("data") if isinstance(document, dict) else None
    return data if isinstance(data, str) else None
