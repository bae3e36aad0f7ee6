"""What a student matches of a teacher's representation, level by level: the values behind P4's method."""

from dataclasses import dataclass
from typing import Any, Literal, final

Side = Literal["student", "teacher", "none"]
Resize = Literal["pool", "bilinear"]
EMBEDDING = "features"
"""The level that is no map: the pooled features, in the cache's name for them."""


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
        convention: ``paper`` or ``code``: where the weights come from that were not given.
        distill_weight: alpha >= 0, of the softened cross-entropy.
        levels: what is matched, the embedding first; empty: logits alone.
        adaptor: on which side shapes are made equal.
        resize: how maps of unequal height and width are; None: they are refused.
        columns: of the teacher's logits, in the order of the student's classes; None: they are in that order.
    """

    convention: Literal["paper", "code"]
    distill_weight: float
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
        return {
            "loss_convention": self.convention,
            "distill_weight": self.distill_weight,
            "levels": {level.array: {"weight": level.weight, "tap": level.tap} for level in self.levels},
            "adaptor": self.adaptor,
            "map_resize": self.resize,
        }

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's taps, each once."""
        return tuple(dict.fromkeys(level.tap for level in self.levels if level.tap is not None))
