"""timm's architectures: bare names, ``hf-hub:`` and ``local-dir:``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast, final, get_args

import timm
import torch
from safetensors import SafetensorError
from timm.data.config import resolve_data_config
from timm.models import is_model, resolve_model_input_args

from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.arguments import (
    Argument,
    known_arguments,
    refused_arguments,
    require_arguments,
    require_recorded,
)
from kdcli.models.classifiers import TimmClassifier
from kdcli.models.declared import INTERPOLATION, check_model_config
from kdcli.models.folder import CONFIG_FILE, WEIGHTS_FILE, require_model_folder
from kdcli.models.grammar import ModelSpec
from kdcli.models.hub import download_errors, snapshot
from kdcli.models.kinds import unknown_architecture
from kdcli.models.network import Classifier
from kdcli.models.weights import broken_file, read_shapes, refuse_differences, require_no_larger
from kdcli.reading import read_json
from kdcli.types import CropMode, Preprocess, Size


@final
class TimmArchitecture(Architecture):
    """An architecture of timm, with the pretrained configuration that its spec names.

    Args:
        spec: of kind timm, hf-hub, local-dir, or file with a timm architecture.

    Raises:
        NotFoundError: the folder, the hub's model, or the architecture it names is not there.
        BadDataError: the configuration cannot be read, or is not for RGB images.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._arguments: dict[str, Argument] = {}
        self._folder = spec.file if spec.kind == "local-dir" else None
        self._document: dict[str, Any] = {}
        if self._folder is not None:
            self._document = read_config(self._folder)
        elif spec.kind == "hf-hub":
            config = snapshot(spec.name, (CONFIG_FILE,), str(spec)) / CONFIG_FILE
            if not config.exists():
                raise NotFoundError(
                    f"'{spec}' on the hub is no timm model: it has no {CONFIG_FILE}",
                    "kd opens models in timm's layout.",
                )
            self._document = _read_document(config)
            check_model_config(self._document, config)
        resolved = self._resolve(None)
        self._config: dict[str, Any] = resolved["pretrained_cfg"]
        if self._config["input_size"][0] != 3:
            raise BadDataError(
                f"'{spec}' takes images of {self._config['input_size'][0]} channels", "kd's have 3."
            )
        if recorded := self._document.get("model_args"):
            self._require_recorded(recorded, resolved)

    @property
    def name(self) -> str:
        """See the base."""
        return str(self._config["architecture"])

    def configure(self, arguments: Mapping[str, Argument]) -> None:
        """See the base."""
        if arguments:
            with torch.device("meta"):
                network = timm.create_model(**self._resolve(None))
            require_arguments(arguments, known_arguments(type(network)), self.name)
        self._arguments = dict(arguments)

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base."""
        return self._create(image_size, pretrained=False, num_classes=num_classes)

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base."""
        if not any(self._config.get(key) for key in ("file", "url", "hf_hub_id", "state_dict")):
            raise NotFoundError(
                f"timm has no pretrained weights for '{self._spec}'",
                "Choose a name from timm.list_pretrained(), or give ARCH@FILE.safetensors.",
            )
        shapes = read_shapes(self._folder / WEIGHTS_FILE) if self._folder else {}
        if self._folder:
            self._require_covered(shapes, self._folder / WEIGHTS_FILE)
        with self._loading_errors():
            classifier = self._create(image_size, pretrained=True)
        if self._folder:
            self._check_loaded(classifier, shapes, self._folder / WEIGHTS_FILE)
        return classifier

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base."""
        return _preprocess(self._config, image_size, self._spec)

    def class_names(self) -> tuple[str, ...] | None:
        """See the base."""
        names = self._config.get("label_names")
        if isinstance(names, dict):  # timm also allows {index: name}
            names = [names.get(str(index)) for index in range(len(names))]
        if not names or len(names) != self._config["num_classes"]:
            return None
        return tuple(names) if all(isinstance(name, str) for name in names) else None

    def _resolve(self, image_size: Size | None) -> dict[str, Any]:
        name = str(self._spec) if self._spec.kind in ("hf-hub", "local-dir") else self._spec.name
        network = download_errors(name) if self._spec.kind == "hf-hub" else nullcontext()
        with network, self._config_errors():
            resolved: dict[str, Any] = resolve_model_input_args(
                name, {"img_size": _sides(image_size)} if image_size else {}
            )
        return resolved

    def _require_recorded(self, recorded: Mapping[str, object], resolved: Mapping[str, Any]) -> None:
        """Refuse model_args that are not the architecture's own, before timm's functions see them."""
        where = f"the {CONFIG_FILE} of '{self._spec}'"
        with torch.device("meta"):
            plain = timm.create_model(resolved["model_name"])
            require_recorded(recorded, known_arguments(type(plain)), where, self.name)
            try:
                timm.create_model(**resolved)
            except Exception as error:  # whatever the architecture makes of values that it does not take
                raise BadDataError(
                    f"{where}: model_args: a {self.name} cannot be built with {str(recorded)[:200]}:"
                    f" {str(error)[:200] or type(error).__name__}",
                    "Export the model anew.",
                ) from error

    def _require_covered(self, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
        """Refuse a configuration of a network that is far larger than its weights, before it takes memory."""
        with torch.device("meta"):
            require_no_larger(timm.create_model(**self._resolve(None)), shapes, path)

    def _create(
        self, image_size: Size | None, pretrained: bool, num_classes: int | None = None
    ) -> Classifier:
        arguments = self._resolve(image_size) | self._arguments
        if num_classes is not None:
            arguments["num_classes"] = num_classes
        try:
            return TimmClassifier(timm.create_model(**arguments, pretrained=pretrained))
        except (TypeError, AssertionError, ValueError, KeyError, AttributeError) as error:
            if self._arguments:
                raise refused_arguments(self._arguments, str(self._spec), error) from error
            if image_size is None or not isinstance(error, TypeError | AssertionError):
                raise
            raise UsageError(
                f"'{self._spec}' cannot be built for {_sides(image_size)} pixels: {error or 'its size is fixed'}",
                "Leave --image-size out, or choose one that suits.",
            ) from error

    def _check_loaded(self, classifier: Classifier, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
        """Refuse what timm left random: it loads loosely when a configuration disagrees with itself."""
        if classifier.num_classes != self._config["num_classes"]:
            raise BadDataError(
                f"'{path.with_name(CONFIG_FILE)}' contradicts itself: num_classes is"
                f" {self._config['num_classes']}, but the model it describes has {classifier.num_classes}",
                "Export the model anew.",
            )
        require_width(self._document.get("num_features"), classifier, path.with_name(CONFIG_FILE))
        wanted = {name: tuple(tensor.shape) for name, tensor in classifier.plain.state_dict().items()}
        # Foreign names are remapped by timm, which then checks them; a mere subset would pass there for
        # the architectures that timm itself loads loosely.
        if shapes.keys() < wanted.keys():
            refuse_differences(wanted, shapes, path)

    @contextmanager
    def _config_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
            unknown = reason.removeprefix("Unknown model (").removesuffix(")")
            if unknown != reason and not is_model(unknown):
                raise unknown_architecture(unknown, str(self._spec)) from error
            raise BadDataError(
                f"the {CONFIG_FILE} of '{self._spec}' cannot be used: {reason}",
                "It must be in timm's layout.",
            ) from error

    @contextmanager
    def _loading_errors(self) -> Iterator[None]:
        network = nullcontext() if self._folder else download_errors(str(self._spec))
        try:
            with network:
                yield
        except SafetensorError as error:
            raise broken_file(self._folder or Path(str(self._spec)), error) from error
        except KdError:
            raise
        except (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            if self._arguments:
                raise self._another_architecture(" ".join(lines[:3])[:300]) from error
            raise BadDataError(
                f"the weights of '{self._spec}' do not fit the architecture: {' '.join(lines[:3])[:300]}",
                f"Check that {CONFIG_FILE} and the weights belong together.",
            ) from error

    def _another_architecture(self, reason: str) -> BadDataError:
        """Arguments that ask for layers which the weights do not have."""
        told = ",".join(f"{name}={str(value).lower()}" for name, value in self._arguments.items())
        norm = "fc_norm" in reason and "fc_norm" not in self._arguments
        return BadDataError(
            f"'{self._spec}': {told} changes the architecture, and its weights do not fit the architecture any more: "
            f"{reason}",
            "Keep the norm before the pooling, where it was trained: add the argument fc_norm=false (--teacher-arg, or "
            "in the [] of the model)."
            if norm
            else "Leave out the argument that asks for other layers.",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a ``local-dir:``; says what is wrong with it before timm looks for something else to load."""
    require_model_folder(folder)
    config = folder / CONFIG_FILE
    document = _read_document(config)
    if "model_type" in document and "architecture" not in document:
        raise BadDataError(
            f"'{config}' is transformers', not timm's", f"As a teacher it is transformers/{folder}."
        )
    check_model_config(document, config)
    if not (folder / WEIGHTS_FILE).exists():
        raise NotFoundError(
            f"'{folder}' holds no {WEIGHTS_FILE}", "Save it as safetensors; kd loads no pickles."
        )
    return document


def _read_document(config: Path) -> dict[str, Any]:
    document = read_json(config, hint="Export the model anew.")
    if not isinstance(document, dict):
        raise BadDataError(f"'{config}' is not a JSON object", "Export the model anew.")
    return document


def require_width(recorded: object, classifier: Classifier, where: Path) -> None:
    """Refuse a num_features that the network does not have.

    Args:
        recorded: what config.json says; None: nothing.
        classifier: the network; one whose features cannot be had is recorded as 0.
        where: the file.

    Raises:
        BadDataError: it is no number, or another one.
    """
    plain: Any = classifier.plain
    widths = {getattr(plain, name, None) for name in ("num_features", "head_hidden_size")}
    widths |= {getattr(classifier.head, "in_features", None), getattr(classifier.head, "in_channels", None)}
    known = sorted({0} | {width for width in widths if isinstance(width, int)})
    if recorded is not None and (isinstance(recorded, bool) or recorded not in known):
        raise BadDataError(
            f"'{where}': num_features is {str(recorded)[:40]}, but the model it describes has {known[-1]}",
            "Export the model anew.",
        )


def preprocess_of(network: torch.nn.Module | None, image_size: Size | None = None) -> Preprocess:
    """How a network that timm made wants its pixels; None: timm's defaults.

    Raises:
        UsageError: it says nothing of them.
    """
    defaults = {"input_size": (3, 224, 224)}  # an empty configuration is refused
    config = defaults if network is None else getattr(network, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        raise UsageError(
            f"{type(network).__name__} does not say how it wants its pixels, as networks of timm do",
            "Give the side in pixels, or a kdcli.types.Preprocess.",
        )
    return _preprocess(config, image_size, "timm's defaults" if network is None else type(network).__name__)


def _preprocess(config: Mapping[str, Any], image_size: Size | None, what: object) -> Preprocess:
    resolved = resolve_data_config(pretrained_cfg=config)  # type: ignore[no-untyped-call]
    interpolation, mode = resolved["interpolation"], resolved["crop_mode"]
    if interpolation not in INTERPOLATION:
        raise BadDataError(f"'{what}' wants the filter '{interpolation}'", "Set a known one in its config.")
    if mode not in get_args(CropMode):
        raise BadDataError(
            f"'{what}' wants the crop mode '{mode}'",
            f"Set a known one in its config: {', '.join(get_args(CropMode))}.",
        )
    _, height, width = resolved["input_size"]
    return Preprocess(
        size=image_size or (int(height), int(width)),
        interpolation=INTERPOLATION[interpolation],
        mean=_three(resolved["mean"]),
        std=_three(resolved["std"]),
        crop_fraction=float(resolved["crop_pct"]),
        crop_mode=mode,
    )


def _sides(size: Size) -> int | Size:
    """A size as timm's command line gives it: one number for a square."""
    return size[0] if size[0] == size[1] else size


def _three(values: Any) -> tuple[float, float, float]:
    return cast("tuple[float, float, float]", tuple(float(value) for value in values))
