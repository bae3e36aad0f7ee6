"""Rankings as JSON: what ``kd rank-sources --json`` prints and ``--ranking`` reads."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kdcli.cache.fingerprints import unpack
from kdcli.errors import BadDataError, KdError
from kdcli.types import RankedSource, Ranking


def ranking_document(ranking: Ranking) -> dict[str, Any]:
    """What ``kd rank-sources --json`` prints."""
    document = asdict(ranking)
    if not ranking.weighting:
        del document["weighting"]
    return document


@final
class _SourceDocument(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, strict=True)
    name: str
    id: str | None
    score: float
    weight: float = Field(ge=0)


@final
class _RankingDocument(BaseModel):
    cache_id: str | None
    metric: str
    on: str
    probe: dict[str, Any]
    sources: tuple[_SourceDocument, ...] = Field(min_length=1)
    weighting: dict[str, Any] = {}

    @field_validator("probe")
    @classmethod
    def _names_images(cls, probe: dict[str, Any]) -> dict[str, Any]:
        if "images" in probe:
            unpack(str(probe["images"]))
        return probe


@final
class _ErrorFields(BaseModel):
    code: int = Field(ge=1, le=255)
    message: str
    hint: str = ""


@final
class _ErrorDocument(BaseModel):
    error: _ErrorFields


_RERUN = "Give what 'kd rank-sources --json' prints, as a file or through a pipe with --ranking -."


def parse_ranking(text: str) -> Ranking:
    """Read a ranking; an error document of the command before in the pipe is raised again as it was.

    Args:
        text: one JSON document.

    Raises:
        BadDataError: empty, not JSON, or no ranking; the message says which and where.
        KdError: the document is ``{"error": ...}``; ``exit_code`` is the code in it.
    """
    if not text.strip():
        raise BadDataError("the ranking is empty", _RERUN)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BadDataError(f"the ranking is not JSON: {error}", _RERUN) from error
    try:
        if isinstance(document, dict) and "error" in document:
            _raise_again(_ErrorDocument.model_validate(document).error)
        fields = _RankingDocument.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise BadDataError(f"the JSON is not a ranking: {place}: {first['msg']}", _RERUN) from error
    _check_sources(fields.sources)
    sources = tuple(RankedSource(s.name, s.id, s.score, s.weight) for s in fields.sources)
    return Ranking(fields.cache_id, fields.metric, fields.on, fields.probe, sources, fields.weighting)


def _check_sources(sources: Sequence[_SourceDocument]) -> None:
    total = math.fsum(source.weight for source in sources)
    if abs(total - 1) > 1e-6:
        raise BadDataError(f"the weights of the ranking sum to {total:g}, not 1", _RERUN)
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadDataError(f"the ranking names source '{twice}' twice", _RERUN)


def _raise_again(error: _ErrorFields) -> NoReturn:
    kinds = {kind.exit_code: kind for kind in KdError.__subclasses__()}
    again = kinds.get(error.code, KdError)(error.message, error.hint)
    vars(again)["exit_code"] = error.code  # no class has the codes of bugs and signals
    raise again
