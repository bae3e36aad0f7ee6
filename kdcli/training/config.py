"""What training can be told: options of every run, and those of the chosen method."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

from pydantic import (
    SerializationInfo,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from kdcli.errors import nearest
from kdcli.methods.options import MethodOptions
from kdcli.options.common import (
    BadImagesOption,
    CachesOption,
    DataOptions,
    DeviceOption,
    MultiLabelOption,
    OverwriteOption,
    PartialOption,
    SeedOption,
    VerifyOption,
    WorkersOption,
    fixed_geometry,
)
from kdcli.options.fields import option
from kdcli.options.grids import positive_numbers
from kdcli.options.learning import LearningOptions
from kdcli.registry import METHODS, is_object_path
from kdcli.training.presets import PresetName, options_of_preset

_data, _teachers, _student = (partial(option, panel=name) for name in ("Data", "Teachers", "Student"))
_optimisation, _views, _run = (partial(option, panel=name) for name in ("Optimisation", "Views", "Run"))


@final
class StudentConfig(
    CachesOption,
    DataOptions,
    BadImagesOption,
    MultiLabelOption,
    PartialOption,
    VerifyOption,
    SeedOption,
    DeviceOption,
    WorkersOption,
    LearningOptions,
    OverwriteOption,
):
    """``kd train-student``. Flat outside: an option of the method is given and written beside all others.

    ``None`` means: the method's default (printed and recorded).
    """

    command: ClassVar[str] = "train-student"

    data: str | tuple[str, ...] = _data(
        ...,
        "Data set to train on: SOURCE[@key=value,...]; several as NAME=DATA each.",
        positional=True,
        shared=True,
        there="data",
    )
    test: str | tuple[str, ...] | None = _data(
        None,
        "Data set to test on after training; of several DATA: NAME=DATA, repeatable.",
        shared=True,
        there="data",
    )
    validation: float | None = _data(
        None,
        "Set this share of each class aside; judge every epoch on it.",
        gt=0,
        lt=1,
        metavar="SHARE",
        shared=True,
    )

    preset: PresetName | None = _teachers(
        None,
        "A paper's method with its own numbers (p1 .. p4), or fast: a first look; what else is given wins.",
        mechanical=True,
        shared=True,
    )
    method: str = _teachers(..., "What the student learns from; see kd methods.", complete="method")
    teacher: tuple[str, ...] = _teachers(
        (),
        "Cached teacher to use; default: all, or the ranking's. Repeatable.",
        complete="teacher",
        metavar="NAME",
    )
    ranking: str | None = _teachers(
        None, "Ranking JSON of kd rank-sources; - reads standard input.", there="ranking"
    )
    teacher_view: Literal["same", "eval"] | None = _teachers(
        None,
        "same: teachers saw the student's view; eval: the clean view 0. Default: the method's (P2, P4: eval).",
        shared=True,
    )
    sequential: Literal["ascending", "descending", "random", "given"] | None = _teachers(
        None,
        "One stage a teacher, each from the last one's student: ascending or descending accuracy, random, or given.",
        metavar="ORDER",
    )

    student: str = _student(..., "Model spec of the student.", complete="student", there="model")
    init: str | None = _student(
        None,
        "pretrained, random, xavier, nearest-source or a SPEC to start from; default: pretrained for local-dir:, "
        "hf-hub: and ARCH@FILE, random for bare names.",
    )
    freeze: Literal["backbone"] | None = _student(
        None, "backbone: train the heads only, on features of the frozen start."
    )
    train_from: str | None = _student(
        None,
        "Keep the layers up to TAP as they start, and read their maps from the cache; without one they run.",
        min_length=1,
        metavar="TAP",
    )
    image_size: int | None = _student(
        None, "Input size in pixels; default: the student's own.", ge=8, le=4096
    )
    model_arg: tuple[str, ...] = _student(
        (),
        "Argument of the student's architecture, e.g. drop_path_rate=0.2. Repeatable.",
        metavar="KEY=VALUE",
    )
    bn: Literal["train", "frozen", "frozen-affine"] | None = _student(
        None, "BatchNorm. frozen: its statistics. frozen-affine: its scale and shift as well."
    )
    compile: bool = _student(False, "Run the student through torch.compile.", mechanical=True)

    lr_grid: str | None = _optimisation(
        None, "Choose among 0.001,0.003,0.01 or 0.0001:0.1:7log on the validation split.", metavar="RATES"
    )
    backbone_lr_scale: float | None = _optimisation(
        None, "Backbone learning rate as a share of --lr.", ge=0, le=1e4
    )
    clip_norm: float | None = _optimisation(
        None, "Scale the gradient of all parameters down to this norm.", gt=0, le=1e20
    )
    ema: float | None = _optimisation(
        None, "Decay of a moving average of the weights; it is tested and exported.", gt=0, lt=1
    )
    select: Literal["last", "best", "best-on-test"] = _optimisation(
        "last", "Epoch to export. best: by the validation split. best-on-test: by --test."
    )

    recipe: str | None = _views(
        None, "Recipe of live training views; with a cache, the cache's.", complete="recipe", shared=True
    )
    eval_geometry: str | None = _views(
        None,
        "How the student is tested and exported: own (its config's), shared:CROP (a centre crop) or whole (squeezed); "
        "tested on +clips:N of a video, averaged. Default: that of what it is trained on, see docs/caches.md.",
        metavar="HOW",
        complete="geometry",
    )
    data_seed: int = _views(0, "Seed of order and views.", ge=0, shared=True, lt=2**32)

    out: Path = _run(..., "Output folder of the run.", mechanical=True, there="free")
    stage: Path | None = _run(
        None,
        "Copy what is read of the cache to this local disk first; caches in stores are kept there, too.",
        mechanical=True,
        metavar="DIR",
        shared=True,
    )
    prewarm: bool = _run(
        False, "Read the cache's files into the page cache first.", mechanical=True, shared=True
    )
    resident: Literal["ram", "gpu"] | None = _run(
        None,
        "Hold the teachers' outputs in memory (ram) or on the training device (gpu).",
        mechanical=True,
        shared=True,
    )
    tracker: tuple[str, ...] = _run(
        (),
        "Log epochs to tensorboard, wandb, mlflow, ... too; a tracker of accelerate. Repeatable.",
        mechanical=True,
    )

    options: SerializeAsAny[MethodOptions] = option(
        None, "The method's own options.", panel="Method", inner=True
    )
    aside: dict[str, Any] = option({}, "Options that only other methods have.", panel="Method", inner=True)

    @property
    def first_data(self) -> str:
        """DATA, of several the first without its name: the one that teachers have seen."""
        return self.data if isinstance(self.data, str) else self.data[0].partition("=")[2]

    # --- flat outside -------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Put the method's options together, and those aside that only other methods have."""
        values = {key: value for key, value in given.items() if key in cls.model_fields}
        further = {key: value for key, value in given.items() if key not in cls.model_fields}
        name = values.get("method")
        own = options_of(str(name)).model_fields if _exists(name) else {}
        aside = dict(values.get("aside") or {})
        if not set(further) <= set(own):
            known = cls.every_option()
            aside |= {key: further[key] for key in further if key in known and key not in own}
            values |= {key: value for key, value in further.items() if key not in known}
        gathered = {key: value for key, value in further.items() if key in own and value is not None}
        options = values.get("options")
        if isinstance(options, MethodOptions):
            options = options.model_dump()
        return {**values, "options": {**(options or {}), **gathered}, "aside": aside}

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if not _exists(name):
            raise ValueError(
                f"must be one that kd methods lists, or pkg.mod:OBJECT.{nearest(name, tuple(METHODS))}"
            )
        return name

    @field_validator("options", mode="before")
    @classmethod
    def _by_method(cls, given: Any, info: ValidationInfo) -> Any:
        name = info.data.get("method")  # absent where it is wrong, which is told already
        return MethodOptions() if name is None else options_of(name).model_validate(given)

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        document: dict[str, Any] = handler(self)
        own, aside = document.pop("options", {}), document.pop("aside", {})
        return {**document, **own, **aside}

    @classmethod
    def every_option(cls) -> dict[str, FieldInfo]:
        """All options by name, those of every registered method included."""
        methods = {
            name: field for method in METHODS for name, field in options_of(method).model_fields.items()
        }
        own = {name: field for name, field in cls.model_fields.items() if name not in ("options", "aside")}
        return {**methods, **own}

    @classmethod
    def preset_options(cls, name: str) -> Mapping[str, Any]:
        """See :class:`~kdcli.options.fields.StepConfig`."""
        known = cls.every_option()
        return {key: value for key, value in options_of_preset(name).items() if key in known}

    def items(self) -> Iterable[tuple[str, Any, FieldInfo]]:
        """Name, value and declaration of every option, the method's after the others."""
        for model in (self, self.options):
            for name, field in type(model).model_fields.items():
                if name not in ("options", "aside"):
                    yield name, getattr(model, name), field

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The same with other options, the method's among them; those are validated together."""
        own = {
            name: value for name, value in (update or {}).items() if name in type(self.options).model_fields
        }
        core = {name: value for name, value in (update or {}).items() if name not in own}
        if own:
            given = self.options.model_dump(exclude_unset=True)
            core["options"] = type(self.options).model_validate({**given, **own})
        return super().model_copy(update=core, deep=deep)

    # --- values -------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _one_class_an_image(self) -> Self:
        if self.multi_label is not None and self.sequential is not None:
            raise ValueError(
                "--sequential compares classes of images, and --multi-label has none: give one of them"
            )
        return self

    @field_validator("lr_grid")
    @classmethod
    def _known_rates(cls, text: str | None) -> str | None:
        if text is not None:
            learning_rates(text)
        return text

    @field_validator("eval_geometry")
    @classmethod
    def _known_geometry(cls, text: str | None) -> str | None:
        return fixed_geometry(text)


def _exists(name: object) -> bool:
    return isinstance(name, str) and (name in METHODS or is_object_path(name))


def options_of(name: str) -> type[MethodOptions]:
    """The options of a method.

    Raises:
        UsageError: the object is no method.
        NotFoundError: there is no such module or object.
    """
    kind: type[MethodOptions] = METHODS.find(name).Options
    return kind


def learning_rates(text: str) -> tuple[float, ...]:
    """The rates of ``--lr-grid``: numbers between commas, or ``FIRST:LAST:COUNTlog``, evenly spaced in log.

    Returns:
        The rates, ascending, each once; a spaced one is rounded to four digits, so that it can be typed.

    Raises:
        ValueError: it is neither, holds fewer than two rates, or one that is not positive.
    """
    if len(rates := positive_numbers(text)) < 2:
        raise ValueError("must be two or more positive rates, as in 0.001,0.003,0.01 or 0.0001:0.1:7log")
    return tuple(rates)
