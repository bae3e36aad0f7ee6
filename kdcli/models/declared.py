"""How a model wants its pixels, and what its classes are, as its owner wrote it: the fields of timm's pretrained_cfg.

All that says so is read here, and strictly: the config.json of a model folder, what lies beside or in an ONNX file,
what a Python model declares.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, final

from pydantic import BaseModel, ConfigDict, Field
from timm.models import PretrainedCfg

from kdcli.documents import from_document
from kdcli.errors import BadDataError
from kdcli.geometry import LEAST_CROP
from kdcli.models.arguments import is_reserved
from kdcli.models.folder import WEIGHTS_FILE
from kdcli.models.grammar import TORCHVISION
from kdcli.types import CropMode, Interpolation, Preprocess, Size

EXAMPLE: Final = (
    '{"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": [0.485, 0.456, 0.406],'
    ' "std": [0.229, 0.224, 0.225], "crop_pct": 0.875}'
)
DEFAULT: Final[Mapping[str, Any]] = json.loads(EXAMPLE)
"""timm's own defaults."""

INTERPOLATION: dict[str, Interpolation] = {
    "nearest": "nearest",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "lanczos",
    "random": "bilinear",  # timm draws bilinear or bicubic in training; a cache needs one
}
"""Our name of each filter that a pretrained configuration may name."""

_SOURCES: Final = frozenset({"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"})
"""Where timm would look for weights: a model folder has its own, and says of none but these."""
_DESCRIBING: Final = frozenset(field.name for field in fields(PretrainedCfg)) - _SOURCES
_OLD: Final = frozenset({"num_features", "labels", "model_args"})
"""What timm's first layout, which has no pretrained_cfg, says beside it."""

_Side = Annotated[int, Field(gt=0, le=2**14)]
_Mean = Annotated[float, Field(ge=-1e4, le=1e4)]
_Std = Annotated[float, Field(ge=1e-4, le=1e4)]


class _Pixels(BaseModel):
    """What else there is does not matter."""

    model_config = ConfigDict(frozen=True)

    input_size: tuple[Literal[3], _Side, _Side]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "random"]
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Std, _Std, _Std]
    crop_pct: float = Field(ge=LEAST_CROP, lt=2)  # timm's VOLO has 1.15: a crop larger than the image
    crop_mode: CropMode = "center"


@final
class _ClipPixels(_Pixels):
    """Of a model of clips: frames, height, width."""

    input_size: tuple[Literal[3], _Side, _Side, _Side]  # type: ignore[assignment]  # one axis more


@final
class _Rest(BaseModel):
    """Fields of a pretrained_cfg that timm works with, whatever it does with them in evaluation."""

    model_config = ConfigDict(frozen=True)

    custom_load: bool | None = None
    fixed_input_size: bool | None = None
    label_offset: Annotated[int, Field(ge=0, le=10**7)] | None = None
    first_conv: str | list[str] | None = None
    classifier: str | list[str] | None = None
    test_input_size: tuple[Literal[3], _Side, _Side] | None = None
    min_input_size: tuple[Literal[3], _Side, _Side] | None = None
    test_crop_pct: Annotated[float, Field(ge=LEAST_CROP, lt=2)] | None = None
    pool_size: list[_Side] | None = None
    test_pool_size: list[_Side] | None = None


@final
class _Classes(BaseModel):
    """What a model folder says of its classes; timm allows gaps where names are by number."""

    model_config = ConfigDict(frozen=True)

    num_classes: Annotated[int, Field(ge=0, le=10**7)] | None = None
    label_names: list[str] | dict[str, str] | None = None


def declared_preprocess(config: Mapping[str, Any], where: str, image_size: Size | None) -> Preprocess:
    """The preprocessing that ``config`` declares.

    Args:
        config: input_size, interpolation, mean, std and crop_pct, as in :data:`EXAMPLE`, and crop_mode where it is
            not ``center``; what else there is does not matter.
        where: what to call it in errors.
        image_size: of the images in place of ``input_size``'s.

    Raises:
        BadDataError: a field is missing, of another type, or out of range.
    """
    hint = f"For example {EXAMPLE}"
    known = {name: config[name] for name in _Pixels.model_fields if name in config}
    try:
        json.dumps(known)
    except (TypeError, ValueError) as error:  # a Python model may declare anything
        raise BadDataError(f"{where} is no plain numbers and texts: {error}", hint) from error
    size = known.get("input_size")
    kind = _ClipPixels if isinstance(size, list | tuple) and len(size) == 4 else _Pixels
    pixels = from_document(kind, known, where, BadDataError, hint)
    return Preprocess(
        size=image_size or pixels.input_size[1:],
        interpolation=INTERPOLATION[pixels.interpolation],
        mean=pixels.mean,
        std=pixels.std,
        crop_fraction=pixels.crop_pct,
        crop_mode=pixels.crop_mode,
    )


def class_names(config: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    """The names of the classes, in order of the logits; None where ``config`` does not name all of them.

    Args:
        config: ``label_names``, a list or an object of names by number, and ``num_classes``.
        where: what to call it in errors.

    Raises:
        BadDataError: they are no texts, one is there twice, or they are not as many as ``num_classes``.
    """
    known = {name: config[name] for name in _Classes.model_fields if name in config}
    classes = from_document(
        _Classes, known, where, BadDataError, "Give the number of classes, and one name a class or none."
    )
    names, count = classes.label_names, classes.num_classes
    if not names:
        return None
    listed = list(names.values()) if isinstance(names, dict) else names
    name, times = Counter(listed).most_common(1)[0]
    if times > 1:
        raise BadDataError(
            f"{where}: label_names: '{name}' is there {times} times",
            "Give every class a name of its own, or none.",
        )
    if isinstance(names, dict):
        ordered = [names.get(str(number)) for number in range(len(names) if count is None else count)]
        return None if None in ordered else tuple(name for name in ordered if name is not None)
    if count not in (None, len(names)):
        raise BadDataError(
            f"{where}: label_names gives {len(names)} names for {count} classes",
            "Give one name per class, in the order of the logits, or none.",
        )
    return tuple(names)


def _require_describing(inner: Mapping[str, Any], where: Path, nested: bool) -> None:
    """Refuse what says more than which pixels and which classes: above all, where other weights are."""
    place = "pretrained_cfg." if nested else ""
    for name, value in inner.items():
        if value and name in _SOURCES:
            raise BadDataError(
                f"'{where}': {place}{name} names weights, and a model folder's are {WEIGHTS_FILE} beside it",
                f"Remove {name} from it.",
            )
        if name not in _DESCRIBING | _SOURCES and (nested or name not in _OLD):
            raise BadDataError(f"'{where}': {place}{name}: unknown field", "It must be in timm's layout.")
    known = {name: inner[name] for name in _Rest.model_fields if name in inner}
    from_document(_Rest, known, f"'{where}'", BadDataError, "Export the model anew.")


def check_model_config(document: Mapping[str, Any], where: Path) -> None:
    """Make sure that the config.json of a model folder can be meant, before timm makes something of it.

    timm fills in what is missing, and also what is null, by its defaults; here null is refused.

    Args:
        document: in timm's layout, with ``pretrained_cfg`` or, as of old, without.
        where: the file.

    Raises:
        BadDataError: a field is of a wrong type or out of range, or two of them contradict each other.
    """
    if not isinstance(document.get("architecture"), str):
        raise BadDataError(
            f"'{where}': architecture is no text", "It must be in timm's layout; export the model anew."
        )
    arguments = document.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise BadDataError(f"'{where}': model_args is no JSON object", "Export the model anew.")
    own = document["architecture"].startswith(TORCHVISION)  # torchvision_models.py has a list of its own
    for name in () if own else filter(is_reserved, arguments):
        raise BadDataError(
            f"'{where}': model_args.{name} could load other weights than its own", "Remove it from there."
        )
    inner = document.get("pretrained_cfg", document)
    if not isinstance(inner, dict):
        raise BadDataError(f"'{where}': pretrained_cfg is no JSON object", "Export the model anew.")
    _require_describing(inner, where, "pretrained_cfg" in document)
    declared_preprocess({**DEFAULT, **inner}, f"'{where}'", None)
    counts = {
        f"{place}num_classes": part["num_classes"]
        for place, part in (("", document), ("pretrained_cfg.", inner), ("model_args.", arguments))
        if isinstance(part, dict) and part.get("num_classes") is not None
    }
    if "num_classes" in document and document["num_classes"] is None:
        raise BadDataError(f"'{where}': num_classes is null", "Export the model anew.")
    for name, count in counts.items():
        from_document(
            _Classes, {"num_classes": count}, f"'{where}': {name}", BadDataError, "Export the model anew."
        )
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} is {count}" for name, count in counts.items())
        raise BadDataError(f"'{where}' contradicts itself: {said}", "Export the model anew.")
    names = document.get("label_names", inner.get("label_names"))
    count = {"num_classes": next(iter(counts.values()))} if counts else {}
    class_names({"label_names": names, **count}, f"'{where}'")
