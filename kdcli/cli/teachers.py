"""``kd cache-teachers``, and ``kd cache plan``, which takes the same options."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, counted, size
from kdcli.files import bytes_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdcli.extract.config import CacheConfig, PlanConfig
    from kdcli.options.common import Common


def cache_teachers(config: "CacheConfig", common: "Common") -> None:
    """Run teachers once over a data set and cache their outputs.

    \b
    Examples:
      kd cache-teachers photos/ --cache photos.kd --teacher resnet50.a1_in1k
      kd cache-teachers photos/@split=train --cache train.kd --teacher gen=local-dir:weights --views eval+train:8
      kd cache-teachers photos/ --cache s3://team/photos --teacher resnet50.a1_in1k
    """
    from kdcli.extract.extract import cache_teachers as step

    result = step(config)
    show(result, common)
    if common.as_json:
        return
    images = counted(result.rows, "images") + (f" x {result.views} views" if result.views > 1 else "")
    if result.dry_run:
        console.note(f"{config.cache} would hold {size(result.bytes)} of {images}; nothing was written")
        return
    teachers = counted(len(result.teachers), "teachers")
    if isinstance(config.cache, str):
        made = f"{config.cache}: {size(result.bytes)} of outputs, {images}, {teachers}"
        name = Path(config.cache).with_suffix(".kd").name
        console.finished(made, f"kd cache pull {quote(config.cache)} --to {quote(name)}")
        return
    made = f"{config.cache}: {size(bytes_in(config.cache))}, {images}, {teachers}"
    data, cache = quote(config.data or "DATA"), quote(str(config.cache))
    method = _method([output.kind for output in config.outputs], len(result.teachers))
    student = f"kd train-student {data} --cache {cache} --method {method} --student ARCH --out runs/first"
    rank = [f"kd rank-sources --cache {cache}"] if len(result.teachers) > 1 else []
    console.finished(made, *rank, student)


def _method(kinds: "Sequence[str]", teachers: int) -> str:
    """A method that learns from what was kept."""
    if "logits" in kinds:
        return "distill-equal"
    if "topk" in kinds:
        return "topk-kl"
    return "agglomerate" if teachers > 1 else "feature"


def plan(config: "PlanConfig", common: "Common") -> None:
    """Say what kd cache-teachers would write, and how long.

    Bytes per array, what is left to do, and the free space; takes the same options.

    With --measure it also runs 20 batches of decoding and of each teacher and writes a temporary file, and
    says how long the run takes and what it is bound by. Changes nothing.

    \b
    Examples:
      kd cache plan photos/ --cache photos.kd --teacher resnet50.a1_in1k --keep logits,maps:layer4
      kd cache plan photos/ --cache photos.kd --teacher resnet50.a1_in1k --views eval+train:8 --measure
    """
    from kdcli.extract.costs import plan_cache

    found = plan_cache(config.step, measured=config.measure)
    if found.fits or not common.as_json:  # the error's document holds the plan's: there is one
        show(found, common)
    found.require_space(config.cache)
