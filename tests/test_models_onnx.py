"""ONNX graphs as teachers: the same numbers as the torch network they were made of, or a refusal."""

import json
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from kdcli.errors import BadDataError, KdError, MissingExtraError, NotFoundError, UsageError
from kdcli.extract.outputs import plan_outputs
from kdcli.models.export import export_model
from kdcli.models.grammar import ModelSpec
from kdcli.models.spec import Model, architecture_name, open_model, weights_sha256
from kdcli.models.student import Student
from kdcli.models.teacher import TeacherRunner, normalise
from kdcli.outputs import parse_keep

SIDECAR: dict[str, Any] = {
    "input_size": [3, 24, 20],
    "interpolation": "bicubic",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
    "crop_pct": 0.9,
    "label_names": list("abcde"),
}
BOTH = parse_keep(["logits", "features"])


class Plain(nn.Module):
    """Convolution, ReLU, mean, linear layer: the torch side of the graphs below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.conv(images).relu().mean(dim=(2, 3))
        return features, self.fc(features)


def build(
    ending: str = "gemm", batch: str | int = "b", size: Sequence[str | int] = ("h", "w")
) -> onnx.ModelProto:
    """The graph of :class:`Plain`, with one of several endings."""
    plain = Plain()
    weight = plain.fc.weight.detach().numpy()
    tensors = {
        "conv_w": plain.conv.weight.detach().numpy(),
        "conv_b": plain.conv.bias.detach().numpy(),  # type: ignore[union-attr]
        "axes": np.array([2, 3]),
        "shape": np.array([0, 5, 1, 1]),
        "w": weight if ending == "gemm" else np.ascontiguousarray(weight.T),
        "bias": plain.fc.bias.detach().numpy(),
        "conv_head": weight[:, :, None, None],
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv_w", "conv_b"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["p"], keepdims=int(ending == "conv")),
    ]
    endings = {
        "gemm": [helper.make_node("Gemm", ["p", "w", "bias"], ["y"], transB=1)],
        "matmul": [helper.make_node("MatMul", ["p", "w"], ["m"]), helper.make_node("Add", ["bias", "m"], ["y"])],
        "softmax": [
            helper.make_node("Transpose", ["w"], ["wt"]),
            helper.make_node("Gemm", ["p", "wt", "bias"], ["z"], transB=1),
            helper.make_node("Softmax", ["z"], ["y"], axis=1),
        ],
        "conv": [
            helper.make_node("Conv", ["p", "conv_head", "bias"], ["q"]),
            helper.make_node("Flatten", ["q"], ["y"]),
        ],
    }  # fmt: skip
    graph = helper.make_graph(
        nodes + endings[ending],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, *size])],
        [
            helper.make_tensor_value_info("c", TensorProto.FLOAT, [batch, 6, None, None]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5]),
        ],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """Write a graph with its sidecar; gives the model string."""

    def save(ending: str = "gemm", sidecar: dict[str, Any] | None = SIDECAR, **options: Any) -> str:
        path = tmp_path / f"{ending}.onnx"
        onnx.save(build(ending, **options), path)
        if sidecar is not None:
            Path(f"{path}.json").write_text(json.dumps(sidecar))
        return f"onnx:{path}"

    return save


def pixels(height: int = 24, width: int = 20, count: int = 3) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def refusal(error: type[KdError], spec: str, **options: Any) -> str:
    with pytest.raises(error) as caught:
        open_model(spec, **options)
    assert caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize("ending", ["gemm", "matmul", "softmax"])
def test_logits_and_features_are_the_torch_networks(saved: Callable[..., str], ending: str) -> None:
    model = open_model(saved(ending))
    found = TeacherRunner(model, "cpu", "off", BOTH)(pixels())
    with torch.inference_mode():
        features, logits = Plain()(normalise(torch.from_numpy(pixels()), model.preprocess))
    torch.testing.assert_close(found["features"], features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-6)
    assert found["logits"].dtype == torch.float32


def test_a_model_is_described_by_its_sidecar(saved: Callable[..., str]) -> None:
    model = open_model(saved())
    assert (model.architecture, model.num_classes, model.num_features) == ("onnx", 5, 6)
    assert model.class_names == tuple("abcde")
    assert model.preprocess.document() == {
        "size": [24, 20], "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25],
        "crop_fraction": 0.9, "crop_mode": "center",
    }  # fmt: skip
    assert open_model(model.spec).spec == model.spec


def test_onnxruntime_alone_gives_the_same_bits(saved: Callable[..., str]) -> None:
    spec = saved()
    model = open_model(spec)
    images = normalise(torch.from_numpy(pixels()), model.preprocess).contiguous().numpy()
    session = onnxruntime.InferenceSession(spec.removeprefix("onnx:"))
    (wanted,) = session.run(["y"], {"x": images})
    found = TeacherRunner(model, "cpu", "bf16", parse_keep(["topk:2"]))(pixels())
    assert np.array_equal(found["logits"], wanted)


def test_a_plan_of_an_onnx_teacher_knows_the_data_sets_classes(saved: Callable[..., str]) -> None:
    model = open_model(saved())
    plan = plan_outputs("o", model, parse_keep(["topk:2", "features"]), "float32", (1.0,), ("c", "a"))
    rows = plan.derive(TeacherRunner(model, "cpu", "off", plan.outputs)(pixels()), np.array([0, 1, -1]))
    assert rows["features"]["features"].shape == (3, 6)
    assert np.isnan(rows["stats"]["logp_label"]).tolist() == [False, False, True]


def test_a_runner_is_picklable(saved: Callable[..., str]) -> None:
    runner = TeacherRunner(open_model(saved()), "cpu", "off", BOTH)
    wanted = runner(pixels())
    found = pickle.loads(pickle.dumps(runner))(pixels())
    assert torch.equal(wanted["features"], found["features"])


# --- features that cannot be had --------------------------------------------------------------


def test_features_are_refused_where_the_head_is_no_linear_layer(saved: Callable[..., str]) -> None:
    model = open_model(saved("conv"))
    assert (model.num_classes, model.num_features) == (5, 0)
    with pytest.raises(UsageError, match="gives no features") as caught:
        TeacherRunner(model, "cpu", "off", BOTH)
    assert caught.value.hint.startswith("Use --keep logits")
    logits = TeacherRunner(model, "cpu", "off", parse_keep(["logits"]))(pixels())["logits"]
    with torch.inference_mode():
        wanted = Plain()(normalise(torch.from_numpy(pixels()), model.preprocess))[1]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="no features"):
        plan_outputs("o", model, BOTH, "float16", (1.0,), None)


def test_maps_are_refused(saved: Callable[..., str]) -> None:
    with pytest.raises(UsageError, match="no taps"):
        TeacherRunner(open_model(saved()), "cpu", "off", parse_keep(["maps:c"]))


# --- the preprocessing ------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["kd", "pretrained_cfg"])
def test_the_preprocessing_may_be_in_the_file(saved: Callable[..., str], key: str) -> None:
    spec = saved()
    with_sidecar = open_model(spec)
    path = Path(spec.removeprefix("onnx:"))
    Path(f"{path}.json").unlink()
    model = onnx.load(path)
    helper.set_model_props(model, {key: json.dumps({**SIDECAR, "crop_pct": 0.8})})
    onnx.save(model, path)
    found = open_model(spec)
    assert found.preprocess.crop_fraction == 0.8
    assert found.class_names == with_sidecar.class_names
    Path(f"{path}.json").write_text(json.dumps(SIDECAR))
    assert open_model(spec).preprocess.crop_fraction == 0.9


def test_a_config_of_timms_layout_serves_as_sidecar(saved: Callable[..., str]) -> None:
    inner = {key: value for key, value in SIDECAR.items() if key != "label_names"}
    config = {"architecture": "x", "label_names": list("vwxyz"), "pretrained_cfg": inner}
    model = open_model(saved(sidecar=config))
    assert model.class_names == tuple("vwxyz")
    assert model.preprocess.size == (24, 20)


def test_without_preprocessing_the_sidecar_to_write_is_named(
    saved: Callable[..., str], tmp_path: Path
) -> None:
    says = refusal(NotFoundError, saved(sidecar=None))
    assert f"Write '{tmp_path / 'gemm.onnx.json'}'" in says
    example = says[says.index("{") :]
    (tmp_path / "gemm.onnx.json").write_text(example)
    assert open_model(f"onnx:{tmp_path / 'gemm.onnx'}").preprocess.size == (224, 224)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": None}, "mean: Field required"),
        ({"interpolation": "cubic"}, "interpolation: Input should be 'nearest'"),
        ({"input_size": [1, 24, 24]}, "input_size.0: Input should be 3"),
        ({"input_size": 24}, "input_size: Input should be a valid"),
        ({"std": [0.2, 0.0, 0.2]}, "std.1: Input should be greater than or equal to 0.0001"),
        ({"crop_pct": 2}, "crop_pct: Input should be less than 2"),
        ({"crop_mode": "middle"}, "crop_mode: Input should be 'center'"),
        ({"label_names": ["a", "b"]}, "label_names gives 2 names for 5 classes"),
        ({"label_names": list("aacde")}, "label_names: 'a' is there 2 times"),
        ({"label_names": [1, 2, 3, 4, 5]}, "label_names"),
    ],
)
def test_what_is_wrong_in_a_sidecar_is_named(
    saved: Callable[..., str], change: dict[str, Any], says: str
) -> None:
    sidecar = {key: value for key, value in {**SIDECAR, **change}.items() if value is not None}
    assert says in refusal(BadDataError, saved(sidecar=sidecar))


def test_a_sidecar_that_is_no_json_object_is_bad_data(saved: Callable[..., str], tmp_path: Path) -> None:
    spec = saved()
    for text in ("{", "[1]", "\udc80"):
        Path(f"{tmp_path / 'gemm.onnx'}.json").write_bytes(text.encode(errors="surrogateescape"))
        assert "JSON" in refusal(BadDataError, spec)


# --- files that cannot be used ----------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "there is no ONNX file" in refusal(NotFoundError, f"onnx:{tmp_path / 'none.onnx'}")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_file_is_bad_data(saved: Callable[..., str], damage: str) -> None:
    spec = saved()
    path = Path(spec.removeprefix("onnx:"))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello there", "empty": b""}[damage])
    assert "damaged" in refusal(BadDataError, spec)


def test_a_graph_for_other_inputs_or_without_logits_is_bad_data(saved: Callable[..., str]) -> None:
    assert "exactly 1 images at a time" in refusal(BadDataError, saved(batch=1))
    assert "onnxruntime cannot run" in refusal(BadDataError, saved(size=(32, 32)))
    spec = saved()
    path = Path(spec.removeprefix("onnx:"))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save(model, path)
    assert "one batch of images: its inputs are x [0, 4, 0, 0]" in refusal(BadDataError, spec)
    model = build()
    del model.graph.output[1]
    onnx.save(model, path)
    assert "is logits [b, C]" in refusal(BadDataError, spec)


def test_an_output_called_logits_goes_before_the_first(saved: Callable[..., str]) -> None:
    spec = saved()
    model = build()
    model.graph.node.append(helper.make_node("Neg", ["y"], ["logits"]))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 5]))
    onnx.save(model, spec.removeprefix("onnx:"))
    opened = open_model(spec)
    assert opened.num_features == 0
    with torch.inference_mode():
        images = normalise(torch.from_numpy(pixels()), opened.preprocess)
        torch.testing.assert_close(opened.network(images), -Plain()(images)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_command(
    saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    spec = saved()
    monkeypatch.setitem(sys.modules, package, None)
    says = refusal(MissingExtraError, spec)
    assert f"the package {package}, which" in says
    assert "pip install 'kdcli[onnx]'" in says


# --- identity ---------------------------------------------------------------------------------


def digest(spec: str) -> str:
    return weights_sha256(open_model(spec).network)


def test_identity_changes_with_a_weight_and_with_the_graph(saved: Callable[..., str]) -> None:
    spec = saved()
    path = Path(spec.removeprefix("onnx:"))
    first = digest(spec)
    assert first == digest(spec)
    model = build()
    weights = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights[0, 0, 0, 0] = np.nextafter(weights[0, 0, 0, 0], np.float32(9))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "conv_w"))
    onnx.save(model, path)
    second = digest(spec)
    model = build()
    model.graph.node[1].op_type = "Softplus"
    onnx.save(model, path)
    assert len({first, second, digest(spec)}) == 3
    onnx.save(build(), path)
    assert digest(spec) == first


def test_external_weights_are_used_and_are_part_of_the_identity(saved: Callable[..., str]) -> None:
    spec = saved()
    path = Path(spec.removeprefix("onnx:"))
    inside = TeacherRunner(open_model(spec), "cpu", "off", BOTH)(pixels())
    onnx.save(build(), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    model = open_model(spec)
    assert torch.equal(TeacherRunner(model, "cpu", "off", BOTH)(pixels())["logits"], inside["logits"])
    before = digest(spec)
    weights = path.with_name("weights.bin")
    content = bytearray(weights.read_bytes())
    content[1] ^= 1
    weights.write_bytes(content)
    assert digest(spec) != before
    weights.unlink()
    assert "needs its external weights" in refusal(NotFoundError, spec)


def test_external_weights_outside_the_folder_are_refused(saved: Callable[..., str]) -> None:
    spec = saved()
    path = Path(spec.removeprefix("onnx:"))
    onnx.save(build(), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data[:1]:
            entry.value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    assert "outside its folder" in refusal(BadDataError, spec)


# --- no student -------------------------------------------------------------------------------


def test_an_onnx_file_is_a_teacher_only(saved: Callable[..., str], tmp_path: Path) -> None:
    spec = saved()
    model: Model = open_model(spec)
    uses: list[Callable[[], object]] = [
        lambda: Student(model, {}),
        lambda: export_model(model, tmp_path / "export", None),
        lambda: open_model(spec, weights="random"),
        lambda: open_model(spec, num_classes=3),
        lambda: architecture_name(ModelSpec.parse(spec)),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="can only be a teacher") as caught:
            use()
        assert "--student" in caught.value.hint
    assert not (tmp_path / "export").exists()
