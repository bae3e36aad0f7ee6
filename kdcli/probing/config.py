"""What ``kd eval-probe`` can be told."""

from pathlib import Path
from typing import Any, ClassVar, Literal, final

from pydantic import Field, field_validator, model_validator

from kdcli.options.fields import Mechanical, StepConfig
from kdcli.options.grids import c_values
from kdcli.training.config import learning_rates

ALL: Literal["all"] = "all"
"""``--shots all``: every labelled training image, in a single run."""


@final
class ProbeConfig(StepConfig):
    """``kd eval-probe``: representations (``model``, ``teacher``) times targets (``data`` with ``test``)."""

    command: ClassVar[str] = "eval-probe"

    data: str | tuple[str, ...] = Field(
        description="Data set the shots are drawn from; several as NAME=DATA. None with --head.",
        json_schema_extra={"positional": True},
    )
    test: str | tuple[str, ...] = Field(description="Data set to test on; of several DATA as NAME=DATA.")
    model: tuple[str, ...] = Field(
        (), description="[NAME=]SPEC, a run of kd train-student or a folder of runs; repeatable."
    )
    cache: tuple[Path, ...] = Field((), description="Cache folder; repeatable. Its teachers need no forward.")
    teacher: tuple[str, ...] = Field((), description="Cached teacher whose features are probed; repeatable.")
    protocol: Literal["svm", "logistic", "knn", "fine-tune"] = Field(
        "svm", description="What is trained on the representation."
    )
    head: str | None = Field(
        None, description="Train nothing: test this head that was kept with the model (label: its own)."
    )
    shots: int | Literal["all"] = Field(5, description="Images per class and draw, or all.")
    draws: int = Field(50, ge=1, description="Random draws of the shots.")
    seed: int = Field(0, ge=0, description="Seed of the draws; the same draws for every representation.")
    folds: int | None = Field(
        None, ge=2, description="Of the cross-validation; default 5, or the shots where they are fewer."
    )
    c_grid: tuple[float, ...] = Field(
        (0.01, 0.1, 1.0, 10.0),
        description="Values of C that cross-validation chooses from: numbers, or FIRST:LAST:COUNTlog.",
        json_schema_extra={"comma": True},
    )
    neighbours: int = Field(20, ge=1, description="Of knn.")
    solver: Literal["exact", "sklearn"] = Field(
        "exact", description="Of the SVM: kd's exact one, or scikit-learn's LinearSVC, the slow reference."
    )
    multi_label: str | None = Field(
        None,
        min_length=1,
        description="An image's class name is several labels joined by this; judged by mean average precision.",
    )
    baseline: str | None = Field(
        None, description="Representation the others are compared with; default: the first."
    )
    related: tuple[str, ...] = Field((), description="Targets near what the representations learned (P1).")
    unrelated: tuple[str, ...] = Field((), description="Targets far from it.")
    equal_within: float = Field(
        0.01, ge=0, le=1, description="Mean difference up to which the tally says equal."
    )
    margin: float = Field(0.01, gt=0, le=1, description="Difference that 'no worse than' tolerates (TOST).")
    out: Path | None = Field(
        None, description="Folder of fine-tune's runs; they resume.", json_schema_extra=Mechanical
    )
    epochs: int = Field(50, ge=1, description="Of fine-tune.")
    lr_grid: str = Field(
        "0.0001,0.001,0.01,0.1",
        description="Learning rates that fine-tune chooses from on its validation split; a lone one is taken.",
    )
    validation: float = Field(
        0.2, gt=0, lt=1, description="Share of fine-tune's images that chooses the rate."
    )
    recipe: str | None = Field(None, description="Recipe of fine-tune's training views; default: imagenet.")
    batch_size: int = Field(64, ge=1, description="Images per forward.", json_schema_extra=Mechanical)
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.", json_schema_extra=Mechanical)
    workers: int | None = Field(
        None,
        ge=0,
        description="Decode processes; default: the processors of this job.",
        json_schema_extra=Mechanical,
    )
    verify: Literal["never", "once", "always"] = Field(
        "once", description="When to check the cache's checksums.", json_schema_extra=Mechanical
    )
    data_root: Path | None = Field(
        None, description="Folder of torch/ and hfds/ data sets, and of relative folders."
    )
    download: bool = Field(
        False, description="Allow a data set to be downloaded.", json_schema_extra=Mechanical
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

    @field_validator("model", "teacher", "related", "unrelated", mode="before")
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
        if shots < 1:
            raise ValueError("must be a number of images per class, 1 or more, or all")
        return shots

    @field_validator("c_grid", mode="before")
    @classmethod
    def _known_values(cls, given: object) -> tuple[float, ...]:
        several = given if isinstance(given, list | tuple) else (given,)  # as a YAML file may have them
        return c_values(",".join(map(str, several)))

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
