"""What P3's transfer methods can be told, as a part of :class:`~kdcli.training.config.StudentConfig`."""

from typing import Literal

from pydantic import BaseModel, Field


class TransferOptions(BaseModel):
    """Abstract: options of P3's methods. ``None`` means: the method's default."""

    kl_weight: float | None = Field(
        None, ge=0, le=1, description="Weight of the distillation term (P3's lambda); labels have the rest."
    )
    kl_direction: Literal["forward", "reverse"] | None = Field(
        None, description="forward: KL(teacher || student), the default; reverse: KL(student || teacher)."
    )
    top_classes: int | None = Field(
        None, ge=1, description="Classes that topk-kl compares: the teacher's most probable ones (10)."
    )
    mcl_tau: float | None = Field(
        None, ge=0, lt=1, description="Share of itself that MCL's slow copy keeps in an update (0.9999)."
    )
    mcl_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Instead of tau: share of the way that the slow copy goes in the whole run.",
    )
    mcl_every: int | None = Field(None, ge=1, description="Steps between updates of MCL's slow copy (2).")
    frozen: Literal["auto", "cache", "live"] | None = Field(
        None,
        description="Where DP has the student as it was from: cache, live, or auto (default), cached if it is there.",
    )
    frozen_teacher: str | None = Field(
        None, description="Cached teacher that is the student as it was; default: the one of its weights."
    )
