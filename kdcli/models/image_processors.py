"""The preprocessing of a transformers image processor as kd's own, or the field that kd cannot reproduce.

transformers resizes to a height and width (squash) or to a shorter side, cuts a square out of the middle, and
normalises. Which pixels a processor of another class makes is not known here, so it is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, final

from kdcli.errors import BadDataError
from kdcli.geometry import LEAST_CROP
from kdcli.types import EvalMode, Interpolation, Preprocess

_KNOWN: Final = frozenset(
    {
        "BeitImageProcessor",
        "BitImageProcessor",
        "BlipImageProcessor",
        "CLIPImageProcessor",
        "ChineseCLIPImageProcessor",
        "ConvNextImageProcessor",
        "DINOv3ViTImageProcessor",
        "DeiTImageProcessor",
        "MobileNetV1ImageProcessor",
        "MobileNetV2ImageProcessor",
        "PvtImageProcessor",
        "SegformerImageProcessor",
        "SiglipImageProcessor",
        "ViTImageProcessor",
    }
)
_FILTERS: Final[dict[int, Interpolation]] = {2: "bilinear", 3: "bicubic"}
"""By Pillow's number; transformers has other filters only in one of its two backends."""
_LARGEST: Final = 2**14
"""Pixels of a side."""
_CONVNEXT_WHOLE: Final = 384
"""From this size on ConvNeXT's processor squeezes the whole image."""


@final
class _Refused(Exception):
    """A field of a processor, and what is wrong with it."""


def preprocess_of(document: Mapping[str, Any], where: str) -> Preprocess:
    """What an image processor does, at its own size.

    Args:
        document: of the processor, its defaults filled in (``to_dict()``).
        where: what to call it in errors.

    Raises:
        BadDataError: it does what kd does not, naming the field.
    """
    kind = str(document["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
    if kind not in _KNOWN:
        raise BadDataError(
            f"{where}: image_processor_type: kd does not know which pixels a {kind} makes",
            f"Known: {', '.join(sorted(_KNOWN))}. For others: a pkg.mod:OBJECT teacher of your own.",
        )
    try:
        _require_plain(document)
        geometry = _convnext if kind == "ConvNextImageProcessor" else _geometry
        size, crop_mode, fraction = geometry(document)
        if fraction < LEAST_CROP:
            raise _Refused(f"crop_size or crop_pct: {fraction:g} of an image")
        return Preprocess(
            size=size,
            interpolation=_filter(document),
            mean=_three(document, "image_mean", 0.0),
            std=_three(document, "image_std", 1.0),
            crop_fraction=fraction,
            crop_mode=crop_mode,
        )
    except _Refused as refusal:
        raise BadDataError(
            f"{where}: {refusal}, which kd cannot reproduce",
            "Use another checkpoint, or a pkg.mod:OBJECT teacher that declares its preprocess.",
        ) from refusal


def _geometry(document: Mapping[str, Any]) -> tuple[tuple[int, int], EvalMode, float]:
    """Input size, and crop mode and fraction by which timm resizes as the processor does."""
    if not document.get("do_resize"):
        raise _Refused("do_resize: images keep their own sizes")
    size = _given(document, "size")
    crop = _given(document, "crop_size") if document.get("do_center_crop") else None
    if size.keys() == {"height", "width"}:
        resized = (size["height"], size["width"])
        cut = resized if crop is None else _sides(crop)
        fraction = _fraction(cut[0], resized[0])
        if math.floor(cut[1] / fraction) != resized[1]:
            raise _Refused(f"crop_size: {crop} of {size} keeps more of one side than of the other")
        if any((whole - side) % 4 == 3 for whole, side in zip(resized, cut, strict=True)):
            raise _Refused(f"crop_size: {crop} of {size} cuts off an odd number of pixels")
        return cut, "squash", fraction
    if size.keys() == {"shortest_edge"}:
        if crop is None:
            raise _Refused("do_center_crop: images keep their own aspect ratio")
        cut = _sides(crop)
        if cut[0] != cut[1]:
            raise _Refused(f"crop_size: {crop} is no square")
        return cut, "center-down", _fraction(cut[0], size["shortest_edge"])
    raise _Refused(f"size: {size}")


def _convnext(document: Mapping[str, Any]) -> tuple[tuple[int, int], EvalMode, float]:
    """ConvNeXT's resize crops by itself, below 384 pixels."""
    size, fraction = _given(document, "size"), document.get("crop_pct")
    if not document.get("do_resize") or document.get("do_center_crop") or size.keys() != {"shortest_edge"}:
        raise _Refused(f"do_resize, do_center_crop or size: {size}")
    side = size["shortest_edge"]
    if side >= _CONVNEXT_WHOLE:
        return (side, side), "squash", 1.0
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise _Refused(f"crop_pct: {fraction}")
    return (side, side), "center-down", float(fraction)


def _given(document: Mapping[str, Any], field: str) -> dict[str, int]:
    value = document.get(field)
    sides = (
        {name: side for name, side in value.items() if side is not None} if isinstance(value, Mapping) else {}
    )
    if not sides or any(type(side) is not int or not 0 < side <= _LARGEST for side in sides.values()):
        raise _Refused(f"{field}: {value}")
    return sides


def _sides(crop: Mapping[str, int]) -> tuple[int, int]:
    if crop.keys() != {"height", "width"}:
        raise _Refused(f"crop_size: {crop}")
    return crop["height"], crop["width"]


def _fraction(side: int, resized: int) -> float:
    """The fraction by which timm, which resizes to ``floor(side / fraction)``, resizes to ``resized``."""
    if side > resized:
        raise _Refused(f"crop_size: {side} of an image of {resized} pixels is padded")
    fraction = side / resized
    return fraction if math.floor(side / fraction) == resized else math.nextafter(fraction, 0)


def _filter(document: Mapping[str, Any]) -> Interpolation:
    resample = document.get("resample")
    if not isinstance(resample, int) or resample not in _FILTERS:
        raise _Refused(f"resample: the filter {resample}")
    return _FILTERS[int(resample)]


def _require_plain(document: Mapping[str, Any]) -> None:
    """Pixels of [0, 1] and nothing around them."""
    factor = document.get("rescale_factor")
    if not document.get("do_rescale") or not math.isclose(factor or 0, 1 / 255, rel_tol=1e-6):
        raise _Refused(f"rescale_factor: {factor if document.get('do_rescale') else 1} instead of 1/255")
    if document.get("do_pad"):
        raise _Refused("do_pad: images are padded")


def _three(document: Mapping[str, Any], field: str, default: float) -> tuple[float, float, float]:
    """Mean or std; ``default`` where nothing is normalised."""
    if not document.get("do_normalize"):
        return (default,) * 3
    value = document.get(field)
    values = [value] * 3 if isinstance(value, int | float) else list(value or ())
    if len(values) != 3 or not all(isinstance(each, int | float) and abs(each) <= 1e4 for each in values):
        raise _Refused(f"{field}: {value}")
    if field == "image_std" and min(values) < 1e-4:
        raise _Refused(f"{field}: {value}")
    return float(values[0]), float(values[1]), float(values[2])
