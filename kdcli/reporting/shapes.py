"""What a report reads of each document: fields, kinds and ranges. What else a document has is none of its business."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from kdcli.comparing.result import Change, ModelFacts, Pair
from kdcli.documents import from_document
from kdcli.errors import BadDataError

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Numbers = dict[str, _Number | None]


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Created(_Shape):
    command: str = ""
    versions: dict[str, Any] = {}


class _Recorded(_Shape):
    """Abstract: of a document that says how it came about."""

    created: _Created | None = None
    versions: dict[str, Any] | None = None


# --- runs ------------------------------------------------------------------------------------------


class _Scores(_Shape):
    top1: _Number | None = None
    top5: _Number | None = None
    mAP: _Number | None = None
    label_accuracy: _Number | None = None
    exact_match: _Number | None = None
    r2: _Number | None = None


class _Stage(_Shape):
    teacher: str
    stage: _Count
    top1: _Number | None = None
    teacher_top1: _Number | None = None
    delta: _Number | None = None
    delta_previous: _Number | None = None
    gain: _Number | None = None
    loss: _Number | None = None
    gain_previous: _Number | None = None
    loss_previous: _Number | None = None


class _Epoch(_Shape):
    epoch: _Count | None = None
    stage: _Count | None = None


class _Run(_Recorded):
    method: str
    epochs: _Count
    history: list[_Epoch]
    out: str
    student: str | None = None
    test: _Scores | None = None
    validation: _Scores | None = None
    original: _Scores | None = None
    stages: list[_Stage] | None = None
    weights: dict[str, _Number] | None = None
    cache_id: str | None = None
    images: _Count | None = None
    seed: int | None = None
    seconds: _Number | None = None
    warning: str | None = None


class _Data(_Shape):
    keys: str | None = None
    labels: str | None = None
    location: str | None = None
    classes: _Count | None = None


class _Sequence(_Shape):
    teachers: list[str]


class _Fusion(_Shape):
    heads: dict[str, _Count]


class _Identity(_Shape):
    step: str | None = None
    method: str | None = None
    student: str | None = None
    epochs: _Count | None = None
    image_size: _Count | None = None
    multi_label: str | None = None
    data: _Data | list[Any] | str | None = None
    test: _Data | list[Any] | str | None = None
    weights: dict[str, _Number] | None = None
    teachers: dict[str, Any] | list[str] | None = None
    sequential: _Sequence | None = None
    levels: dict[str, Any] | str | None = None
    seed: int | None = None
    spec: _Fusion | None = None
    parents: dict[str, Annotated[list[str], Field(min_length=2)]] | None = None


class _Record(_Shape):
    identity: _Identity
    versions: dict[str, Any] | None = None


class _Options(_Shape):
    method: str | None = None
    student: str | None = None
    epochs: _Count | None = None
    image_size: _Count | None = None
    test: list[str] | str | None = None


class _Failed(_Shape):
    name: str
    message: str


class _Sweep(_Shape):
    students: list[dict[str, Any]]
    diverged: list[_Failed]


class _SweepRecord(_Shape):
    diverged: list[_Failed] = []


# --- joint teachers --------------------------------------------------------------------------------


class _Images(_Shape):
    train: _Count | None = None


class _Chosen(_Shape):
    epoch: _Count | None = None
    by: str | None = None
    on_test: bool | None = None


class _Joint(_Recorded):
    levels: str
    heads: dict[str, _Count]
    parents: dict[str, Any]
    metrics: _Numbers
    out: str | None = None
    images: _Images | None = None
    parameters: _Count | None = None
    select: _Chosen | None = None
    tests: dict[str, Any] | None = None


class _Parent(_Shape):
    name: str
    spec: str
    array: str


class _Fused(_Shape):
    parents: list[_Parent]


class _Joints(_Shape):
    joint: dict[str, dict[str, Any]]


# --- probes, comparisons, evidence -----------------------------------------------------------------


class _Mean(_Shape):
    mean: _Number
    std: _Number | None = None
    ci95: _Number | None = None


class _Probe(_Recorded):
    representation: str
    accuracy: _Mean
    target: str | None = None
    relatedness: str | None = None
    metric: str | None = None
    top5: _Mean | None = None
    mean_per_class: _Mean | None = None
    per_class: _Numbers | None = None
    classes: _Count | None = None
    draws: _Count | None = None
    protocol: dict[str, Any] | None = None


class _Tost(_Shape):
    p_not_worse: _Number | None = None


class _Contrast(_Shape):
    representation: str
    baseline: str | None = None
    target: str | None = None
    mean: _Number | None = None
    ci95: _Number | None = None
    p: _Number | None = None
    tost: _Tost | None = None
    verdict: str | None = None


class _Probes(_Recorded):
    results: list[_Probe]
    comparisons: list[_Contrast]
    baseline: str | None = None
    tally: dict[str, dict[str, dict[str, list[str]]]] | None = None
    equal_within: _Number = 0.0


class _Compared(_Shape):
    keys: str
    classes: list[str]
    images: _Count
    spec: str | None = None


class _GroupMean(_Shape):
    mean: _Number | None
    std: _Number | None = None
    count: _Count | None = None


class _Method(_Shape):
    method: str
    success_rate_median: _Number | None
    delta_transf: _GroupMean
    gain: _GroupMean
    loss: _GroupMean


class _Comparison(_Recorded):
    data: _Compared
    models: dict[str, ModelFacts]
    pairs: list[Pair]
    transfers: list[Change]
    methods: list[_Method] = []


class _Target(_Shape):
    students: _Count | None = None
    accuracy: dict[str, _Number] | None = None


class _Estimate(_Shape):
    value: _Number | None = None
    low: _Number | None = None
    high: _Number | None = None
    p: _Number | None = None


class _Evidence(_Shape):
    targets: dict[str, _Target] = {}
    grid: dict[str, dict[str, dict[str, _Estimate]]] = {}
    schemes: dict[str, _Numbers] = {}
    powers: dict[str, _Numbers] = {}


class _WithEvidence(_Recorded):
    evidence: _Evidence | None = None


class _Index(_Shape):
    files: dict[str, str] = {}


SHAPES: Final[Mapping[str, type[BaseModel]]] = {
    "run": _Run,
    "record": _Record,
    "options": _Options,
    "epoch": _Epoch,
    "sweep": _Sweep,
    "sweep record": _SweepRecord,
    "joint teacher": _Joint,
    "joint": _Joints,
    "fused": _Fused,
    "probe": _Probe,
    "probes": _Probes,
    "compare": _Comparison,
    "evidence": _WithEvidence,
    "ranking": _WithEvidence,
    "index": _Index,
}
"""By kind of document."""


def checked(kind: str, document: Any, source: object) -> dict[str, Any]:
    """The document itself, when what a report reads of it is what it should be.

    Args:
        kind: key of :data:`SHAPES`.
        document: as it was parsed.
        source: the file, for the message.

    Raises:
        BadDataError: naming the file and the field.
    """
    if not isinstance(document, dict):
        raise BadDataError(f"{source}: it holds no keys and values", "Restore the file or leave it out.")
    from_document(SHAPES[kind], document, source, BadDataError, "Restore the file or leave it out.")
    return document
