"""How weights learn: options of students and of joint teachers, declared once."""

from copy import copy
from functools import partial
from typing import Any, Literal

from pydantic import field_validator

from kdcli.options.common import AmpOption
from kdcli.options.fields import StepConfig, option

Schedule = Literal["constant", "cosine", "step", "one-cycle"]
_optimisation = partial(option, panel="Optimisation")


class LearningOptions(AmpOption):
    """Abstract: optimiser, schedule and the steps they count."""

    epochs: int | None = _optimisation(
        None, "Passes over the data; default: the method's.", ge=1, shared=True, le=10**5
    )
    batch_size: int | None = _optimisation(
        None, "Images per step; default: the method's.", ge=1, shared=True, le=2**20
    )
    lr: float | None = _optimisation(
        None, "Peak learning rate (of the heads, where groups differ); default: the method's.", gt=0, le=1e20
    )
    optimizer: str | None = _optimisation(None, "timm optimiser; default: the method's.")
    weight_decay: float | None = _optimisation(None, "Weight decay; default: the method's.", ge=0, le=1e4)
    schedule: Schedule | None = _optimisation(None, "How the learning rate falls; default: the method's.")
    milestones: tuple[float, ...] | None = _optimisation(
        None,
        "Shares of the training at which --schedule step falls tenfold, e.g. 0.5,0.8.",
        comma=True,
        metavar="SHARES",
    )
    warmup: float | None = _optimisation(None, "Share of the training in which the rate rises.", ge=0, lt=1)
    final_lr_share: float | None = _optimisation(
        None,
        "Rate at which --schedule one-cycle ends, as a share of --lr; default: 4e-6 (torch's).",
        ge=0,
        le=1,
    )
    accumulate: int | None = _optimisation(
        None,
        "Compute each step's images in this many pieces, adding up gradients; less memory.",
        ge=1,
        le=2**16,
    )
    label_smoothing: float | None = _optimisation(
        None, "Share of each label that is spread evenly over all classes.", ge=0, lt=1
    )

    deterministic: bool = option(
        False, "On a card: only operations that give the same bits again, so that a resumed run is bit-equal; slower.",
        panel="Run", shared=True,
    )  # fmt: skip

    @field_validator("milestones")
    @classmethod
    def _rising_shares(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and not (
            shares == tuple(sorted(set(shares))) and all(0 < share < 1 for share in shares)
        ):
            raise ValueError("milestones are shares of the training between 0 and 1, each after the last")
        return shares


def with_default(kind: type[StepConfig], name: str, default: Any) -> Any:
    """An inherited option with a default of its own, and no word of another in its help."""
    field = copy(kind.model_fields[name])
    field.default = default
    field.description = (field.description or "").partition("; default:")[0].rstrip(".") + "."
    return field
