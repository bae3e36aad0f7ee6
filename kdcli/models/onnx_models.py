"""ONNX graphs as teachers: ``onnx:FILE``, run by onnxruntime. No pickle is read, nothing is trained."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.console import console
from kdcli.errors import BadDataError, DeviceError, KdError, NotFoundError, UsageError
from kdcli.files import storage_errors
from kdcli.models.architectures import Architecture
from kdcli.models.declared import EXAMPLE, class_names, declared_preprocess
from kdcli.models.grammar import ModelSpec, only_a_teacher
from kdcli.models.network import Classifier, synthetic_image
from kdcli.models.onnx_graph import OnnxGraph, read_graph
from kdcli.reading import parse_json, read_bytes
from kdcli.types import Preprocess, Size

_METADATA_KEYS = ("kd", "pretrained_cfg")
_CUDA = "CUDAExecutionProvider"


@final
class OnnxArchitecture(Architecture):
    """An ONNX file with its preprocessing.

    That is FILE.json, with the fields of timm's pretrained_cfg (``input_size``, ``interpolation``, ``mean``,
    ``std``, ``crop_pct``, and ``label_names`` where known), or else the same JSON in the file's own metadata
    under ``kd`` or ``pretrained_cfg``.

    Args:
        spec: of kind onnx.

    Raises:
        NotFoundError: there is no such file, or nobody says how it wants its pixels.
        MissingExtraError: onnx or onnxruntime is not installed.
        BadDataError: the graph or its description cannot be used.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.file is None:
            raise UsageError(f"'{spec}' names no file", "Write onnx:FILE.")
        self._spec = spec
        self._graph = read_graph(spec.file)
        self._where, self._config = self._description()

    @property
    def name(self) -> str:
        """See the base."""
        return "onnx"

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base: it has no other weights than its own.

        Raises:
            UsageError: always.
        """
        raise only_a_teacher(self._spec)

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base."""
        classifier = OnnxClassifier(self._graph, str(self._spec))
        classifier.measure(self.preprocess(image_size).size)
        class_names({**self._config, "num_classes": classifier.num_classes}, self._where)
        return classifier

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base."""
        return declared_preprocess(self._config, self._where, image_size)

    def class_names(self) -> tuple[str, ...] | None:
        """See the base."""
        return class_names(self._config, self._where)

    def _description(self) -> tuple[str, dict[str, Any]]:
        """Where the preprocessing is written, and what is written there."""
        sidecar = self._graph.path.with_name(f"{self._graph.path.name}.json")
        if sidecar.exists():
            return f"'{sidecar}'", _json_object(_bytes_of(sidecar), f"'{sidecar}'")
        for key in _METADATA_KEYS:
            if key in self._graph.metadata:
                where = f"the metadata '{key}' of '{self._graph.path}'"
                return where, _json_object(self._graph.metadata[key].encode(), where)
        raise NotFoundError(
            f"'{self._spec}' does not say how it wants its pixels", f"Write '{sidecar}': {EXAMPLE}"
        )


def _bytes_of(path: Path) -> bytes:
    with storage_errors(path):
        return read_bytes(path)


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    document = parse_json(text, where, hint=f"For example {EXAMPLE}")
    if not isinstance(document, dict):
        raise BadDataError(f"{where} is not a JSON object", f"For example {EXAMPLE}")
    inner = document.get("pretrained_cfg")  # a config.json in timm's layout serves as it is
    return {**document, **inner} if isinstance(inner, dict) else document


@final
class OnnxClassifier(Classifier):
    """An ONNX graph that gives logits, and features where the input of its last linear layer was found.

    It runs on the device of its images where onnxruntime can, else on the CPU. Pickles carry the graph;
    external weights stay in their files.

    Args:
        graph: the file.
        name: what to call it in errors.
    """

    def __init__(self, graph: OnnxGraph, name: str) -> None:
        super().__init__(nn.Identity())  # nothing in it is torch's
        self._graph, self._name = graph, name
        self._widths: dict[str, int] = {}
        self._sessions: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": {}}

    @property
    def casts(self) -> bool:
        """See the base."""
        return False

    @property
    def head(self) -> nn.Module:
        """See the base."""
        return self.plain

    @property
    def num_classes(self) -> int:
        """See the base."""
        return self._widths["logits"]

    def digest(self) -> str:
        """See the base: of the file and its external weights."""
        return self._graph.sha256

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base."""
        values = {"logits": self._graph.logits, "features": self._graph.features}
        if unknown := [name for name in names if values.get(name) is None]:
            raise UsageError(f"'{self._name}' gives no {unknown[0]}", "Use --keep logits.")
        with _onnx_errors(self._name):
            found = self._run(self._session(images.device), images.detach(), [values[name] for name in names])
        return {
            name: torch.from_numpy(np.asarray(value, np.float32)).to(images.device)
            for name, value in zip(names, found, strict=True)
        }

    def _run(self, session: Any, images: Tensor, wanted: Sequence[str | None]) -> list[np.ndarray]:
        """Run where the session is. Images that are there are read where they lie; the small outputs come back."""
        there = images.device if _CUDA in session.get_providers() else torch.device("cpu")
        # Whatever memory format the images have, onnxruntime reads them in the order of their shape.
        batch = images.to(there, torch.float32).contiguous()
        ready = torch.get_device_module(there).Event()
        ready.record()
        ready.synchronize()  # onnxruntime has a stream of its own
        binding, place = session.io_binding(), (there.type, there.index or 0)
        binding.bind_input(self._graph.input, *place, np.float32, tuple(batch.shape), batch.data_ptr())
        for name in wanted:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        found: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return found

    def measure(self, size: Size) -> None:
        """Find the widths of logits and features on two synthetic images.

        Raises:
            BadDataError: the graph cannot be run on them, or gives no logits [b, C].
        """
        self.eval()
        names = ("logits", "features") if self._graph.features else ("logits",)
        for name, value in self.outputs(synthetic_image(size).repeat(2, 1, 1, 1), names).items():
            if value.ndim != 2 or value.shape[0] != 2:
                raise BadDataError(
                    f"'{self._name}' gives {name} of shape {tuple(value.shape)} for two images",
                    "They must be [b, width]: export it with a batch axis on its input and outputs.",
                )
            self._widths[name] = value.shape[1]

    def check(self, size: Size, name: str) -> int:
        """See the base: the cut is the graph's own, so only its width is to be told."""
        return self._widths.get("features", 0)

    def _session(self, device: torch.device) -> Any:
        tf32 = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
        if (key := f"{device} {tf32}") not in self._sessions:
            self._sessions[key] = _open_session(self._graph, device, self._name, tf32)
        return self._sessions[key]


def _open_session(graph: OnnxGraph, device: torch.device, name: str, tf32: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.path.parent)
    )
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and _CUDA in onnxruntime.get_available_providers():
        own = {"device_id": device.index or 0, "use_tf32": int(tf32)}  # its default is TF32
        providers.insert(0, (_CUDA, own))
    elif device.type == "cuda":
        console.warn(f"'{name}' runs on the CPU: the onnxruntime installed here has no CUDA provider")
    return onnxruntime.InferenceSession(graph.document, options, providers=providers)


@contextmanager
def _onnx_errors(name: str) -> Iterator[None]:
    try:
        yield
    except KdError:
        raise
    except Exception as error:
        bound = str(error).startswith(
            "Error in execution"
        )  # what a run with bound inputs raises is no type of its own
        if not (bound or type(error).__module__.startswith("onnxruntime")):
            raise
        reason = str(error)[:300]
        if "allocate memory" in reason:
            raise DeviceError(
                f"out of memory while running '{name}': {reason}", "Use a smaller --batch-size."
            ) from error
        raise BadDataError(
            f"onnxruntime cannot run '{name}': {reason}",
            "Check the file, and that input_size and a free batch axis suit it.",
        ) from error
