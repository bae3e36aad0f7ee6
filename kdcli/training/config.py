"""What training can be told: options of every run, and those of the chosen method."""

from collections.abc import Iterable, Mapping
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

from kdcli.errors import UsageError, nearest
from kdcli.methods.options import MethodOptions
from kdcli.options.fields import StepConfig, option
from kdcli.options.grids import positive_numbers
from kdcli.registry import METHODS, is_object_path
from kdcli.types import AmpName


@final
class StudentConfig(StepConfig):
    """``kd train-student``. Flat outside: an option of the method is given and written beside all others.

    ``None`` means: the method's default (printed and recorded).
    """

    command: ClassVar[str] = "train-student"

    data: str | tuple[str, ...] = option(
        ...,
        "Data set to train on: SOURCE[@key=value,...]; several as NAME=DATA each.",
        panel="Data",
        positional=True,
        shared=True,
    )
    cache: tuple[Path, ...] = option(
        (), "Cache folder; repeatable.", panel="Data", metavar="PATH", shared=True
    )
    test: str | tuple[str, ...] | None = option(
        None,
        "Data set to test on after training; of several DATA: NAME=DATA, repeatable.",
        panel="Data",
        shared=True,
    )
    validation: float | None = option(
        None,
        "Set this share of each class aside; judge every epoch on it.",
        panel="Data",
        gt=0,
        lt=1,
        metavar="SHARE",
        shared=True,
    )
    data_root: Path | None = option(
        None, "Folder of torch/ and hfds/ data sets, and of relative folders.", panel="Data", shared=True
    )
    download: bool = option(
        False, "Allow a data set to be downloaded.", panel="Data", mechanical=True, shared=True
    )
    allow_partial: bool = option(
        False, "Train on the cached rows only, and say how many are missing.", panel="Data", shared=True
    )
    verify: Literal["never", "once", "always"] = option(
        "once",
        "Check the cache's checksums: never, once (default) or always.",
        panel="Data",
        mechanical=True,
        shared=True,
    )

    method: str = option(
        ..., "What the student learns from; see kd methods.", panel="Teachers", complete="method"
    )
    teacher: tuple[str, ...] = option(
        (),
        "Cached teacher to use; default: all, or the ranking's. Repeatable.",
        panel="Teachers",
        complete="teacher",
        metavar="NAME",
    )
    ranking: str | None = option(
        None, "Ranking JSON of kd rank-sources; - reads standard input.", panel="Teachers"
    )
    teacher_view: Literal["same", "eval"] | None = option(
        None,
        "same: teachers saw the student's view; eval: the clean view 0. Default: the method's, mostly same.",
        panel="Teachers",
        shared=True,
    )
    sequential: Literal["ascending", "descending", "random", "given"] | None = option(
        None,
        "One stage a teacher, each from the last one's student: ascending or descending accuracy, random, or given.",
        panel="Teachers",
        metavar="ORDER",
    )

    student: str = option(..., "Model spec of the student.", panel="Student", complete="student")
    init: str | None = option(
        None,
        "pretrained, random, xavier, nearest-source or a SPEC to start from; default: pretrained for local-dir:, "
        "hf-hub: and ARCH@FILE, random for bare names.",
        panel="Student",
    )
    freeze: Literal["backbone"] | None = option(
        None, "backbone: train the heads only, on features of the frozen start.", panel="Student"
    )
    train_from: str | None = option(
        None,
        "Keep the layers up to TAP as they start, and read their maps from the cache.",
        panel="Student",
        min_length=1,
        metavar="TAP",
    )
    image_size: int | None = option(
        None, "Input size in pixels; default: the student's own.", panel="Student", ge=8
    )
    bn: Literal["train", "frozen", "frozen-affine"] | None = option(
        None,
        "BatchNorm: train, frozen (statistics) or frozen-affine (scale and shift as well).",
        panel="Student",
    )
    compile: bool = option(False, "Run the student through torch.compile.", panel="Student", mechanical=True)

    epochs: int | None = option(
        None, "Passes over the data; default: the method's.", panel="Optimisation", ge=1, shared=True
    )
    batch_size: int | None = option(
        None, "Images per step; default: the method's.", panel="Optimisation", ge=1, shared=True
    )
    lr: float | None = option(
        None,
        "Peak learning rate (of the heads, where groups differ); default: the method's.",
        panel="Optimisation",
        gt=0,
    )
    lr_grid: str | None = option(
        None,
        "Choose among 0.001,0.003,0.01 or 0.0001:0.1:7log on the validation split.",
        panel="Optimisation",
        metavar="RATES",
    )
    backbone_lr_scale: float | None = option(
        None, "Backbone learning rate as a share of --lr.", panel="Optimisation", ge=0
    )
    optimizer: str | None = option(None, "timm optimiser; default: the method's.", panel="Optimisation")
    weight_decay: float | None = option(
        None, "Weight decay; default: the method's.", panel="Optimisation", ge=0
    )
    schedule: Literal["constant", "cosine", "step", "one-cycle"] | None = option(
        None, "constant, cosine, step or one-cycle; default: the method's.", panel="Optimisation"
    )
    milestones: tuple[float, ...] | None = option(
        None,
        "Shares of the training at which --schedule step falls tenfold, e.g. 0.5,0.8.",
        panel="Optimisation",
        comma=True,
        metavar="SHARES",
    )
    warmup: float | None = option(
        None, "Share of the training in which the rate rises.", panel="Optimisation", ge=0, lt=1
    )
    accumulate: int | None = option(
        None,
        "Compute each step's images in this many pieces, adding up gradients; less memory.",
        panel="Optimisation",
        ge=1,
    )
    clip_norm: float | None = option(
        None, "Scale the gradient of all parameters down to this norm.", panel="Optimisation", gt=0
    )
    label_smoothing: float | None = option(
        None, "Share of each label that is spread evenly over all classes.", panel="Optimisation", ge=0, lt=1
    )
    ema: float | None = option(
        None,
        "Decay of a moving average of the weights; it is tested and exported.",
        panel="Optimisation",
        gt=0,
        lt=1,
    )
    select: Literal["last", "best", "best-on-test"] = option(
        "last",
        "Epoch to export: last (default), best (on the validation split) or best-on-test.",
        panel="Optimisation",
    )
    amp: AmpName = option(
        "off", "Mixed precision: off (default), bf16 or fp16.", panel="Optimisation", shared=True
    )

    recipe: str | None = option(
        None,
        "Recipe of live training views; with a cache, the cache's.",
        panel="Views",
        complete="recipe",
        shared=True,
    )
    seed: int = option(0, "Seed of initialisation and dropout (default 0).", panel="Views", ge=0)
    data_seed: int = option(0, "Seed of order and views (default 0).", panel="Views", ge=0, shared=True)

    out: Path = option(..., "Output folder of the run.", panel="Run", mechanical=True)
    device: str = option(
        "auto", "auto (default), cpu, cuda or cuda:N.", panel="Run", mechanical=True, shared=True
    )
    workers: int | None = option(
        None,
        "Decode processes; default: the processors of this job.",
        panel="Run",
        ge=0,
        mechanical=True,
        shared=True,
    )
    stage: Path | None = option(
        None,
        "Copy what is read of the cache to this local disk first.",
        panel="Run",
        mechanical=True,
        metavar="DIR",
        shared=True,
    )
    prewarm: bool = option(
        False, "Read the cache's files into the page cache first.", panel="Run", mechanical=True, shared=True
    )
    resident: Literal["ram", "gpu"] | None = option(
        None,
        "Hold the teachers' outputs in memory (ram) or on the training device (gpu).",
        panel="Run",
        mechanical=True,
        shared=True,
    )
    tracker: tuple[str, ...] = option(
        (),
        "Log epochs to tensorboard, wandb, mlflow, ... too; a tracker of accelerate. Repeatable.",
        panel="Run",
        mechanical=True,
    )
    overwrite: bool = option(
        False, "Start anew where --out holds another run.", panel="Run", mechanical=True, shared=True
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
        own = _options_of(str(name)).model_fields if _exists(name) else {}
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
            raise ValueError(f"there is no such method.{nearest(name, tuple(METHODS))} kd methods lists them")
        return name

    @field_validator("options", mode="before")
    @classmethod
    def _by_method(cls, given: Any, info: ValidationInfo) -> Any:
        name = info.data.get("method")  # absent where it is wrong, which is told already
        return MethodOptions() if name is None else _options_of(name).model_validate(given)

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        document: dict[str, Any] = handler(self)
        return {**document, **document.pop("options"), **document.pop("aside")}

    @classmethod
    def every_option(cls) -> dict[str, FieldInfo]:
        """All options by name, those of every registered method included."""
        methods = {
            name: field for method in METHODS for name, field in _options_of(method).model_fields.items()
        }
        own = {name: field for name, field in cls.model_fields.items() if name not in ("options", "aside")}
        return {**methods, **own}

    def items(self) -> Iterable[tuple[str, Any, FieldInfo]]:
        """Name, value and declaration of every option, the method's after the others."""
        for model in (self, self.options):
            for name, field in type(model).model_fields.items():
                if name not in ("options", "aside"):
                    yield name, getattr(model, name), field

    def changed(self, **changes: Any) -> Self:
        """The same with other options, the method's among them; values are taken as they are."""
        own = {name: value for name, value in changes.items() if name in type(self.options).model_fields}
        core = {name: value for name, value in changes.items() if name not in own}
        if own:
            core["options"] = self.options.model_copy(update=own)
        return self.model_copy(update=core)

    # --- values -------------------------------------------------------------------------------

    @field_validator("lr_grid")
    @classmethod
    def _known_rates(cls, text: str | None) -> str | None:
        if text is not None:
            learning_rates(text)
        return text

    @field_validator("milestones")
    @classmethod
    def _rising_shares(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and not (
            shares == tuple(sorted(set(shares))) and all(0 < share < 1 for share in shares)
        ):
            raise ValueError("milestones are shares of the training between 0 and 1, each after the last")
        return shares


def _exists(name: object) -> bool:
    return isinstance(name, str) and (name in METHODS or is_object_path(name))


def _options_of(name: str) -> type[MethodOptions]:
    """The options of a method.

    Raises:
        UsageError: the object is no method.
        NotFoundError: there is no such module or object.
    """
    method = METHODS.find(name)
    kind = getattr(method, "Options", None)
    if not (isinstance(kind, type) and issubclass(kind, MethodOptions)):
        raise UsageError(
            f"{name} is no method but a {type(method).__name__}",
            "Give an instance of a class that derives from kdcli.methods.base.Method.",
        )
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
