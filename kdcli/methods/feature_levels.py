"""Which features and maps of which teachers a student learns to predict, and from what of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import CacheMissingError, UsageError, nearest
from kdcli.methods.base import Setup
from kdcli.methods.levels import named_instead, require_correspondence
from kdcli.models.spec import Model
from kdcli.models.taps import tap_shapes

FEATURES = "features"
_MAPS = "maps/"
Levels = Literal["all", "maps", "features"]


@final
@dataclass(frozen=True, slots=True)
class FeatureLevel:
    """One array of a teacher.

    Attributes:
        array: its name in the cache: ``features`` or ``maps/TAP``.
        teacher_shape: of a row of it: [C] or [C, H, W].
        tap: the student's; None until the student is open, where its last one is meant, and of features.
        student_shape: [D] or [D, h, w]; empty until the student is open.
    """

    array: str
    teacher_shape: tuple[int, ...]
    tap: str | None = None
    student_shape: tuple[int, ...] = ()

    @property
    def is_map(self) -> bool:
        """Whether its rows are cells."""
        return self.array != FEATURES

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width that both maps are averaged to; None of features."""
        if not self.is_map:
            return None
        own, theirs = self.student_shape, self.teacher_shape
        return min(own[1], theirs[1]), min(own[2], theirs[2])


LevelsOf = Mapping[str, Sequence[FeatureLevel]]
"""Of each teacher."""


def choose_levels(
    setup: Setup, levels: Levels, student_tap: str | None, teacher_taps: Sequence[str]
) -> LevelsOf:
    """What is predicted of each teacher: of ``all`` what the cache keeps of it, of the others exactly that.

    Args:
        setup: of the run.
        levels: as asked for.
        student_tap: the layer that maps are predicted from; None: the last.
        teacher_taps: each a map, or ``NAME=TAP`` for one teacher.

    Raises:
        UsageError: a tap for nothing, or for a teacher that is none; several maps to choose among.
        CacheMissingError: what is asked for is not kept, with the command that adds it.
    """
    cache = setup.cache
    if cache is None:
        raise ValueError("this method reads a cache")
    if levels == FEATURES and (student_tap or teacher_taps):
        flag = f"--student-tap {student_tap}" if student_tap else f"--teacher-tap {teacher_taps[0]}"
        raise UsageError(f"{flag}, but --levels features matches no map", "Leave one of them out.")
    named = _taps_by_teacher(teacher_taps, tuple(setup.weights))
    found: dict[str, list[FeatureLevel]] = {}
    for name in setup.weights:
        record = setup.teachers[name]
        kept = record.array_specs()
        wanted = [FEATURES] if levels == FEATURES or (levels == "all" and FEATURES in kept) else []
        if levels != FEATURES and (array := _map_of(record, named.get(name), levels, cache)) is not None:
            wanted.append(array)
        cache.require_kept({name: wanted or [FEATURES]})
        found[name] = [
            FeatureLevel(array, kept[array].row_shape, student_tap if array != FEATURES else None)
            for array in wanted
        ]
    _require_trainable(setup, found)
    return found


def _taps_by_teacher(words: Sequence[str], teachers: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, tap = word.partition("=")
        if equals and name not in teachers:
            raise UsageError(
                f"--teacher-tap {word}: no teacher '{name}' is learnt from.{nearest(name, teachers)}",
                f"The teachers are {', '.join(teachers)}.",
            )
        for each in (name,) if equals else teachers:
            if each in found:
                raise UsageError(
                    f"--teacher-tap gives '{each}' two maps: {found[each]} and {tap or word}",
                    "One map a teacher is matched: name it once.",
                )
            found[each] = tap if equals else word
    return found


def _map_of(record: TeacherRecord, tap: str | None, levels: Levels, cache: CacheSet) -> str | None:
    """The array of the map of a teacher that is matched; None where it keeps none and need not."""
    kept = [array for each in record.outputs.values() if each.kind == "maps" for array in each.arrays]
    known = [array.removeprefix(_MAPS) for array in kept]
    if tap is not None and tap not in known:
        raise CacheMissingError(
            f"the map '{tap}' of '{record.name}' is asked for, and the cache keeps its {', '.join(record.keep)} only."
            f"{nearest(tap, known)}",
            named_instead(record.name, tap, known) or cache.adding([record.name], [f"maps:{tap}"]),
        )
    if tap is not None:
        return _MAPS + tap
    if len(kept) > 1:
        raise UsageError(
            f"the cache keeps {len(kept)} maps of '{record.name}': {', '.join(known)}",
            f"Name the one to match: --teacher-tap {record.name}={known[-1]}.",
        )
    if not kept and levels == "maps":
        raise CacheMissingError(
            f"--levels maps matches a map, and the cache keeps of '{record.name}' its {', '.join(record.keep)} only",
            cache.adding([record.name], ["maps:TAP"]),
        )
    return next(iter(kept), None)


def _require_trainable(setup: Setup, levels: LevelsOf) -> None:
    """Refuse to match what does not train."""
    if setup.origin.freeze is not None:
        raise UsageError(
            f"--freeze {setup.origin.freeze}, but learning features would have to change the backbone",
            "Leave --freeze out; kd eval-probe trains classifiers on features as they are.",
        )
    if setup.origin.train_from is not None and any(each.is_map for own in levels.values() for each in own):
        raise UsageError(
            f"--train-from {setup.origin.train_from}: a student that is cut gives no maps to match",
            "Leave --train-from out, or use --levels features.",
        )


def fit_levels(setup: Setup, levels: LevelsOf) -> LevelsOf:
    """The same with the student's tap and shapes.

    Raises:
        UsageError: it has no such tap (the nearest is named), or none at all; or cells of maps are not of the same
            places of the images.
    """
    model = setup.opened()
    fitted = {name: [_fitted(level, model) for level in own] for name, own in levels.items()}
    for name, own in fitted.items():
        require_correspondence(setup, name, [each.grid for each in own if each.grid is not None])
    return fitted


def _fitted(level: FeatureLevel, model: Model) -> FeatureLevel:
    if not level.is_map:
        return replace(level, student_shape=(model.num_features,))
    tap = level.tap or (model.network.taps[-1] if model.network.taps else "the last")
    return replace(level, tap=tap, student_shape=tap_shapes(model, [tap])[tap])


def document_of(levels: LevelsOf) -> dict[str, Any]:
    """Which arrays and taps they are, as JSON."""
    return {name: {each.array: each.tap for each in own} for name, own in sorted(levels.items())}
