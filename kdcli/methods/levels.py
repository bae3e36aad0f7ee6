"""What a student matches of a teacher's representation, level by level: its embedding, and its feature maps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final, Literal, final, get_args

from pydantic import Field

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import CacheMissingError, KdError, UsageError, closest, nearest
from kdcli.geometry import Render
from kdcli.methods.base import Setup
from kdcli.methods.cells import require_same_places, source_sizes
from kdcli.methods.declarations import Kind
from kdcli.methods.options import MethodOptions, method_option
from kdcli.models.adaptors import Grid
from kdcli.models.fused_network import FUSED
from kdcli.models.grammar import recorded_model
from kdcli.models.spec import Model, open_model
from kdcli.models.taps import tap_shapes

Levels = Literal["all", "maps", "features", "none"]
Default = Literal["last", "middle", "pooled"]
LevelWeights = tuple[Annotated[float, Field(ge=0, le=1e4)], ...]
EMBEDDING = "features"
"""The level that is no map: the pooled features, in the cache's name for them."""
_MAPS = "maps/"
KINDS: Final[dict[Levels, frozenset[Kind]]] = {
    "all": frozenset({"features", "maps"}), "features": frozenset({"features"}), "maps": frozenset({"maps"}),
    "none": frozenset(),
}  # fmt: skip
"""What is read of a teacher."""
_MAPLESS = f"{FUSED}/L1"
"""Architecture of a joint teacher that fuses embeddings."""


class TapOptions(MethodOptions):
    """Which maps are compared."""

    one_map: ClassVar[bool] = False
    """Whether a teacher gives one map at most; of ``all`` then what the cache keeps of it is enough."""
    student_tap: tuple[str, ...] = method_option(
        (), "Layer of the student that is matched; default: its last. Repeatable.", metavar="TAP"
    )
    teacher_tap: tuple[str, ...] = method_option(
        (),
        "Cached map of the teachers, or of one, one a student tap; default: the only one. Repeatable.",
        metavar="[NAME=]TAP",
    )


def level_weight_option(*default: float) -> Any:
    """Weights of levels, with the method's own default."""
    return method_option(
        default,
        "Weight beta of each level's term; one for all, or one a level, the embedding first.",
        silent=0,
    )


class LevelOptions(TapOptions):
    """What is compared: the embedding, maps, or both."""

    levels: Levels = method_option(
        "all", "What of the teacher is matched: all (embedding and maps), maps, features, none."
    )
    level_weight: LevelWeights = level_weight_option(0.2)

    @property
    def matched(self) -> Levels:
        """``levels``, or ``none`` where no level has a weight."""
        return self.levels if any(self.level_weight) else "none"


@final
@dataclass(frozen=True, slots=True)
class Level:
    """One level l_c of P4's Eq. 3.

    Attributes:
        array: name of the teacher's array in the cache: ``features`` or ``maps/TAP``.
        weight: beta_c >= 0.
        teacher_shape: of a row of it: [D] or [C, H, W], of clips [C, T, H, W].
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
    def place(self) -> str:
        """``features``, or the tap of the teacher, as logs have it."""
        return self.array.removeprefix(_MAPS)

    @property
    def grid(self) -> Grid | None:
        """Height and width of the smaller map, of clips the frames before them, axis by axis: what the larger one is
        averaged to; None of no map."""
        if not self.is_map:
            return None
        (_, *own), (_, *theirs) = self.student_shape, self.teacher_shape
        *time, height, width = (min(sides) for sides in zip(own, theirs, strict=True))
        return (time[0], height, width) if time else (height, width)

    def document(self) -> dict[str, Any]:
        """What of it makes a run this run; the tap of a student that is not open is None."""
        return {"weight": self.weight, "tap": self.tap}

    def __str__(self) -> str:
        own, theirs = (" x ".join(map(str, shape)) for shape in (self.student_shape, self.teacher_shape))
        return f"level {self.array} {theirs}, of the student {self.tap or EMBEDDING} {own}"


def choose_levels(
    setup: Setup, method: str, teacher: str, levels: Levels, weights: Sequence[float] = (1.0,)
) -> tuple[Level, ...]:
    """Which levels of a teacher are matched, with which weights.

    Args:
        setup: of the run.
        method: what messages call the method.
        teacher: its name.
        levels: as asked for.
        weights: one for all levels, or one a level.

    Raises:
        UsageError: options that contradict each other.
        CacheMissingError: the cache lacks the map or the features, with the command that adds them.
    """
    cache, record = setup.cache, setup.teachers[teacher]
    if cache is None:
        raise ValueError("this method reads a cache")
    pairs = (
        _pairs(setup, method, record, cache, levels)
        if "maps" in KINDS[levels]
        else _no_pairs(setup.options, levels)
    )
    shapes = record.array_specs()
    spared = bool(pairs) and EMBEDDING not in shapes and _as_kept(setup.options, levels)
    arrays = [EMBEDDING] if "features" in KINDS[levels] and not spared else []
    arrays += [_MAPS + tap for tap in pairs]
    cache.require_kept({teacher: arrays})
    found = tuple(
        Level(array, weight, shapes[array].row_shape, pairs.get(array.removeprefix(_MAPS)))
        for array, weight in zip(arrays, _weights(weights, arrays), strict=True)
    )
    _require_trainable(setup, found)
    return found


def fit_levels(levels: Sequence[Level], model: Model, default: Default = "last") -> tuple[Level, ...]:
    """The same with the student's taps and shapes.

    Args:
        levels: as they were chosen.
        model: the open student.
        default: which of its taps is meant where none is named: a stage, or what its features are pooled from.

    Raises:
        UsageError: it has no such tap (the nearest is named), or none at all.
    """
    known = model.network.taps if default == "pooled" else _maps_of(model)
    own = known[len(known) // 2 if default == "middle" else -1] if known else "the last"
    named = [replace(level, tap=level.tap or own) if level.is_map else level for level in levels]
    shapes = tap_shapes(model, taps_of(named))
    return tuple(
        replace(level, student_shape=(model.num_features,) if level.tap is None else shapes[level.tap])
        for level in named
    )


def _maps_of(model: Model) -> tuple[str, ...]:
    """Its stages as far as what its features are pooled from: torchvision's are all modules, the classifier last."""
    stages, last = model.network.stages, model.network.last_tap
    return stages[: stages.index(last) + 1] if last in stages else stages


def taps_of(levels: Iterable[Level]) -> tuple[str, ...]:
    """The student's taps, each once."""
    return tuple(dict.fromkeys(level.tap for level in levels if level.tap is not None))


def require_correspondence(setup: Setup, teacher: str, grids: Sequence[Sequence[int]]) -> None:
    """See that the cells of matched maps are of the same places of the images.

    Recorded training views are the same for teacher and student. View 0 is each one's own; and beside it
    (``--teacher-view eval``) the student sees what its recipe makes.

    Args:
        setup: of the run; the student is open.
        teacher: whose maps these are.
        grids: height and width at which maps are compared.

    Raises:
        UsageError: they are not.
    """
    if not grids or 0 not in setup.views or setup.data is None or setup.cache is None:
        return
    student, theirs = Render.of(setup.opened().preprocess), Render.of(setup.teachers[teacher].preprocess)
    if setup.teacher_view == "eval":
        _require_unmoved(setup, teacher)
        student = replace(student, mode="squash", crop=1.0)
    sizes = source_sizes(setup.cache, setup.cache.rows_of(setup.data, check_content=False))
    for grid in grids:
        require_same_places({"the student": student, f"'{teacher}'": theirs}, grid[-2:], sizes)


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
            f"Use a recipe that does neither, such as autoaugment (P4's){_no_map(setup.options)}, or "
            "cache the views and use --teacher-view same.",
        )


def _no_map(options: TapOptions) -> str:
    return ", match no map (--levels features)" if "features" in _choices(options) else ""


def _choices(options: TapOptions) -> tuple[str, ...]:
    """The values of its ``--levels``; none where it has no such option."""
    field = type(options).model_fields.get("levels")
    return get_args(field.annotation) if field is not None else ()


def _as_kept(options: TapOptions, levels: Levels) -> bool:
    return options.one_map and levels == "all"


def _no_pairs(options: TapOptions, levels: Levels) -> dict[str, str | None]:
    for flag, taps in (("--teacher-tap", options.teacher_tap), ("--student-tap", options.student_tap)):
        if taps:
            raise UsageError(
                f"{flag} {taps[0]}, but --levels {levels} matches no map", "Leave one of them out."
            )
    return {}


def _pairs(
    setup: Setup, method: str, record: TeacherRecord, cache: CacheSet, levels: Levels
) -> dict[str, str | None]:
    """The maps of the teacher that are matched, and the student's tap of each where it was named."""
    options: TapOptions = setup.options
    taps = _teacher_taps(setup, method, record, cache, levels)
    own = options.student_tap or (None,) * len(taps)
    if taps and (len(own) != len(taps) or (len(taps) > 1 and not options.student_tap)):
        raise UsageError(
            f"{len(taps)} maps of the teacher ({', '.join(taps)}) and "
            f"{len(options.student_tap)} of the student ({', '.join(options.student_tap) or 'none named'})",
            "Give --student-tap and --teacher-tap equally often: the first matches the first.",
        )
    return dict(zip(taps, own, strict=False))


def _teacher_taps(
    setup: Setup, method: str, record: TeacherRecord, cache: CacheSet, levels: Levels
) -> tuple[str, ...]:
    """The maps of a teacher that are matched, checked against what the cache keeps."""
    options: TapOptions = setup.options
    kept = [each.output.place for each in record.outputs.values() if each.kind == "maps"]
    named = _named_taps(options.teacher_tap, record.name, tuple(setup.weights))
    if options.one_map and len(named) > 1:
        raise UsageError(
            f"--teacher-tap gives '{record.name}' two maps: {named[0]} and {named[1]}",
            "One map a teacher is matched: name it once.",
        )
    if not kept and not named and _as_kept(options, levels):
        return ()
    unknown = [tap for tap in named if tap not in kept]
    if not kept and record.architecture == _MAPLESS:
        raise UsageError(
            f"{method} matches a map, and '{record.name}' is a joint teacher of embeddings, which has none",
            "Match its embedding, as P4's L1 student does: --levels features (the released code: none).",
        )
    if unknown or not kept:
        tap = unknown[0] if unknown else _last_tap(record)
        word = f"maps:{tap}" + (
            "@eval" if setup.teacher_view == "eval" and cache.view_set["train_views"] else ""
        )
        wanted = f"the map '{tap}'" if unknown else "a map"
        known = f"{'maps' if len(kept) > 1 else 'map'} {', '.join(kept)}" if kept else ", ".join(record.keep)
        less = " (--levels features matches no map)" if "features" in _choices(options) else ""
        raise CacheMissingError(
            f"{method} matches {wanted} of '{record.name}', and the cache keeps its {known} only.{nearest(tap, kept)}"
            f"{less}",
            named_instead(record.name, tap, kept) or cache.adding([record.name], [word]),
        )
    if named or len(kept) == 1:
        return named or tuple(kept)
    raise UsageError(
        f"the cache keeps {len(kept)} maps of '{record.name}': {', '.join(kept)}",
        f"Name the one to match: --teacher-tap {record.name}={kept[-1]}."
        if options.one_map
        else "Name those to match, and the student's layers in the same order: --teacher-tap TAP --student-tap TAP.",
    )


def named_instead(teacher: str, tap: str, kept: Iterable[str]) -> str:
    """What to do about a map that is not kept where one of a near name is; else nothing."""
    near = closest(tap, kept)
    return "" if near is None else f"Use --teacher-tap {teacher}={near}."


def _named_taps(words: Sequence[str], teacher: str, teachers: Sequence[str]) -> tuple[str, ...]:
    """Which of the ``[NAME=]TAP`` are of a teacher, each once."""
    found = []
    for word in words:
        name, equals, tap = word.partition("=")
        if equals and name not in teachers:
            raise UsageError(
                f"--teacher-tap {word}: no teacher '{name}' is learnt from.{nearest(name, teachers)}",
                f"The teachers are {', '.join(teachers)}.",
            )
        if not equals or name == teacher:
            found.append(tap if equals else word)
    return tuple(dict.fromkeys(found))


def _last_tap(record: TeacherRecord) -> str:
    """The layer that a hint names; TAP where the teacher cannot be looked at (it need not be at hand to learn)."""
    try:
        taps = _maps_of(open_model(recorded_model(record.spec), weights="random"))
    except KdError:
        return "TAP"
    return taps[-1] if taps else "TAP"


def _weights(given: Sequence[float], arrays: Sequence[str]) -> tuple[float, ...]:
    weights = tuple(given or (0.0,))
    weights = weights * len(arrays) if len(weights) == 1 else weights
    if len(weights) != len(arrays):
        raise UsageError(
            f"--level-weight is given {len(given)} times, and the levels are {', '.join(arrays) or 'none'}",
            "Give it once for all, or once for each, in this order.",
        )
    return weights


def _require_trainable(setup: Setup, levels: Sequence[Level]) -> None:
    """Refuse to match what does not train."""
    choices = _choices(setup.options)
    if levels and setup.origin.freeze is not None:
        less = (
            "or match nothing: --levels none."
            if "none" in choices
            else "or judge it as it is: kd eval-probe."
        )
        raise UsageError(
            f"--freeze {setup.origin.freeze}, but matching {levels[0].array} would have to change the backbone",
            f"Leave --freeze out, {less}",
        )
