"""What ``kd distill`` can be told."""

from pathlib import Path
from typing import ClassVar, final

from pydantic import field_validator

from kdcli.errors import nearest
from kdcli.options.common import AmpOption, DataOptions, DeviceOption, SeedOption, WorkersOption
from kdcli.options.fields import option
from kdcli.registry import METHODS, is_object_path
from kdcli.training.presets import PAPERS, PresetName


@final
class DistillConfig(DataOptions, SeedOption, DeviceOption, AmpOption, WorkersOption):
    """``kd distill``. What is not given is chosen by what the data and the teachers are."""

    command: ClassVar[str] = "distill"

    data: str = option(
        ..., "Images to learn from: a folder, or SOURCE[@key=value,...].",
        panel="Data", positional=True, metavar="IMAGES", there="data",
    )  # fmt: skip
    test: str | None = option(
        None, "Images to test on; default: a split called so, else a fifth of each class.",
        panel="Data", there="data",
    )  # fmt: skip
    teacher: tuple[str, ...] = option(
        ..., "A teacher: a model spec. Repeatable.",
        panel="Teachers", metavar="[NAME=]SPEC", min_length=1, complete="model", there="model",
    )  # fmt: skip
    views: int | None = option(
        None, "Training views of each image that teachers and students see; default: by the method.",
        panel="Views", ge=1, le=1000, metavar="K",
    )  # fmt: skip
    method: str | None = option(
        None, "What the student learns from, see kd methods; default: by labels and teachers.",
        panel="Teachers", complete="method",
    )  # fmt: skip
    preset: PresetName | None = option(
        None, "p1, p2, p3, p4: that paper's method with its own numbers; fast: a first look.", panel="Teachers"
    )  # fmt: skip
    student: str = option(
        ..., "Model spec of the student.", panel="Student", complete="student", there="model"
    )
    image_size: int | None = option(
        None, "Input size of the student in pixels; default: its own.", panel="Student", ge=8, le=4096
    )
    epochs: int | None = option(
        None, "Passes over the images; default: by how many there are.", panel="Optimisation", ge=1, le=10**6
    )
    batch_size: int | None = option(
        None, "Images per step; default: by how many there are.", panel="Optimisation", ge=1, le=2**20
    )
    baseline: bool = option(
        True, "Train the same student from labels alone, too, to compare with.", panel="Optimisation"
    )
    out: Path = option(
        Path("kd-distill"), "Folder of all that is made.", panel="Output", metavar="DIR", mechanical=True
    )

    @property
    def chosen_method(self) -> str | None:
        """The method that was asked for by its name or by a paper's preset."""
        return self.method or PAPERS.get(self.preset or "")

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str | None) -> str | None:
        if name is not None and name not in METHODS and not is_object_path(name):
            raise ValueError(
                f"must be one that kd methods lists, or pkg.mod:OBJECT.{nearest(name, tuple(METHODS))}"
            )
        return name
