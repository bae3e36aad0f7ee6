"""What is probed: cached teachers, models and runs of ``kd train-student``, by name."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Float, Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.shelf import Stage
from kdcli.data.sources import ImageData
from kdcli.errors import NotFoundError, UsageError, nearest
from kdcli.geometry import EvalGeometry
from kdcli.models.grammar import ModelSpec
from kdcli.probing.config import ProbeConfig

if TYPE_CHECKING:
    from kdcli.models.spec import Model
    from kdcli.probing.features import ArrayName

EVAL_VIEW = 0
EXPORT = "export"
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._+/-]*)=(.+)", re.DOTALL)


class Representation(ABC):
    """One representation.

    Args:
        name: in the results.
        spec: canonical model string.
    """

    def __init__(self, name: str, spec: str) -> None:
        self.name, self.spec = name, spec

    @property
    @abstractmethod
    def weights(self) -> str:
        """SHA-256 of its weights."""

    @abstractmethod
    def usable(self, data: ImageData, array: "ArrayName") -> Int64[np.ndarray, " m"]:
        """Rows of ``data`` whose ``array`` can be had; reads no image.

        Raises:
            CacheMissingError: images that are not cached; the hint fills the cache.
        """

    @abstractmethod
    def outputs(self, data: ImageData, array: "ArrayName", title: str) -> Float[np.ndarray, "n _"]:
        """``features`` or ``logits`` of images.

        Raises:
            BadDataError: an image cannot be decoded.
            IdentityError: images changed since they were cached.
        """

    @abstractmethod
    def class_names(self) -> tuple[str, ...] | None:
        """Of its own classifier, where known."""

    @abstractmethod
    def start(self) -> str:
        """Model spec to fine-tune from.

        Raises:
            IdentityError: a cached teacher is not what it was when it was cached.
        """

    def close(self) -> None:
        """Forget what takes memory; a cached teacher has nothing open."""
        return


@final
class CachedTeacher(Representation):
    """A teacher whose outputs are read.

    Args:
        caches: that hold it.
        record: of the teacher.
    """

    def __init__(self, caches: CacheSet, record: TeacherRecord) -> None:
        super().__init__(record.name, record.spec)
        self._caches, self._record = caches, record

    @property
    def weights(self) -> str:
        """See the base."""
        return self._record.weights

    def usable(self, data: ImageData, array: "ArrayName") -> Int64[np.ndarray, " m"]:
        """All but bad images that the cache dropped; see the base."""
        rows = self._caches.rows_of(data, check_content=False)
        return np.flatnonzero(self._caches.require({self.name: [array]}, rows, [EVAL_VIEW], None))

    def outputs(self, data: ImageData, array: "ArrayName", title: str) -> Float[np.ndarray, "n _"]:
        """See the base; no forward."""
        rows = self._caches.rows_of(data)  # compares the bytes of the images, now only of those that are used
        self._caches.require({self.name: [array]}, rows, [EVAL_VIEW], None)
        return self._caches.gather(self.name, array, rows, EVAL_VIEW)

    def class_names(self) -> tuple[str, ...] | None:
        """See the base."""
        return self._record.class_names

    def start(self) -> str:
        """Its spec, once its weights are known to be those that were cached."""
        from kdcli.training.start import require_as_cached

        require_as_cached(self._record)
        return self._record.spec


@final
class RunModel(Representation):
    """A model that is run over the images.

    Args:
        name: in the results; None: its spec.
        spec: of the model.
        config: device, batch size, workers.
    """

    def __init__(self, name: str | None, spec: ModelSpec, config: ProbeConfig) -> None:
        super().__init__(name or str(spec), str(spec))
        self.parsed, self._config = spec, config
        self._model: Model | None = None

    @property
    def model(self) -> "Model":
        """The open model."""
        if self._model is None:
            # torch takes seconds to load, and a cache needs none
            from kdcli.models.spec import open_model
            from kdcli.probing.features import as_shown

            self._model = as_shown(open_model(self.parsed), self._config)
        return self._model

    @property
    def weights(self) -> str:
        """See the base."""
        from kdcli.models.network import weights_sha256

        return weights_sha256(self.model.network)

    def usable(self, data: ImageData, array: "ArrayName") -> Int64[np.ndarray, " m"]:
        """All."""
        return np.arange(len(data))

    def outputs(self, data: ImageData, array: "ArrayName", title: str) -> Float[np.ndarray, "n _"]:
        """See the base."""
        from kdcli.probing.features import model_outputs

        return model_outputs(self.model, data, self._config, array, title)

    def class_names(self) -> tuple[str, ...] | None:
        """See the base."""
        return self.model.class_names

    def start(self) -> str:
        """Its spec."""
        return self.spec

    def close(self) -> None:
        """See the base."""
        self._model = None


def open_representations(config: ProbeConfig) -> list[Representation]:
    """All representations, teachers first; no model is opened yet.

    Raises:
        UsageError: none, one without its cache, a cache without a teacher, or two of one name.
        NotFoundError: a teacher, model or run that is not there.
        CacheMissingError, CorruptError, IdentityError: a cache is not there, or is not what it says.
    """
    _require_some(config)
    found: list[Representation] = []
    if config.teacher:
        caches = CacheSet.open(config.cache, config.verify, Stage.told(gigabytes=config.stage_limit))
        records = [caches.teacher(name) for name in config.teacher]
        if config.eval_geometry is not None:
            _require_shown(records, config.eval_geometry)
        found += [CachedTeacher(caches, record) for record in records]
    for word in config.model:
        found += _read_word(word, config)
    for each in found:
        if sum(other.name == each.name for other in found) > 1:
            raise UsageError(
                f"two representations are called '{each.name}'", "Give each once, and name models: NAME=SPEC"
            )
    return found


def _require_shown(records: Sequence[TeacherRecord], asked: str) -> None:
    """Refuse cached teachers that were shown something else than the models will be."""
    geometry = EvalGeometry.parse(asked)
    for record in records:
        seen = EvalGeometry.of(record.preprocess)
        same = seen == geometry if geometry.mode is not None else (seen.asked or "own") == str(geometry)
        if not same:
            raise UsageError(
                f"--eval-geometry {asked}, but '{record.name}' was cached with {seen.asked or f'its own, {seen}'}",
                f"Leave --eval-geometry out, or cache the teacher with --eval-geometry {asked} in another cache.",
            )


def _require_some(config: ProbeConfig) -> None:
    if not config.model and not config.cache and not config.teacher:
        raise UsageError(
            "there is no representation: give either --model or --cache with --teacher, or both",
            "For example --cache flowers.kd --teacher resnet50, or --model hf-hub:timm/resnet50.a1_in1k.",
        )
    if bool(config.cache) != bool(config.teacher):
        missing = "--teacher NAME" if config.cache else "--cache PATH"
        raise UsageError(f"a cached representation needs {missing} too", "Give both --cache and --teacher.")


def _read_word(word: str, config: ProbeConfig) -> Iterator[RunModel]:
    named = None if Path(word).expanduser().exists() else _NAMED.fullmatch(word)
    name, text = (named[1], named[2]) if named else (None, word)
    folder = Path(text).expanduser()
    if re.match(r"[a-z][a-z-]+:", text) or not folder.is_dir():
        yield RunModel(name, ModelSpec.parse(text), config)
        return
    runs = [folder] if _model_in(folder) else sorted(each for each in folder.iterdir() if _model_in(each))
    if not runs:
        raise NotFoundError(
            f"{folder} holds neither a finished run nor an export, nor do the folders in it",
            "Name a folder that kd train-student wrote, its export, or a folder of such folders.",
        )
    if name is not None and len(runs) > 1:
        raise UsageError(f"{word}: one name for {len(runs)} runs", f"Give {text} without a name.")
    for run in runs:
        called = name or (text.rstrip("/") if run == folder else f"{text.rstrip('/')}/{run.name}")
        yield RunModel(called, ModelSpec("local-dir", "", _model_in(run)), config)


def _model_in(folder: Path) -> Path | None:
    """The exported model in a run, or the folder itself where it is one."""
    for place in (folder / EXPORT, folder):
        if (place / "config.json").is_file() and (place / "model.safetensors").is_file():
            return place.absolute()
    return None


def baseline_of(config: ProbeConfig, names: list[str]) -> str:
    """The representation that the others are compared with.

    Raises:
        NotFoundError: none is called so.
    """
    if config.baseline is None:
        return names[0]
    if config.baseline not in names:
        raise NotFoundError(
            f"--baseline {config.baseline}: no representation is called that.{nearest(config.baseline, names)}",
            f"The representations are {', '.join(names)}.",
        )
    return config.baseline
