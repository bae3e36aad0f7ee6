"""What a student matches of a teacher's representation, level by level: for P4's method."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, final

from pydantic import Field

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import CacheMissingError, IdentityError, KdError, UsageError, nearest
from kdcli.geometry import Render
from kdcli.methods.base import Setup
from kdcli.methods.cells import require_same_places, source_sizes
from kdcli.methods.options import MethodOptions, method_option
from kdcli.models.fused_network import FUSED
from kdcli.models.spec import Model, open_model
from kdcli.models.taps import tap_shapes
from kdcli.registry import recorded
from kdcli.types import Difference

Side = Literal["student", "teacher", "none"]
Resize = Literal["pool", "bilinear"]
EMBEDDING = "features"
"""The level that is no map: the pooled features, in the cache's name for them."""
_MAPS = "maps/"
_MAPLESS = f"{FUSED}/L1"
"""Architecture of a joint teacher that fuses embeddings."""


class LevelOptions(MethodOptions):
    """What is matched, and how."""

    mlfd_levels: Literal["all", "maps", "features", "none"] = method_option(
        "all",
        "What of the teacher is matched: all (embedding and maps: the paper), maps (the code), features, none.",
    )
    level_weight: tuple[Annotated[float, Field(ge=0, le=1e4)], ...] = method_option(
        (0.2,), "Weight beta of each level's squared error; one for all, or one a level, the embedding first."
    )
    student_tap: tuple[str, ...] = method_option(
        (), "Layer of the student that is matched; default: its last. Repeatable.", metavar="TAP"
    )
    teacher_tap: tuple[str, ...] = method_option(
        (), "Cached map of the teacher, one a student tap; default: the only one. Repeatable.", metavar="TAP"
    )
    adaptor: Side = method_option(
        "student",
        "Side on which a trained layer makes unequal channels equal: student, teacher or none.",
    )
    map_resize: Resize | None = method_option(
        None, "pool or bilinear: make maps of unequal height and width equal; default: they are refused."
    )


@final
@dataclass(frozen=True, slots=True)
class Level:
    """One level l_c of P4's Eq. 3.

    Attributes:
        array: name of the teacher's array in the cache: ``features`` or ``maps/TAP``.
        weight: beta_c >= 0.
        teacher_shape: of a row of it: [D] or [C, H, W].
        tap: the student's tap; None until the student is open, where its last one is meant, and of the embedding.
        student_shape: [D] or [C, H, W]; empty until the student is open.
    """

    array: str
    weight: float
    teacher_shape: tuple[int, ...]
    tap: str | None = None
    student_shape: tuple[int, ...] = ()

    @property
    def is_map(self) -> bool:
        """Whether it is a feature map, not the embedding."""
        return self.array != EMBEDDING

    @property
    def name(self) -> str:
        """What logs call its term: ``mse/features`` or ``mse/TAP`` of the teacher."""
        return f"mse/{self.array.removeprefix('maps/')}"


@final
@dataclass(frozen=True, slots=True)
class Matching:
    """How the student's loss is put together.

    Attributes:
        levels: what is matched, the embedding first; empty: logits alone.
        adaptor: on which side shapes are made equal.
        resize: how maps of unequal height and width are; None: they are refused.
        columns: of the teacher's logits, in the order of the student's classes; None: they are in that order.
    """

    levels: tuple[Level, ...] = ()
    adaptor: Side = "student"
    resize: Resize | None = None
    columns: tuple[int, ...] | None = None

    @property
    def arrays(self) -> tuple[str, ...]:
        """Arrays of the teacher that are read beside its logits."""
        return tuple(level.array for level in self.levels)

    def document(self) -> dict[str, Any]:
        """What of it makes a run this run, as JSON; the taps of a student that is not open are None."""
        return {"levels": {level.array: {"weight": level.weight, "tap": level.tap} for level in self.levels}}

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's taps, each once."""
        return tuple(dict.fromkeys(level.tap for level in self.levels if level.tap is not None))


def choose_matching(setup: Setup, method: str) -> Matching:
    """Which levels of the teacher are matched, with which weights.

    Args:
        setup: of the run.
        method: what messages call the method.

    Raises:
        UsageError: options that contradict each other.
        IdentityError: the teacher knows other classes than the student learns.
        CacheMissingError: the cache lacks the map or the features, with the command that adds them.
    """
    options: LevelOptions = setup.options
    data, cache = setup.data, setup.cache
    if data is None or cache is None:
        raise ValueError("this method reads a cache")
    record = setup.teachers[next(iter(setup.weights))]
    columns = _columns(record, data, method)
    taps = _teacher_taps(setup, record, cache, method)
    arrays = [EMBEDDING] if options.mlfd_levels in ("all", "features") else []
    arrays += [_MAPS + tap for tap in taps]
    cache.require_kept({record.name: arrays})
    shapes = record.array_specs()
    student_taps: tuple[str | None, ...] = options.student_tap or (None,) * len(taps)
    if len(student_taps) != len(taps) or (len(taps) > 1 and not options.student_tap):
        raise UsageError(
            f"{len(taps)} maps of the teacher ({', '.join(taps) or 'none'}) and "
            f"{len(options.student_tap)} of the student ({', '.join(options.student_tap) or 'none named'})",
            "Give --student-tap and --teacher-tap equally often: the first matches the first."
            if taps
            else "Leave --student-tap out, or match maps: --mlfd-levels all or maps.",
        )
    own = dict(zip((_MAPS + tap for tap in taps), student_taps, strict=True))
    levels = tuple(
        Level(array, weight, shapes[array].row_shape, own.get(array))
        for array, weight in zip(arrays, _weights(options, arrays), strict=True)
    )
    _require_trainable(setup, levels)
    if options.adaptor == "teacher" and levels:
        console.warn(
            "--adaptor teacher trains a layer on the teacher's side: the squared error also falls when that "
            "layer shrinks what the student is to match"
        )
    return Matching(levels, options.adaptor, options.map_resize, columns)


def fit_matching(matching: Matching, model: Model) -> Matching:
    """The same with the student's taps and shapes.

    Args:
        matching: as it was chosen.
        model: the open student.

    Raises:
        UsageError: it has no such tap (the nearest is named), or none at all.
    """
    last = model.network.stages[-1] if model.network.stages else "the last"
    named = [replace(level, tap=level.tap or last) if level.is_map else level for level in matching.levels]
    shapes = tap_shapes(model, list(dict.fromkeys(level.tap for level in named if level.tap is not None)))
    return replace(
        matching,
        levels=tuple(
            replace(level, student_shape=(model.num_features,) if level.tap is None else shapes[level.tap])
            for level in named
        ),
    )


def require_correspondence(setup: Setup, matching: Matching) -> None:
    """See that the cells of matched maps are of the same places of the images.

    Recorded training views are the same for teacher and student. View 0 is each one's own; and beside it
    (``--teacher-view eval``) the student sees what its recipe makes.

    Raises:
        UsageError: they are not.
    """
    maps = [level for level in matching.levels if level.is_map]
    if not maps or 0 not in setup.views or setup.data is None or setup.cache is None:
        return
    name = next(iter(setup.weights))
    student, teacher = Render.of(setup.opened().preprocess), Render.of(setup.teachers[name].preprocess)
    if setup.teacher_view == "eval":
        _require_unmoved(setup, name)
        student = replace(student, mode="squash", crop=1.0)
    sizes = source_sizes(setup.cache, setup.cache.rows_of(setup.data, check_content=False))
    for level in maps:
        grid = level.student_shape if matching.adaptor == "teacher" else level.teacher_shape
        require_same_places({"the student": student, f"'{name}'": teacher}, grid[1:], sizes)


def _require_unmoved(setup: Setup, teacher: str) -> None:
    """Refuse a student's view that is cropped or mirrored where the teacher's is not."""
    recipe = setup.recipe
    if recipe is not None and (recipe.scale is not None or recipe.flip > 0):
        moved = " and ".join(
            word
            for word, applies in (("crops", recipe.scale is not None), ("mirrors", recipe.flip > 0))
            if applies
        )
        raise UsageError(
            f"recipe {recipe.name} {moved} what the student sees, and with --teacher-view eval '{teacher}' saw the "
            "image as it is: the cells of their maps are not of the same places",
            "Use a recipe that does neither, such as autoaugment (P4's), match no map (--mlfd-levels features), or "
            "cache the views and use --teacher-view same.",
        )


def _teacher_taps(setup: Setup, record: TeacherRecord, cache: CacheSet, method: str) -> tuple[str, ...]:
    """The maps of the teacher that are matched, checked against what the cache keeps."""
    options: LevelOptions = setup.options
    if options.mlfd_levels not in ("all", "maps"):
        if options.teacher_tap:
            raise UsageError(
                f"--teacher-tap {options.teacher_tap[0]}, but --mlfd-levels {options.mlfd_levels} matches no map",
                "Leave one of them out.",
            )
        return ()
    kept = [output.output.place for output in record.outputs.values() if output.kind == "maps"]
    unknown = [tap for tap in options.teacher_tap if tap not in kept]
    if not kept and record.architecture == _MAPLESS:
        raise UsageError(
            f"--mlfd-levels {options.mlfd_levels} matches a map, and '{record.name}' is a joint teacher of "
            "embeddings, which has none",
            "Match its embedding, as P4's L1 student does: --mlfd-levels features (the released code: none).",
        )
    if unknown or not kept:
        tap = unknown[0] if unknown else _last_tap(record)
        word = f"maps:{tap}" + ("@eval" if setup.teacher_view == "eval" and cache.view_count > 1 else "")
        wanted = f"the map '{tap}'" if unknown else "a map"
        known = f"{'maps' if len(kept) > 1 else 'map'} {', '.join(kept)}" if kept else ", ".join(record.keep)
        raise CacheMissingError(
            f"{method} matches {wanted} of '{record.name}', and the cache keeps its {known} only.{nearest(tap, kept)} "
            "(--mlfd-levels features and none match no map)",
            cache.adding([record.name], [word]),
        )
    if options.teacher_tap:
        return tuple(dict.fromkeys(options.teacher_tap))
    if len(kept) > 1:
        raise UsageError(
            f"the cache keeps {len(kept)} maps of '{record.name}': {', '.join(kept)}",
            "Name those to match, and the student's layers in the same order: --teacher-tap TAP --student-tap TAP.",
        )
    return tuple(kept)


def _last_tap(record: TeacherRecord) -> str:
    """The layer that a hint names; TAP where the teacher cannot be looked at (it need not be at hand to learn)."""
    try:
        taps = open_model(recorded(record.spec), weights="random").network.taps
    except KdError:
        return "TAP"
    return taps[-1] if taps else "TAP"


def _columns(record: TeacherRecord, data: ImageData, method: str) -> tuple[int, ...] | None:
    """The teacher's logit of each of the student's classes; None where they are in the same order."""
    names = data.class_names
    count = len(names) if names is not None else int(data.labels.max()) + 1
    known = record.class_names
    hint = (
        f"{method} compares one classifier with one: distil from a teacher of these classes (kd fuse-teachers makes "
        "one a data set), or use a method that gives a teacher of other classes a head of its own; see kd methods."
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


def _weights(options: LevelOptions, arrays: Sequence[str]) -> tuple[float, ...]:
    given = options.level_weight or (0.0,)
    weights = given * len(arrays) if len(given) == 1 else given
    if len(weights) != len(arrays):
        raise UsageError(
            f"--level-weight is given {len(given)} times, and the levels are {', '.join(arrays) or 'none'}",
            "Give it once for all, or once for each, in this order.",
        )
    return weights


def _require_trainable(setup: Setup, levels: Sequence[Level]) -> None:
    """Refuse to match what does not train."""
    if levels and setup.origin.freeze is not None:
        raise UsageError(
            f"--freeze {setup.origin.freeze}, but matching {levels[0].array} would have to change the backbone",
            "Leave --freeze out, or match nothing: --mlfd-levels none.",
        )
    if setup.origin.train_from is not None and any(level.is_map for level in levels):
        raise UsageError(
            f"--train-from {setup.origin.train_from}: a student that is cut gives no maps to match",
            "Leave --train-from out, or use --mlfd-levels features or none.",
        )
