"""``kd cache-teachers``, and ``kd cache plan``, which takes the same options."""

from shlex import quote
from typing import TYPE_CHECKING

from kdcli.console import console, counted, duration, size
from kdcli.files import bytes_in

if TYPE_CHECKING:
    from kdcli.extract.config import CacheConfig, PlanConfig
    from kdcli.extract.costs import CachePlan
    from kdcli.extract.result import TeacherProgress
    from kdcli.options.common import Common


def cache_teachers(config: "CacheConfig", common: "Common") -> None:
    """Run teachers once over a data set and cache their outputs.

    \b
    Examples:
      kd cache-teachers photos/ --cache photos.kd --teacher resnet50.a1_in1k
      kd cache-teachers photos/@split=train --cache train.kd --teacher gen=local-dir:weights --views eval+train:8
    """
    from kdcli.cache.admin.progress import percent
    from kdcli.extract.extract import cache_teachers as step

    result = step(config)
    if common.as_json:
        console.document(result.document())
        return
    rows = [
        [name, percent(part.done, part.total), percent(part.written, part.total), _kept(part)]
        for name, part in result.teachers.items()
    ]
    console.table(["teacher", "complete", "in this run", "kept of every view of an image"], rows)
    images = counted(result.rows, "images") + (f" x {result.views} views" if result.views > 1 else "")
    if result.dry_run:
        console.note(f"{config.cache} would hold {size(result.bytes)} of {images}; nothing was written")
        return
    made = f"{config.cache}: {size(bytes_in(config.cache))}, {images}, {counted(len(rows), 'teachers')}"
    data, cache = quote(config.data or "DATA"), quote(str(config.cache))
    student = (
        f"kd train-student {data} --cache {cache} --method distill-equal --student ARCH --out runs/first"
    )
    rank = [f"kd rank-sources --cache {cache}"] if len(rows) > 1 else []
    console.finished(made, *rank, student)


def _kept(part: "TeacherProgress") -> str:
    """Shapes without the axes of images and views, and without the statistics that are kept with logits."""
    kept = [
        f"{name} {'x'.join(map(str, spec['shape'][2:]))} {spec['dtype']}"
        for name, spec in part.arrays.items()
        if len(spec["shape"]) > 2 and name != "lse"
    ]
    return ", ".join(kept) or "-"


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
    if common.as_json:
        console.document(found.document())
    else:
        _print_plan(found)
    found.require_space(config.cache)


def _print_plan(found: "CachePlan") -> None:
    rows = [
        [teacher, array, size(count)]
        for teacher, arrays in found.arrays.items()
        for array, count in arrays.items()
    ]
    console.table(["part", "array", "size"], rows)
    console.say()
    facts: list[list[object]] = [
        ["images x views", f"{found.rows} x {found.views}"],
        ["tasks to do", found.tasks],
        ["size when complete", size(found.bytes)],
        ["still to be written", size(found.bytes_missing)],
        ["free there", size(found.bytes_free)],
    ]
    if (speed := found.measured) is not None:
        forward: list[list[object]] = [
            [f"forward {name}", f"{rate:.1f} views/s"] for name, rate in speed.forward.items()
        ]
        facts += [
            ["decode", f"{speed.decode:.1f} views/s"],
            *forward,
            ["write", f"{speed.write_mb:.0f} MB/s = {speed.write:.1f} views/s"],
            ["bound by", speed.bound],
            ["time", duration(speed.hours * 3600)],
        ]
    console.table(["plan", ""], facts)
