"""Rankings as JSON: what ``kd rank-sources --json`` prints and ``--ranking`` reads."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NoReturn, final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kdcli.cache.fingerprints import unpack
from kdcli.documents import from_document
from kdcli.errors import BadDataError, KdError, NotFoundError
from kdcli.files import beside
from kdcli.options.resolving import spelled
from kdcli.reading import parse_json
from kdcli.types import RankedSource, Ranking


def require_ranking(source: str, caches: Sequence[object], data: object) -> None:
    """Refuse a ``--ranking`` that is no file; ``-`` is standard input.

    Args:
        source: its value.
        caches: that a ranking would be made from.
        data: that it would be made on.

    Raises:
        NotFoundError: with the command that makes it.
    """
    path = Path(source)
    if source == "-" or (path.exists() and not path.is_dir()):
        return
    command = spelled("rank-sources", cache=tuple(caches), data=data, json=True)
    raise NotFoundError(
        f"--ranking {path} is {'a folder' if path.is_dir() else 'not there'}.{'' if path.is_dir() else beside(path)}",
        f"{command} > {'ranking.json' if path.is_dir() else quote(str(path))}",
    )


def ranking_document(ranking: Ranking) -> dict[str, Any]:
    """What ``kd rank-sources --json`` prints."""
    document = asdict(ranking)
    if not ranking.weighting:
        del document["weighting"]
    return document


@final
class _SourceDocument(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    name: str
    id: str | None
    score: float
    weight: float = Field(ge=0, le=1)


@final
class _ProbeDocument(BaseModel):
    model_config = ConfigDict(extra="allow")
    size: int | None = Field(None, ge=0, lt=2**63)
    seed: int | None = Field(None, ge=0, lt=2**63)
    repeats: int | None = Field(None, ge=1, lt=2**31)
    logme_steps: int | None = Field(None, ge=1, lt=2**31)
    images: str = ""  # of rankings that name none; given, it has to name some

    @field_validator("images")
    @classmethod
    def _names_images(cls, images: str) -> str:
        unpack(images)
        return images


@final
class _WeightingDocument(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    scheme: str | None = None
    power: float | Literal["inf"] | None = Field(None)
    sources: int | None = Field(None, ge=1, lt=2**31)


@final
class _RankingDocument(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    cache_id: str | None
    metric: str
    on: str
    probe: dict[str, Any]
    sources: tuple[_SourceDocument, ...] = Field(min_length=1, max_length=100_000)
    weighting: dict[str, Any] = {}
    table: dict[str, dict[str, float | None]] | None = None
    data: str | None = None


@final
class _ErrorFields(BaseModel):
    code: int = Field(ge=1, le=255)
    message: str
    hint: str = ""


@final
class _ErrorDocument(BaseModel):
    error: _ErrorFields


_RERUN = "Give what 'kd rank-sources --json' prints, as a file or through a pipe with --ranking -."


def parse_ranking(data: str | bytes, source: object = "the ranking") -> Ranking:
    """The ranking in a JSON document, see :func:`ranking_of`.

    Args:
        data: text, or its bytes.
        source: the file, for the message.
    """
    if not data.strip():
        raise BadDataError(f"{source} is empty", _RERUN)
    return ranking_of(parse_json(data, source, hint=_RERUN), source)


def ranking_of(document: Any, source: object) -> Ranking:
    """Read a ranking; an error document of the command before in the pipe is raised again as it was.

    Args:
        document: parsed JSON.
        source: the file, for the message.

    Raises:
        BadDataError: no ranking; the message says where.
        KdError: the document is ``{"error": ...}``; ``exit_code`` is the code in it.
    """
    if isinstance(document, dict) and "error" in document:
        _raise_again(from_document(_ErrorDocument, document, source, hint=_RERUN).error)
    fields = _fields_of(document, source)
    _check_sources(fields.sources, source)
    sources = tuple(RankedSource(s.name, s.id, s.score, s.weight) for s in fields.sources)
    return Ranking(fields.cache_id, fields.metric, fields.on, fields.probe, sources, fields.weighting)


def _fields_of(document: Any, source: object) -> _RankingDocument:
    fields = from_document(_RankingDocument, document, source, hint=_RERUN)
    from_document(_ProbeDocument, fields.probe, f"{source}: probe", hint=_RERUN)
    weighting_of(fields.weighting, f"{source}: weighting")
    return fields


def weighting_of(document: Any, source: object) -> tuple[str, float | None, bool]:
    """What a ranking says of how its weights were made.

    Returns:
        The scheme; its power, of ``weighted`` where another than P2's is told; whether sources were selected first.

    Raises:
        BadDataError: it says it wrongly.
    """
    found = from_document(_WeightingDocument, document, source, hint=_RERUN)
    power = math.inf if found.power == "inf" else found.power
    return found.scheme or "weighted", power, found.sources is not None


def table_of(document: Any, source: object) -> tuple[dict[str, dict[str, float | None]], str | None]:
    """Scores by column of a ranking by all metrics, and what ``--data`` named."""
    fields = _fields_of(document, source)
    return fields.table or {}, fields.data


def _check_sources(sources: Sequence[_SourceDocument], source: object) -> None:
    total = math.fsum(each.weight for each in sources)
    if abs(total - 1) > 1e-6:
        raise BadDataError(f"{source}: the weights sum to {total:g}, not 1", _RERUN)
    ((name, times),) = Counter(each.name for each in sources).most_common(1)
    if times > 1:
        raise BadDataError(f"{source} names source '{name}' {times} times", _RERUN)


def _raise_again(error: _ErrorFields) -> NoReturn:
    kinds = {kind.exit_code: kind for kind in KdError.__subclasses__()}
    again = kinds.get(error.code, KdError)(error.message, error.hint)
    vars(again)["exit_code"] = error.code  # no class has the codes of bugs and signals
    raise again
