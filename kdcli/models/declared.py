"""How a model wants its pixels, as its owner wrote it: with the fields of timm's pretrained_cfg."""

from collections.abc import Mapping
from typing import Any, Final, cast, get_args

from kdcli.errors import BadDataError
from kdcli.models.timm_models import INTERPOLATION
from kdcli.types import CropMode, Preprocess

EXAMPLE: Final = (
    '{"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": [0.485, 0.456, 0.406],'
    ' "std": [0.229, 0.224, 0.225], "crop_pct": 0.875}'
)


def declared_preprocess(config: Mapping[str, Any], where: str, image_size: int | None) -> Preprocess:
    """The preprocessing that ``config`` declares.

    Args:
        config: input_size, interpolation, mean, std and crop_pct, as in :data:`EXAMPLE`, and crop_mode where it is
            not center; what else there is does not matter.
        where: what to call it in errors.
        image_size: side of the images in place of ``input_size``'s.

    Raises:
        BadDataError: a field is missing or out of range.
    """
    try:
        channels, height, width = (int(side) for side in config["input_size"])
        mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
        crop_fraction = float(config["crop_pct"])
        interpolation = INTERPOLATION[config["interpolation"]]
        crop_mode = str(config.get("crop_mode") or "center")
    except KeyError as error:
        if error.args[0] in ("input_size", "mean", "std", "crop_pct", "interpolation"):
            raise BadDataError(f"{where} has no {error}", f"For example {EXAMPLE}") from error
        raise BadDataError(
            f"{where} wants the filter {error}", f"Known: {', '.join(INTERPOLATION)}."
        ) from error
    except (TypeError, ValueError) as error:
        raise BadDataError(f"{where} cannot be used: {error}", f"For example {EXAMPLE}") from error
    sizes_fit = channels == len(mean) == len(std) == 3 and min(height, width) > 0
    if not (sizes_fit and min(std) > 0 and 0 < crop_fraction <= 1 and crop_mode in get_args(CropMode)):
        raise BadDataError(
            f"{where} is out of range: 3 channels, std above 0, crop_pct in (0, 1] and a crop_mode of "
            f"{', '.join(get_args(CropMode))} are needed",
            f"For example {EXAMPLE}",
        )
    return Preprocess(
        size=(image_size, image_size) if image_size else (height, width),
        interpolation=interpolation,
        mean=cast("tuple[float, float, float]", mean),
        std=cast("tuple[float, float, float]", std),
        crop_fraction=crop_fraction,
        crop_mode=cast("CropMode", crop_mode),
    )
