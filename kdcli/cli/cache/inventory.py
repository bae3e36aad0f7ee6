"""``kd cache``: ls, info, diff."""

import shutil
import sys
import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from kdcli.cells import yes
from kdcli.console import PLAIN_SECONDS, console, counted, duration, shown, size
from kdcli.errors import IdentityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdcli.cache.admin.config import DiffConfig, InfoConfig, LsConfig
    from kdcli.cache.admin.diff import CacheDiff, PartDiff, TeacherDiff
    from kdcli.cache.admin.inventory import CacheInfo, CacheSummary, Unreadable
    from kdcli.cache.admin.progress import Progress
    from kdcli.cache.provenance import TeacherRecord
    from kdcli.options.common import Common

SCREEN_SECONDS = 2.0
"""How often --watch looks when a person does, too."""
_DROPPED = 10

# --- ls --------------------------------------------------------------------------------------------


def ls(config: "LsConfig", common: "Common") -> int | None:
    """List the caches in and below folders.

    Age is the time since something was last written. A cache that cannot be read is listed with the reason; if
    you named caches and none of them can be read, that is the exit code. Hidden folders are not searched.

    \b
    Examples:
      kd cache ls
      kd cache ls /data/caches train.kd --json
    """
    from kdcli.cache.admin.inventory import CacheSummary
    from kdcli.verbs.caches import caches_of

    folders = config.paths or (Path(),)
    found = caches_of(config)
    bad = [entry for entry in found if not isinstance(entry, CacheSummary)]
    hopeless = len(bad) == len(found) and {entry.path for entry in bad} >= set(folders)
    code = bad[0].error.exit_code if bad and hopeless else None
    if common.as_json:
        console.document({"caches": [entry.document() for entry in found]})
        return code
    if not found:
        console.note(f"no caches in {', '.join(map(str, folders))}")
    header = ["path", "id", "data", "samples", "views", "teachers", "complete", "size", "age"]
    console.table([*header, *(["problem"] if bad else [])], [_entry(each, bool(bad)) for each in found])
    good = next((entry for entry in found if isinstance(entry, CacheSummary)), None)
    if good is not None:
        console.finished(counted(len(found), "caches"), f"kd cache info {quote(str(good.path))}")
    return code


def _entry(entry: "CacheSummary | Unreadable", problems: bool) -> list[Any]:
    from kdcli.cache.admin.inventory import Unreadable
    from kdcli.cache.admin.progress import percent

    if isinstance(entry, Unreadable):
        return [entry.path, *["-"] * 8, entry.error.message]
    manifest, names = entry.manifest, entry.teachers
    more = f",+{len(names) - 3}" if len(names) > 3 else ""
    cells = [
        entry.path,
        manifest.cache_id[:12],
        "+".join(segment.spec for segment in manifest.segments),
        manifest.samples,
        manifest.views,
        ",".join(names[:3]) + more or "-",
        percent(entry.done, entry.total),
        size(entry.bytes),
        duration(max(0.0, time.time() - entry.written)),
    ]
    return [*cells, *([""] if problems else [])]


# --- info ------------------------------------------------------------------------------------------


def info(config: "InfoConfig", common: "Common") -> None:
    """Show what a cache holds, or how far its writers are.

    --watch reads records and claims only: it disturbs nobody, and works on a cache that is read-only for you.
    On a terminal it redraws; else it prints a line each time. It ends when nothing is missing.

    \b
    Examples:
      kd cache info train.kd
      kd cache info train.kd --watch --every 60
    """
    from kdcli.verbs.caches import info_of

    if config.watch:
        if isinstance(config.cache, str):
            raise UsageError("--watch follows the writers of a folder", "Call it again: kd cache info URL")
        _watch(config.cache, config.every, common.as_json)
        if not common.as_json:
            return
    elif config.every is not None:
        raise UsageError("--every is the pause of --watch", "Give --watch, too.")
    found = info_of(config)
    if common.as_json:
        console.document(found.document())
        return
    console.table(["field", "is"], _facts(found))
    if found.teachers:
        console.say()
        console.table(
            ["teacher", "id", "architecture", "classes", "features", "dtype", "forward", "view 0", "spec"],
            _teachers(found),
        )
        console.say()
    console.table(_KINDS, _kinds(found))
    console.legend(
        units="blocks of images that are done",
        absent="images that could not be read",
        KL="divergence, in nats, between the softmax as stored in fewer digits and the teacher's own",
        kept_of_an_image="views x values, and how they are stored",
    )
    if found.writers:
        console.say()
        rows = [
            [w.host, w.pid, w.job or "-", yes(w.alive), duration(w.silent), n]
            for w, n in found.writers.items()
        ]
        console.table(["claims of", "pid", "job", "alive", "silent for", "units"], rows)
    if found.dropped:
        console.say()
        listed = [[each.row, each.key, each.reason] for each in found.dropped[:_DROPPED]]
        console.table(["row", "dropped image", "reason"], listed)
    if len(found.dropped) > _DROPPED:
        console.note(f"{len(found.dropped) - _DROPPED} more images were dropped; --json lists them all")


def _facts(found: "CacheInfo") -> "Sequence[Sequence[Any]]":
    from kdcli.cache.admin.progress import percent

    manifest = found.manifest
    names, views = manifest.data.class_names, manifest.view_set
    recipe = views.get("recipe") or {}
    versions = manifest.created.get("versions", {})
    return [
        ["path", found.path],
        ["cache id", manifest.cache_id],
        ["complete", f"{percent(found.done, found.total)} ({found.done} of {found.total} units)"],
        ["size", size(found.bytes)],
        *(["data", f"{part.spec}, {part.rows} samples, from {part.location}"] for part in manifest.segments),
        ["samples", manifest.samples],
        ["classes", "no labels" if names is None else len(names)],
        ["views", f"{manifest.views} in groups of {', '.join(map(str, manifest.view_groups))}"],
        ["recipe", recipe.get("name", "-") if manifest.views > 1 else "- (view 0 only)"],
        ["decoded", views.get("decode", "exact")],
        ["backend", f"{manifest.backend}, format {manifest.format}"],
        ["blocks", f"{manifest.blocks} of {manifest.block_rows} rows"],
        ["made with", ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"],
    ]  # fmt: skip


def _teachers(found: "CacheInfo") -> list[list[Any]]:
    from kdcli.geometry import Render

    return [
        [
            name,
            record.id[:12],
            record.architecture,
            record.num_classes,
            _pooled(found, record),
            record.dtype,
            _ran(record),
            Render.of(record.preprocess),
            record.spec,
        ]
        for name, record in found.teachers.items()
    ]


def _pooled(found: "CacheInfo", record: "TeacherRecord") -> str:
    """Its features: how many, how they come of its last map, and whether its classifier of them is kept."""
    by = f" by {record.pooling}" if record.pooling else ""
    return f"{record.num_features}{by}{', classifier' if record.name in found.classifiers else ''}"


def _ran(record: "TeacherRecord") -> str:
    """What decides the bits of its outputs: images at once, views of each, precision."""
    compute = record.compute
    views = f" x {compute['views_per_forward']} views" if "views_per_forward" in compute else ""
    return f"{compute['batch_size']}{views}, {record.amp}{', compiled' if compute.get('compile') else ''}"


_DTYPES = {"f2": "float16", "f4": "float32", "i2": "int16", "i4": "int32", "u2": "uint16", "u1": "uint8"}
_KINDS = ["teacher", "kind", "units", "size", "seconds", "absent", "KL", "kept of an image"]


def _kinds(found: "CacheInfo") -> list[list[Any]]:
    rows = []
    for part, state in found.states.items():
        teacher, _, kind = part.partition("/")
        arrays = found.shapes(part) if kind else {}
        texts = (
            f"{name} {'x'.join(map(str, shape[1:]))} {_DTYPES.get(dtype, dtype)}"
            for name, (shape, dtype) in arrays.items()
        )
        losses = (f"{value:.2g} (T={t})" for t, value in state.compression.items())
        cells = [
            teacher,
            kind or "-",
            f"{state.done}/{state.total}",
            size(state.bytes),
            f"{state.seconds:.1f}",
        ]
        rows.append([*cells, len(state.absent), ", ".join(losses) or "-", ", ".join(texts) or "-"])
    return rows


def _watch(cache: Path, every: float | None, json: bool) -> None:
    """Follow the writers: redrawn on a terminal, one line a look elsewhere (with --json on stderr)."""
    from kdcli.cache.admin.progress import watch

    drawn = sys.stdout.isatty() and not json
    lines = 0
    for progress in watch(cache, every or (SCREEN_SECONDS if drawn else PLAIN_SECONDS)):
        if drawn:
            lines = _redraw(_frame(progress), lines)
        elif json:
            console.note(progress.line())
        else:
            console.say(progress.line())


def _frame(progress: "Progress") -> list[str]:
    from kdcli.cache.admin.progress import percent

    width = max(map(len, progress.parts))
    parts = [
        f"{part:<{width}}  {percent(done, total):>6}  {done}/{total}"
        for part, (done, total) in progress.parts.items()
    ]
    return [*parts, progress.line()]


def _redraw(lines: list[str], before: int) -> int:
    """Print over the ``before`` lines of the last time; a line that would wrap is cut."""
    columns = shutil.get_terminal_size().columns
    back = f"\x1b[{before}F\x1b[J" if before else ""
    print(back + "\n".join(shown(line)[: columns - 1] for line in lines), flush=True)
    return len(lines)


# --- diff ------------------------------------------------------------------------------------------


def diff(config: "DiffConfig", common: "Common") -> int:
    """Say what differs between two caches.

    Exits with 0 when both hold the same values, with 21 when they differ. How they are stored (backend, block rows,
    ids, where the images were) is told but is no difference. Values are read only where recorded checksums
    do not settle it.

    \b
    Examples:
      kd cache diff train.kd copy.kd
      kd cache diff a.kd b.kd --json
    """
    from kdcli.cache.admin.diff import compare_caches

    found = compare_caches(config.a, config.b)
    if common.as_json:
        console.document(found.document())
    else:
        console.table(["what", "A", "B"], _differences(found))
        console.note(f"{config.a} and {config.b} {'hold the same values' if found.equal else 'differ'}")
    return 0 if found.equal else IdentityError.exit_code


def _differences(found: "CacheDiff") -> list[list[Any]]:
    samples = found.samples
    rows: list[list[Any]] = [[f"stored: {each.field}", each.old, each.new] for each in found.storage]
    if samples.only_a.count or samples.only_b.count:
        rows.append(["samples only in", samples.only_a, samples.only_b])
    for name, some in (("labels", samples.labels), ("images", samples.images)):
        if some.count:
            rows.append([f"{name} differ", some, some])
    if samples.class_names_differ:
        rows.append(["class names", "differ", "differ"])
    rows += [[f"views: {each.field}", each.old, each.new] for each in found.views]
    if found.only_a or found.only_b:
        rows.append(["teachers only in", ", ".join(found.only_a) or "-", ", ".join(found.only_b) or "-"])
    for teacher in found.teachers:
        rows += _teacher_differences(teacher)
    return rows


def _teacher_differences(teacher: "TeacherDiff") -> list[list[Any]]:
    rows: list[list[Any]] = [
        [f"{teacher.name}: {each.field}", each.old, each.new] for each in (*teacher.identity, *teacher.kept)
    ]
    if teacher.kinds_a or teacher.kinds_b:
        kinds = (", ".join(teacher.kinds_a) or "-", ", ".join(teacher.kinds_b) or "-")
        rows.append([f"{teacher.name}: kinds only in", *kinds])
    return rows + [row for part in teacher.parts for row in _part_differences(part)]


def _part_differences(part: "PartDiff") -> list[list[Any]]:
    rows: list[list[Any]] = []
    if part.only_a or part.only_b:
        rows.append([f"{part.part}: samples only in", part.only_a, part.only_b])
    for array, count in part.differing.items():
        if count:
            largest = part.largest[array]
            by = "" if largest is None else f", by up to {largest:.3g}"
            text = f"{count} of {part.compared} samples differ{by}"
            rows.append([f"{part.part}: {array}", text, "-"])
    return rows
