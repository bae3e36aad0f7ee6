"""SP: Tung, Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019).

    L_SP = 1/b^2 sum_ij (G_s - G_t)_ij^2,   G: the rows of F F^T, each of length 1                        (Eq. 2 to 4)

* F: [b, D] the pooled features (ours), or with ``--sp-level map`` a map, flattened [paper: the last one]. The diagonal
  counts. Grids and channels may differ.
* Default beta (``--relation-weight``) 3000 for 64 images a step [RepDistiller]; see :mod:`~kdcli.methods.relations`.
"""

from dataclasses import replace
from typing import Any, Literal, final

from jaxtyping import Float
from torch import Tensor

from kdcli.errors import CacheMissingError, UsageError, nearest
from kdcli.methods.base import Method, Needs, Setup
from kdcli.methods.options import method_option
from kdcli.methods.relations import (
    NEEDS,
    RelationalMethod,
    RelationOptions,
    Term,
    directions,
    relation_weight_option,
    wide,
)
from kdcli.methods.transfer import PRINTED
from kdcli.models.taps import tap_shapes


def similarity_loss(student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """SP: mean squared difference of row-normalised Gram matrices (Tung, Mori 2019, Eq. 2 to 4).

    Args:
        student: features or maps, which are flattened.
        teacher: likewise, of any shape.

    Returns:
        At least 0, at most 4/b.
    """
    grams = (each @ each.T for each in (wide(student.flatten(1)), wide(teacher.flatten(1))))
    ours, theirs = (directions(gram, 0.0) for gram in grams)
    return (ours - theirs).square().mean()


class SpOptions(RelationOptions):
    """What SP can be told."""

    relation_weight: float = relation_weight_option(3000.0, rows=True)
    sp_level: Literal["features", "map"] = method_option(
        "features", "What is compared: the pooled features, or a map (the paper: the last)."
    )
    student_tap: tuple[str, ...] = method_option(
        (), "Layer of the student whose map is compared; default: its last.", metavar="TAP"
    )
    teacher_tap: tuple[str, ...] = method_option(
        (), "Cached map of a teacher; default: the only one of each. Repeatable.", metavar="TAP"
    )


@final
class Sp(RelationalMethod):
    """SP; :attr:`Setup.own` names the map of each teacher, if maps are compared."""

    def terms(self, options: SpOptions) -> tuple[Term, ...]:
        """See :func:`similarity_loss`."""
        return (Term("sp", options.relation_weight, similarity_loss, falls=True),)

    def needs_of(self, options: RelationOptions) -> Needs:
        """Maps instead of features, where these are compared."""
        needs = RelationalMethod.needs_of(self, options)
        return replace(needs, kinds=frozenset({"maps"})) if _of_maps(options) else needs

    def check(self, setup: Setup) -> Setup:
        """Decides which maps are compared."""
        setup = RelationalMethod.check(self, setup)
        options: SpOptions = setup.options
        taps = {"--student-tap": options.student_tap, "--teacher-tap": options.teacher_tap}
        given = next((name for name, own in taps.items() if own), None)
        if given is not None and not _of_maps(options):
            raise UsageError(
                f"{given} names a map, and --sp-level features compares none",
                "Add --sp-level map, or leave the taps out.",
            )
        if len(options.student_tap) > 1:
            raise UsageError(f"{self.name} compares one map of the student", "Give --student-tap once.")
        if _of_maps(options) and setup.origin.train_from is not None:
            raise UsageError(
                f"--train-from {setup.origin.train_from}: a student that is cut gives no maps to compare",
                "Leave --train-from out, or use --sp-level features.",
            )
        return replace(
            setup, own={name: _map_of(setup, name) for name in setup.weights} if _of_maps(options) else None
        )

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the maps."""
        return {
            **Method.identity(self, setup),
            **({"maps": dict(sorted(setup.own.items()))} if setup.own else {}),
        }

    def tap(self, setup: Setup) -> str | None:
        """The one that is named, or the last.

        Raises:
            UsageError: the student has no such layer.
        """
        if not _of_maps(setup.options):
            return None
        taps = setup.options.student_tap or setup.opened().network.taps[-1:] or ("the last",)
        tap_shapes(setup.opened(), [taps[0]])
        return str(taps[0])


def _of_maps(options: Any) -> bool:
    return isinstance(options, SpOptions) and options.sp_level == "map"


def _map_of(setup: Setup, teacher: str) -> str:
    """The array of a teacher's map that is compared.

    Raises:
        CacheMissingError: none is cached, or not the one that is named.
        UsageError: there are several.
    """
    named, record = setup.options.teacher_tap, setup.teachers[teacher]
    kept = [array for output in record.outputs.values() if output.kind == "maps" for array in output.arrays]
    chosen = [array for array in kept if not named or array.removeprefix("maps/") in named]
    taps = [array.removeprefix("maps/") for array in kept]
    if not chosen and setup.cache is not None:
        tap = named[0] if named else "TAP"
        raise CacheMissingError(
            f"a map of '{teacher}' is needed, and the cache keeps {', '.join(taps) or 'none'}.{nearest(tap, taps)}",
            setup.cache.adding([teacher], [f"maps:{tap}"]),
        )
    if len(chosen) > 1:
        raise UsageError(
            f"one map a teacher is compared, and there are {len(chosen)} of '{teacher}': {', '.join(taps)}",
            "Name it: --teacher-tap TAP.",
        )
    return chosen[0]


SP = Sp(
    name="sp", paper="SP, Tung and Mori 2019", equation="Eq. 4",
    summary="Similarities between a step's images, and labels.", Options=SpOptions, needs=NEEDS, defaults=PRINTED,
)  # fmt: skip
