"""What kd needs to know of an ONNX file: its input, its logits, its features, and a digest. Runs nothing."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, final

from kdcli.errors import BadDataError, MissingExtraError, NotFoundError
from kdcli.files import storage_errors
from kdcli.reading import open_regular, read_bytes, require_inside

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

_PASSES_WEIGHTS = ("Identity", "Transpose", "Cast", "DequantizeLinear")
"""What may stand between a weight and the layer that uses it."""
_MOST = 2**31
"""Bytes of a file: more no protocol buffer holds; larger weights are external."""


@final
@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """An ONNX file as read.

    Attributes:
        path: absolute path of the file.
        document: the graph as bytes, with logits and features among its outputs.
        sha256: of the file's bytes, and of those of its external weights. Not of the weights alone: in
            ONNX the layers are data too, and two graphs over the same weights are two teachers.
        metadata: its metadata_props.
        input: name of its one input, a batch of images [b, 3, h, w] in float32.
        logits: name of the value that is the raw logits [b, C], before a softmax.
        features: name of the value that enters the last linear layer; None when that was not found.
    """

    path: Path
    document: bytes
    sha256: str
    metadata: dict[str, str]
    input: str
    logits: str
    features: str | None


def read_graph(path: Path) -> OnnxGraph:
    """Read an ONNX file.

    Raises:
        NotFoundError: there is no such file, or external weights of it are missing.
        MissingExtraError: onnx or onnxruntime is not installed.
        BadDataError: it is damaged, or no network from images to logits.
    """
    if not path.exists():
        raise NotFoundError(f"there is no ONNX file '{path}'", "Check the path.")
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"an ONNX teacher needs the package {error.name}, which is not installed",
            "pip install 'kdcli[onnx]'",
        ) from error
    from google.protobuf.message import DecodeError

    with storage_errors(path):
        content = read_bytes(path, _MOST)
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise _damaged(path) from error
    graph = model.graph
    if not graph.node:
        raise _damaged(path)
    logits = _before_softmax(graph, _logits_output(graph, path))
    features = _last_linear_input(graph, logits)
    known = {value.name for value in graph.output}
    graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in (logits, features) if name and name not in known
    )
    return OnnxGraph(
        path=path,
        document=model.SerializeToString(),
        sha256=_digest(content, model, path),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        input=_image_input(graph, path),
        logits=logits,
        features=features,
    )


def _damaged(path: Path) -> BadDataError:
    return BadDataError(f"'{path}' is damaged, or no ONNX file", "Copy it again, or export it anew.")


def _image_input(graph: "GraphProto", path: Path) -> str:
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    sizes = _sizes(inputs[0]) if len(inputs) == 1 else []
    is_float = len(inputs) == 1 and inputs[0].type.tensor_type.elem_type == TensorProto.FLOAT
    if not (is_float and len(sizes) == 4 and sizes[1] in (0, 3)):
        found = ", ".join(f"{value.name} {_sizes(value)}" for value in inputs) or "nothing"
        raise BadDataError(
            f"'{path}' does not take one batch of images: its inputs are {found}",
            "Export it with one float32 input [b, 3, h, w].",
        )
    if sizes[0] > 0:
        raise BadDataError(
            f"'{path}' takes exactly {sizes[0]} images at a time", "Export it with a dynamic batch axis."
        )
    return str(inputs[0].name)


def _logits_output(graph: "GraphProto", path: Path) -> str:
    """The output called logits, or else the first that is [b, C]."""
    flat = [value.name for value in graph.output if len(_sizes(value)) == 2]
    if not flat:
        raise BadDataError(f"no output of '{path}' is logits [b, C]", "Export it with its classifier.")
    return "logits" if "logits" in flat else flat[0]


def _sizes(value: "ValueInfoProto") -> list[int]:
    """Sizes of a value's axes, 0 where they are free; empty when nothing is known of them."""
    return [axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _producers(graph: "GraphProto") -> "dict[str, NodeProto]":
    return {output: node for node in graph.node for output in node.output}


def _before_softmax(graph: "GraphProto", name: str) -> str:
    """What a cache keeps is raw: a softmax that a graph ends in is left off."""
    producers = _producers(graph)
    while (node := producers.get(name)) is not None and node.op_type in ("Identity", "Softmax", "LogSoftmax"):
        name = node.input[0]
    return name


def _last_linear_input(graph: "GraphProto", logits: str) -> str | None:
    """The input of the linear layer that gives the logits: ``Gemm``, or ``MatMul`` with or without a bias."""
    producers = _producers(graph)
    weights = {tensor.name for tensor in graph.initializer}

    def constant(name: str) -> bool:
        while (node := producers.get(name)) is not None and node.op_type in _PASSES_WEIGHTS:
            name = node.input[0]
        return name in weights or (node is not None and node.op_type == "Constant")

    node = producers.get(logits)
    if node is not None and node.op_type == "Add":
        inner = [name for name in node.input if not constant(name)]
        node = producers.get(inner[0]) if len(inner) == 1 else None
        if node is not None and node.op_type != "MatMul":
            return None
    if node is None or node.op_type not in ("Gemm", "MatMul") or not constant(node.input[1]):
        return None
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return None if transposed or constant(node.input[0]) else node.input[0]


def _digest(content: bytes, model: "ModelProto", path: Path) -> str:
    digest = sha256(content)
    for location in sorted(_external_files(model)):
        file = path.parent / location
        if PurePath(location).is_absolute() or ".." in PurePath(location).parts:
            raise BadDataError(
                f"'{path}' names weights outside its folder: {location}",
                "Export it anew, beside its weights.",
            )
        require_inside(file, path.parent, f"'{path}'")
        if not file.exists():
            raise NotFoundError(
                f"'{path}' needs its external weights '{file}'", "Copy them beside it, under that name."
            )
        with storage_errors(file), open(open_regular(file, sys.maxsize), "rb") as stream:  # noqa: PTH123 - a descriptor
            digest.update(f"{location}\0{file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def _external_files(model: "ModelProto") -> set[str]:
    from onnx import TensorProto

    tensors = [*_tensors(model.graph), *_node_tensors(n for f in model.functions for n in f.node)]
    external = [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    return {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}


def _tensors(graph: "GraphProto") -> "Iterator[TensorProto]":
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: "Iterable[NodeProto]") -> "Iterator[TensorProto]":
    """Tensors inside nodes: of constants, and of the branches and bodies of control flow."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from [attribute.t, *attribute.tensors]
        for graph in [attribute.g, *attribute.graphs]:
            yield from _tensors(graph)
