"""What ``kd eval-probe`` can be told."""

from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

from pydantic import field_validator, model_validator

from kdcli.options.common import (
    CachesOption,
    DataOptions,
    ExactAmpOption,
    ForwardOptions,
    MultiLabelOption,
    SeedOption,
    VerifyOption,
    fixed_geometry,
)
from kdcli.options.fields import option
from kdcli.options.grids import c_values
from kdcli.training.config import learning_rates

ALL: Literal["all"] = "all"
"""``--shots all``: every labelled training image, in a single run."""
_MOST_SHOTS: Final = 10**7


@final
class ProbeConfig(
    CachesOption, DataOptions, MultiLabelOption, SeedOption, ForwardOptions, ExactAmpOption, VerifyOption
):
    """``kd eval-probe``: representations (``model``, ``teacher``) times targets (``data`` with ``test``)."""

    command: ClassVar[str] = "eval-probe"

    data: str | tuple[str, ...] = option(
        ..., "Data set the shots are drawn from; several as NAME=DATA each. None with --head.",
        panel="Data", positional=True, there="data",
    )  # fmt: skip
    test: str | tuple[str, ...] = option(
        ..., "Data set to test on; of several DATA: NAME=DATA. Repeatable.",
        panel="Data", metavar="DATA", there="data",
    )  # fmt: skip
    related: tuple[str, ...] = option(
        (), "Target near what the representations learned (P1). Repeatable.", panel="Data", metavar="NAME"
    )
    unrelated: tuple[str, ...] = option((), "Target far from it. Repeatable.", panel="Data", metavar="NAME")
    model: tuple[str, ...] = option(
        (), "Model spec, run of kd train-student or folder of runs; its forward is run. Repeatable.",
        panel="Teachers", metavar="[NAME=]SPEC", complete="model", there="model",
    )  # fmt: skip
    teacher: tuple[str, ...] = option(
        (), "Cached teacher to probe, without a forward. Repeatable.",
        panel="Teachers", metavar="NAME", complete="teacher",
    )  # fmt: skip
    adapted: tuple[str, ...] = option(
        (), "Teacher whose features a --model run predicts by an adaptor: probe these, too. Repeatable.",
        panel="Teachers", metavar="NAME", complete="teacher",
    )  # fmt: skip
    protocol: Literal["svm", "logistic", "knn", "fine-tune"] = option(
        "svm", "What is trained on the representation.", panel="Method"
    )
    head: str | None = option(
        None, "Train nothing: test this head that was kept with the model; label is its own.",
        panel="Method", metavar="NAME",
    )  # fmt: skip
    shots: int | Literal["all"] = option(5, "Images per class and draw, or all.", panel="Method", metavar="N")
    draws: int = option(
        50, "Random draws of the shots, the same for every representation.", panel="Method", ge=1, le=10**5
    )
    folds: int | None = option(
        None, "Folds of the cross-validation; default: 5, or the shots where they are fewer.",
        panel="Method", ge=2, le=1000,
    )  # fmt: skip
    c_grid: tuple[float, ...] = option(
        (0.01, 0.1, 1.0, 10.0), "Values of C that cross-validation chooses from: numbers, or FIRST:LAST:COUNTlog.",
        panel="Method", comma=True, metavar="VALUES",
    )  # fmt: skip
    neighbours: int = option(20, "k of knn.", panel="Method", ge=1, le=10**6)
    solver: Literal["exact", "sklearn"] = option(
        "exact", "Of the SVM: kd's exact one, or scikit-learn's LinearSVC, the slow reference.",
        panel="Method",
    )  # fmt: skip
    epochs: int = option(50, "Of fine-tune: passes over the data.", panel="Optimisation", ge=1, le=10**5)
    lr_grid: str = option(
        "0.0001,0.001,0.01,0.1",
        "Of fine-tune: learning rates to choose among on its validation split; a lone one is taken.",
        panel="Optimisation", metavar="RATES",
    )  # fmt: skip
    validation: float = option(
        0.2, "Of fine-tune: share of the images that chooses the rate.",
        panel="Optimisation", metavar="SHARE", gt=0, lt=1,
    )  # fmt: skip
    recipe: str | None = option(
        None, "Of fine-tune: recipe of the training views; default: imagenet.",
        panel="Views", complete="recipe",
    )  # fmt: skip
    eval_geometry: str | None = option(
        None, "What models are shown of an image: own, shared:CROP (one centred square) or whole (squeezed), +clips:N "
        "(clips of a video, averaged); cached teachers must have seen the same. Default: each its own.",
        panel="Views", metavar="HOW", complete="geometry",
    )  # fmt: skip
    baseline: str | None = option(
        None, "Representation to compare the others with; default: the first.", panel="Output", metavar="NAME"
    )
    equal_within: float = option(
        0.01, "Mean difference up to which the tally says equal.", panel="Output", ge=0, le=1
    )
    margin: float = option(
        0.01, "Difference that 'no worse than' tolerates (TOST).", panel="Output", gt=0, le=1
    )
    out: Path | None = option(
        None, "Folder of fine-tune's runs; they resume.", panel="Output", metavar="DIR", mechanical=True
    )

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of ``lr_grid``, ascending."""
        return _rates(self.lr_grid)

    @model_validator(mode="before")
    @classmethod
    def _head_needs_no_data(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("head") is not None:
            return {"data": (), **values}
        return values

    @field_validator("model", "teacher", "adapted", "related", "unrelated", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return () if value is None else (value,) if isinstance(value, str) else value

    @field_validator("shots", mode="before")
    @classmethod
    def _known_shots(cls, value: object) -> object:
        if value == ALL:
            return ALL
        try:
            shots = int(str(value))
        except ValueError:
            shots = 0
        if not 1 <= shots <= _MOST_SHOTS:
            raise ValueError(f"must be a number of images per class, from 1 to {_MOST_SHOTS}, or all")
        return shots

    @field_validator("c_grid", mode="before")
    @classmethod
    def _known_values(cls, given: object) -> tuple[float, ...]:
        several = given if isinstance(given, list | tuple) else (given,)  # as a YAML file may have them
        return c_values(",".join(map(str, several)))

    @field_validator("eval_geometry")
    @classmethod
    def _one_geometry(cls, text: str | None) -> str | None:
        return fixed_geometry(text)

    @field_validator("lr_grid")
    @classmethod
    def _known_rates(cls, text: str) -> str:
        _rates(text)
        return text


def _rates(text: str) -> tuple[float, ...]:
    try:
        alone = float(text)
    except ValueError:
        return learning_rates(text)
    if not 0 < alone < float("inf"):
        raise ValueError("must be a positive rate, or several as in 0.001,0.003,0.01 or 0.0001:0.1:7log")
    return (alone,)
