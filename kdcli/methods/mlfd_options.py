"""Options of P4's student (``--method mlfd``)."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class MlfdOptions(BaseModel):
    """What :class:`~kdcli.training.config.StudentConfig` has for ``mlfd``; ``None`` means: by the convention."""

    loss_convention: Literal["paper", "code"] | None = Field(
        None, description="P4's weights: as printed (default), or as its released code computes."
    )
    mlfd_levels: Literal["all", "maps", "features", "none"] | None = Field(
        None, description="What of the teacher is matched: embedding and maps (paper), maps (code), or less."
    )
    distill_weight: float | None = Field(
        None, ge=0, description="Weight alpha of the softened cross-entropy (P4: 0.6)."
    )
    level_weight: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="Weight beta_c of each level's squared error (P4: 0.2); one, or one a level."
    )
    student_tap: tuple[str, ...] = Field(
        (), description="Layers of the student that are matched; default: its last."
    )
    teacher_tap: tuple[str, ...] = Field(
        (), description="Cached maps of the teacher, one a student tap; default: the only one."
    )
    adaptor: Literal["student", "teacher", "none"] | None = Field(
        None,
        description="Side on which unequal channels are made equal by a trained layer; default: student.",
    )
    map_resize: Literal["pool", "bilinear"] | None = Field(
        None, description="How maps of unequal height and width are made equal; default: they are refused."
    )
