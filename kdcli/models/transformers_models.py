"""transformers' vision models as teachers: ``transformers/DIR-or-ID``. Safetensors only; no code of a model is run.

A checkpoint of an image classifier gives logits, and as features what its last layer gets. Any other gives features:
``get_image_features`` where it has that (CLIP and its kin), else ``pooler_output``, else the last hidden state's class
token, else its mean over places.
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from kdcli.errors import BadDataError, KdError, MissingExtraError, NotFoundError, UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.grammar import ModelSpec, only_a_teacher
from kdcli.models.hidden_states import LAST_HIDDEN, as_map, catching, pooled_how
from kdcli.models.hub import snapshot
from kdcli.models.image_processors import preprocess_of
from kdcli.models.network import Classifier, looking, nearly_equal, synthetic_image
from kdcli.outputs import MAPS
from kdcli.reading import DOCUMENT_BYTES, read_json, require_name, require_regular
from kdcli.types import Preprocess, Size

_FILES: Final = ("*.json", "model*.safetensors")
LOCAL: Final[dict[str, Any]] = {"local_files_only": True, "trust_remote_code": False}
"""How everything of transformers is opened."""
_CLASSIFIERS: Final = ("ForImageClassification", "ForImageClassificationWithTeacher")
_BOOKKEEPING: Final = frozenset(
    {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version"}
)
"""What a config.json says beside how the network computes."""
_LOADING: Final = frozenset(
    {
        "adapter_path", "cache_dir", "checkpoint_path", "file", "hf_hub_id", "pretrained", "pretrained_cfg",
        "pretrained_cfg_overlay", "pretrained_strict", "state_dict", "transformers_weights", "url",
        "use_pretrained_backbone",
    }
)  # fmt: skip
"""What a config.json, in whatever depth, may not say: it makes a library load or fetch other weights."""


@final
class TransformersArchitecture(Architecture):
    """A checkpoint in transformers' layout, in a folder or on the hub.

    Args:
        spec: of kind transformers.

    Raises:
        MissingExtraError: transformers is not installed.
        NotFoundError: the folder or the hub's model is not there.
        BadDataError: it is timm's, or transformers cannot read its configuration.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._library = library(spec)
        self._folder = checkpoint(spec, _FILES)
        self._document = self._read_config()
        with self._errors("config.json"):
            self._config = self._library.AutoConfig.from_pretrained(self._folder, **LOCAL)

    def _read_config(self) -> dict[str, Any]:
        path = self._folder / "config.json"
        document = read_json(path, hint="Save the model anew.")
        if not isinstance(document, dict) or "model_type" not in document:
            timm = isinstance(document, dict) and "pretrained_cfg" in document
            place = f"local-dir:{self._spec.file}" if self._spec.file else f"hf-hub:{self._spec.name}"
            raise BadDataError(
                f"'{path}' is no configuration of transformers: it has no model_type",
                f"It is timm's: write {place}" if timm else "Save the model anew with save_pretrained(DIR).",
            )
        _require_own_weights(document, path)
        return document

    @property
    def name(self) -> str:
        """See the base: the class of the network."""
        return f"transformers/{(self._config.architectures or [self._config.model_type])[0]}"

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base: it has no other weights than its own.

        Raises:
            UsageError: always.
        """
        raise only_a_teacher(self._spec)

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base."""
        classifies = self.name.endswith(_CLASSIFIERS)
        kind = self._library.AutoModelForImageClassification if classifies else self._library.AutoModel
        network, missing = self._load(kind, {})
        if missing and all(name.startswith("pooler.") for name in missing):
            # A checkpoint of another task has no pooler; a random one would give random features.
            network, missing = self._load(kind, {"add_pooling_layer": False})
        if missing:
            raise BadDataError(
                f"the weights in '{self._folder}' do not fit {type(network).__name__}: {len(missing)} tensors"
                f" missing ({', '.join(sorted(missing)[:3])})",
                "Check that config.json and the weights belong together.",
            )
        settings = {key: value for key, value in self._document.items() if key not in _BOOKKEEPING}
        return TransformersClassifier(network, self._config.num_labels if classifies else 0, settings)

    def _load(self, kind: Any, arguments: dict[str, Any]) -> tuple[nn.Module, Collection[str]]:
        with self._errors("model.safetensors"):
            network, report = kind.from_pretrained(
                self._folder,
                config=self._config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **LOCAL,
                **arguments,
            )
        return network, report["missing_keys"]

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base: its image processor's."""
        with self._errors("preprocessor_config.json"):
            processor = self._library.AutoImageProcessor.from_pretrained(self._folder, **LOCAL)
            own = preprocess_of(processor.to_dict(), f"the image processor of '{self._spec}'")
        return own if image_size is None else replace(own, size=image_size)

    def class_names(self) -> tuple[str, ...] | None:
        """See the base: none where they are transformers' numbers, or one is there twice (ImageNet's cranes)."""
        names = [str(self._config.id2label.get(number)) for number in range(self._config.num_labels)]
        if not self.name.endswith(_CLASSIFIERS) or len(set(names)) < len(names):
            return None
        return None if names == [f"LABEL_{number}" for number in range(len(names))] else tuple(names)

    def _errors(self, file: str) -> AbstractContextManager[None]:
        return reading(self._spec, file)


def library(spec: ModelSpec) -> Any:
    """The package transformers.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"'{spec}' needs the package transformers, which is not installed",
            "pip install 'kdcli[transformers]'",
        ) from error
    return transformers


def checkpoint(spec: ModelSpec, patterns: Sequence[str]) -> Path:
    """The folder of a model: the one that its spec names, or that of the hub's files of these patterns.

    Raises:
        NotFoundError: there is none, or it holds no config.json.
        BadDataError: a file of it is no regular one, or names weights elsewhere.
    """
    folder = spec.file or snapshot(spec.name, patterns)
    if not (folder / "config.json").is_file():
        raise NotFoundError(
            f"'{spec}' is no model of transformers: there is no '{folder / 'config.json'}'",
            "Save the model there with save_pretrained(DIR), or check the path.",
        )
    for pattern in patterns:
        for path in folder.glob(pattern):
            require_regular(path, DOCUMENT_BYTES if path.suffix != ".safetensors" else None)
    if (folder / "adapter_config.json").exists():
        raise BadDataError(
            f"'{folder}' holds an adapter (adapter_config.json), whose network is elsewhere",
            "Merge it into its network, and save that.",
        )
    for index in folder.glob("model*.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise BadDataError(f"'{index}': weight_map: names no files", "Save the model anew.")
        for name in set(shards.values()):
            require_name(name, f"'{index}'", "weight_map")
    return folder


def _require_own_weights(document: Any, path: Path) -> None:
    parts = list(document.values()) if isinstance(document, dict) else document
    for name in document if isinstance(document, dict) else ():
        if name in _LOADING and document[name]:
            raise BadDataError(
                f"'{path}': {name} loads other weights than the model's own", f"Remove {name} from it."
            )
    for part in parts:
        if isinstance(part, dict | list):
            _require_own_weights(part, path)


@contextmanager
def reading(spec: ModelSpec, file: str) -> Iterator[None]:
    """One line for what transformers raises while it reads ``file``, and nothing on stderr.

    Raises:
        NotFoundError: it is not there, or in another format.
        BadDataError: it is damaged, or nothing that the version installed here knows.
    """
    logging: Any = library(spec).utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except KdError:
        raise
    except SafetensorError as error:
        raise BadDataError(f"{file} of '{spec}' is damaged: {error}", "Copy or download it again.") from error
    except OSError as error:
        raise NotFoundError(
            f"'{spec}' has no {file} that transformers can read: {_line(error)}",
            "Save all parts there with save_pretrained(DIR); kd loads no pickles.",
        ) from error
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise BadDataError(
            f"transformers cannot open the {file} of '{spec}': {_line(error)}",
            "It must be of a kind that the transformers installed here knows; no code of a model is run.",
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@final
class TransformersClassifier(Classifier):
    """A network of transformers: runs whole, logits and features in one forward.

    Args:
        network: takes ``pixel_values``.
        classes: width of its logits; 0: it gives features alone.
        settings: how it computes; with its weights, who it is.
    """

    def __init__(self, network: nn.Module, classes: int, settings: dict[str, Any]) -> None:
        super().__init__(network)
        self._classes, self._settings = classes, settings

    @property
    def head(self) -> nn.Module:
        """See the base: it runs whole."""
        return nn.Identity()

    @property
    def last_layer(self) -> nn.Module:
        """See the base."""
        found = getattr(self.plain, "classifier", None)
        return found if isinstance(found, nn.Module) else self.head

    @property
    def num_classes(self) -> int:
        """See the base."""
        return self._classes

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """See the base.

        Raises:
            UsageError: its logits do not come from one layer called ``classifier``.
        """
        return self.outputs(images, ("features",))["features"]

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """See the base."""
        return self.outputs(images, ("logits",))["logits"]

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base: logits, features, and the map of the last hidden state."""
        with catching(self.plain) as caught:
            found = self._classified(images) if self._classes else {"features": self._embedded(images)}
        if MAPS + LAST_HIDDEN in names:
            found[MAPS + LAST_HIDDEN] = as_map(self.plain, caught, images)
        if missing := [name for name in names if name not in found]:
            raise UsageError(
                f"a {type(self.plain).__name__} gives no {missing[0]}", f"Use --keep {' or '.join(found)}."
            )
        return {name: found[name] for name in names}

    @property
    def stages(self) -> tuple[str, ...]:
        """See the base: the last hidden state alone."""
        return (self.last_tap,) if self.last_tap else ()

    @functools.cached_property
    def last_tap(self) -> str:
        """See the base."""
        try:
            with looking(self) as image:
                self.outputs(image, (MAPS + LAST_HIDDEN,))
        except UsageError:
            return ""
        return LAST_HIDDEN

    @property
    def pooling(self) -> str:
        """See the base."""
        if not self.last_tap:
            return ""
        with looking(self) as image, catching(self.plain) as caught:
            given = self.outputs(image, ("features", MAPS + LAST_HIDDEN))
        return pooled_how(given["features"], caught[0], given[MAPS + LAST_HIDDEN])

    def _classified(self, images: Tensor) -> dict[str, Tensor]:
        last, caught = getattr(self.plain, "classifier", None), list[Tensor]()
        if not isinstance(last, nn.Module):
            return {"logits": self.plain(pixel_values=images).logits}
        handle = last.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        try:
            logits = self.plain(pixel_values=images).logits
        finally:
            handle.remove()
        flat = [found.flatten(1) for found in caught if found.flatten(1).shape[1] == found.shape[1]]
        return (
            {"logits": logits, "features": flat[0]} if len(flat) == len(caught) == 1 else {"logits": logits}
        )

    def _embedded(self, images: Tensor) -> Float[Tensor, "b d"]:
        plain: Any = self.plain
        embed = getattr(plain, "get_image_features", None)
        output = plain(pixel_values=images) if embed is None else embed(pixel_values=images)
        if isinstance(output, Tensor):
            return output
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        last: Tensor = output.last_hidden_state
        if last.ndim == 4:
            return last.mean(dim=(2, 3))
        with_token = any(
            name.endswith(("cls_token", "class_embedding")) for name, _ in plain.named_parameters()
        )
        return last[:, 0] if with_token else last.mean(dim=1)

    def check(self, size: Size, name: str) -> int:
        """See the base: the widths of its outputs, found with one synthetic image.

        Raises:
            UsageError: it takes no images, or none of that size; or the same image gives different outputs.
        """
        self.eval()
        self.size = size
        image = synthetic_image(size)
        wanted = ("logits",) if self._classes else ("features",)
        with torch.inference_mode():
            try:
                found = self._classified(image) if self._classes else self.outputs(image, wanted)
                again = self.outputs(image, wanted)
            except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"'{name}' takes no images of {size[0]} x {size[1]} pixels: {_line(error)}",
                    "Leave --image-size out; a teacher must be a vision model.",
                ) from error
        if not all(nearly_equal(found[output], again[output]) for output in wanted):
            raise UsageError(
                f"'{name}' gives the same image different outputs: a {type(self.plain).__name__} draws at random",
                "Choose a checkpoint of another class.",
            )
        if "features" not in found:
            self.without = "its logits do not come from one layer called classifier"
            return 0
        return found["features"].shape[1]

    @property
    def settings(self) -> Mapping[str, Any]:
        """See the base: its configuration, which says how the weights compute."""
        return self._settings
