"""What a run matches of its teacher's representation (``--method mlfd``), decided before the student is opened."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import CacheMissingError, IdentityError, KdError, UsageError, nearest
from kdcli.methods.base import Method
from kdcli.methods.levels import EMBEDDING, Level, Matching
from kdcli.methods.mlfd import CONVENTIONS
from kdcli.models.fused_network import FUSED
from kdcli.models.spec import Model, open_model
from kdcli.models.taps import tap_shapes
from kdcli.training.config import StudentConfig
from kdcli.training.sets import require_classes
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.training.teachers import Teachers

_MAPS = "maps/"
_MAPLESS = f"{FUSED}/L1"
"""Architecture of a joint teacher that fuses embeddings."""


def with_convention(config: StudentConfig, method: Method) -> StudentConfig:
    """The configuration with the weights of its convention where none were given."""
    if "loss_convention" not in method.options:
        return config
    name = config.loss_convention or "paper"
    convention = CONVENTIONS[name]
    by_convention = {
        "label_weight": convention.label_weight,
        "distill_weight": convention.distill_weight,
        "level_weight": (convention.level_weight,),
        "mlfd_levels": convention.levels,
        "adaptor": "student",
    }
    missing = {key: value for key, value in by_convention.items() if getattr(config, key) is None}
    return config.model_copy(update={"loss_convention": name, **missing})


def choose_matching(
    config: StudentConfig,
    method: Method,
    teachers: "Teachers | None",
    cache: CacheSet | None,
    data: ImageData,
) -> Matching | None:
    """Which levels of the teacher are matched, with which weights; None for other methods.

    Args:
        config: with its convention filled in.
        method: that is to be trained.
        teachers: the one that is learnt from.
        cache: where it is.
        data: what the student trains on.

    Raises:
        BadDataError: the data have no labels.
        UsageError: options that contradict each other.
        IdentityError: the teacher knows other classes than the student learns.
        CacheMissingError: the cache lacks the map or the features, with the command that adds them.
    """
    if "loss_convention" not in method.options or teachers is None or cache is None:
        return None
    require_classes(data, config.first_data)
    record = teachers.records[next(iter(teachers.weights))]
    columns = _columns(record, data)
    taps = _teacher_taps(config, record, cache)
    arrays = [EMBEDDING] if config.mlfd_levels in ("all", "features") else []
    arrays += [_MAPS + tap for tap in taps]
    cache.require_kept({record.name: arrays})
    shapes = record.array_specs()
    student_taps: tuple[str | None, ...] = config.student_tap or (None,) * len(taps)
    if len(student_taps) != len(taps) or (len(taps) > 1 and not config.student_tap):
        raise UsageError(
            f"{len(taps)} maps of the teacher ({', '.join(taps) or 'none'}) and "
            f"{len(config.student_tap)} of the student ({', '.join(config.student_tap) or 'none named'})",
            "Give --student-tap and --teacher-tap equally often: the first matches the first."
            if taps
            else "Leave --student-tap out, or match maps: --mlfd-levels all or maps.",
        )
    own = dict(zip((_MAPS + tap for tap in taps), student_taps, strict=True))
    weights = _weights(config, arrays)
    levels = tuple(
        Level(array, weight, shapes[array].row_shape, own.get(array))
        for array, weight in zip(arrays, weights, strict=True)
    )
    _require_trainable(config, levels)
    if config.adaptor == "teacher" and levels:
        console.warn(
            "--adaptor teacher trains a layer on the teacher's side: the squared error also falls when that "
            "layer shrinks what the student is to match"
        )
    return Matching(
        config.loss_convention or "paper",
        config.distill_weight or 0.0,
        levels,
        config.adaptor or "student",
        config.map_resize,
        columns,
    )


def fit_matching(matching: Matching, model: Model) -> Matching:
    """The same with the student's taps and shapes.

    Args:
        matching: as it was chosen.
        model: the open student.

    Raises:
        UsageError: it has no such tap (the nearest is named), or none at all.
    """
    last = model.network.taps[-1] if model.network.taps else "the last"
    named = [replace(level, tap=level.tap or last) if level.is_map else level for level in matching.levels]
    shapes = tap_shapes(model, list(dict.fromkeys(level.tap for level in named if level.tap is not None)))
    return replace(
        matching,
        levels=tuple(
            replace(level, student_shape=(model.num_features,) if level.tap is None else shapes[level.tap])
            for level in named
        ),
    )


def _teacher_taps(config: StudentConfig, record: TeacherRecord, cache: CacheSet) -> tuple[str, ...]:
    """The maps of the teacher that are matched, checked against what the cache keeps."""
    if config.mlfd_levels not in ("all", "maps"):
        if config.teacher_tap:
            raise UsageError(
                f"--teacher-tap {config.teacher_tap[0]}, but --mlfd-levels {config.mlfd_levels} matches no map",
                "Leave one of them out.",
            )
        return ()
    kept = [output.tap for output in record.outputs.values() if output.kind == "maps"]
    unknown = [tap for tap in config.teacher_tap if tap not in kept]
    if not kept and record.architecture == _MAPLESS:
        raise UsageError(
            f"--mlfd-levels {config.mlfd_levels} matches a map, and '{record.name}' is a joint teacher of "
            "embeddings, which has none",
            "Match its embedding, as P4's L1 student does: --mlfd-levels features (the released code: none).",
        )
    if unknown or not kept:
        tap = unknown[0] if unknown else _last_tap(record)
        word = f"maps:{tap}" + ("@eval" if config.teacher_view == "eval" and cache.view_count > 1 else "")
        wanted = f"the map '{tap}'" if unknown else "a map"
        known = f"{'maps' if len(kept) > 1 else 'map'} {', '.join(kept)}" if kept else ", ".join(record.keep)
        raise CacheMissingError(
            f"mlfd matches {wanted} of '{record.name}', and the cache keeps its {known} only.{nearest(tap, kept)} "
            "(--mlfd-levels features and none match no map)",
            cache.adding([record.name], [word]),
        )
    if config.teacher_tap:
        return tuple(dict.fromkeys(config.teacher_tap))
    if len(kept) > 1:
        raise UsageError(
            f"the cache keeps {len(kept)} maps of '{record.name}': {', '.join(kept)}",
            "Name those to match, and the student's layers in the same order: --teacher-tap TAP --student-tap TAP.",
        )
    return tuple(kept)


def _last_tap(record: TeacherRecord) -> str:
    """The layer that a hint names; TAP where the teacher cannot be looked at (it need not be at hand to learn)."""
    try:
        taps = open_model(record.spec, weights="random").network.taps
    except KdError:
        return "TAP"
    return taps[-1] if taps else "TAP"


def _columns(record: TeacherRecord, data: ImageData) -> tuple[int, ...] | None:
    """The teacher's logit of each of the student's classes; None where they are in the same order."""
    names = data.class_names
    count = len(names) if names is not None else int(data.labels.max()) + 1
    known = record.class_names
    hint = (
        "mlfd compares one classifier with one: distil from a teacher of these classes (kd fuse-teachers makes "
        "one a data set), or use --method distill-equal, which gives a teacher of other classes a head of its own."
    )
    if known is None or names is None:
        if record.num_classes != count:
            raise IdentityError(
                f"'{record.name}' knows other classes than the student learns",
                hint,
                [Difference("number of classes", record.num_classes, count)],
            )
        console.note(f"'{record.name}' or the data name no classes; they are taken to be in the same order")
        return None
    if set(known) != set(names):
        only = [name for name in known if name not in set(names)]
        lacking = [name for name in names if name not in set(known)]
        raise IdentityError(
            f"'{record.name}' knows other classes than the student learns",
            hint,
            [Difference("classes", f"{len(known)}{_such_as(only)}", f"{len(names)}{_such_as(lacking)}")],
        )
    place = {name: number for number, name in enumerate(known)}
    columns = tuple(place[name] for name in names)
    return None if columns == tuple(range(len(columns))) else columns


def _such_as(names: Sequence[str]) -> str:
    return f" (among them '{names[0]}')" if names else ""


def _weights(config: StudentConfig, arrays: Sequence[str]) -> tuple[float, ...]:
    given = config.level_weight or (0.0,)
    weights = given * len(arrays) if len(given) == 1 else given
    if len(weights) != len(arrays):
        raise UsageError(
            f"--level-weight is given {len(given)} times, and the levels are {', '.join(arrays) or 'none'}",
            "Give it once for all, or once for each, in this order.",
        )
    return weights


def _require_trainable(config: StudentConfig, levels: Sequence[Level]) -> None:
    """Refuse to match what does not train."""
    if levels and config.freeze is not None:
        raise UsageError(
            f"--freeze {config.freeze}, but matching {levels[0].array} would have to change the backbone",
            "Leave --freeze out, or match nothing: --mlfd-levels none.",
        )
    if config.train_from is not None and any(level.is_map for level in levels):
        raise UsageError(
            f"--train-from {config.train_from}: a student that is cut gives no maps to match",
            "Leave --train-from out, or use --mlfd-levels features or none.",
        )
