"""The grammar of model strings."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.errors import NotFoundError, UsageError
from kdcli.models.grammar import ModelSpec, default_init


@pytest.mark.parametrize(
    ("text", "kind", "init"),
    [
        ("mobilenetv3_small_100", "timm", "random"),
        ("resnet50.a1_in1k", "timm", "random"),
        ("torchvision/resnet18", "torchvision", "random"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub", "pretrained"),
        ("hf-hub:org/name@main", "hf-hub", "pretrained"),
        ("local-dir:/models/a@b", "local-dir", "pretrained"),
        ("onnx:/w/a.onnx", "onnx", "pretrained"),
        ("resnet10t@/w/a.safetensors", "file", "pretrained"),
        ("torchvision/resnet18@/w/a.safetensors", "file", "pretrained"),
        ("transformers//models/vit@b", "transformers", "pretrained"),
        ("transformers/org/name@v1", "transformers", "pretrained"),
        ("my.package:TEACHER", "python", "pretrained"),
    ],
)
def test_every_form_round_trips_and_has_its_default_init(text: str, kind: str, init: str) -> None:
    spec = ModelSpec.parse(text)
    assert (spec.kind, str(spec)) == (kind, text)
    assert ModelSpec.parse(str(spec)) == spec
    assert default_init(spec) == init


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(ModelSpec.parse("local-dir:runs/export")) == f"local-dir:{tmp_path}/runs/export"
    assert str(ModelSpec.parse("resnet10t@w.safetensors")) == f"resnet10t@{tmp_path}/w.safetensors"
    assert ModelSpec.parse("local-dir:~/m").file == Path.home() / "m"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert str(ModelSpec.parse("transformers/org/name")) == f"transformers/{tmp_path}/org/name"


def test_other_spellings_become_canonical() -> None:
    assert str(ModelSpec.parse(" hf_hub:org/name ")) == "hf-hub:org/name"
    assert str(ModelSpec.parse("tf_efficientnet_b0_ap")) == "tf_efficientnet_b0.ap_in1k"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("resnet5O", 11, "Did you mean 'resnet50'?"),
        ("resnet50.a1_in2k", 11, "Did you mean 'resnet50.a1_in1k'?"),
        ("resnet10t.nope", 11, "resnet10t.c3_in1k"),
        ("torchvision/resnet19", 11, "Did you mean 'torchvision/resnet1"),
        ("torchvision/fasterrcnn_resnet50_fpn", 11, "unknown torchvision model"),
        ("resnet5O@w.safetensors", 11, "in 'resnet5O@w.safetensors'"),
        ("timm/resnet18.a1_in1k", 11, "hf-hub:timm/resnet18.a1_in1k"),
        ("onnx:", 2, "names nothing after 'onnx:'"),
        ("model.onnx", 11, "Write onnx:model.onnx."),
        ("~nobody-of-that-name:", 11, "unknown model"),
        ("gs://bucket/model", 11, "Known forms: a timm name"),
        ("", 2, "empty"),
        ("@w.safetensors", 11, "unknown model"),
        ("local-dir:", 2, "nothing after 'local-dir:'"),
        ("hf-hub:resnet18", 2, "ORG/NAME"),
        ("hf-hub:a/b@c@d", 2, "ORG/NAME"),
        ("resnet10t@", 2, "no file"),
        ("transformers/", 2, "names nothing"),
        ("transformers/no-such", 11, "there is no folder 'no-such'"),
        ("transformers/a/b@c@d", 11, "ORG/NAME"),
        ("resnet10t@w.pth", 2, "weights_only=True"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(text: str, code: int, says: str) -> None:
    with pytest.raises((NotFoundError, UsageError)) as caught:
        ModelSpec.parse(text)
    assert caught.value.exit_code == code
    assert says in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint


def test_a_bare_path_gets_the_form_it_needs(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as folder:
        ModelSpec.parse(str(tmp_path))
    assert f"local-dir:{tmp_path}" in folder.value.hint
    with pytest.raises(NotFoundError) as file:
        ModelSpec.parse(str(tmp_path / "w.safetensors"))
    assert "ARCH@" in file.value.hint


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused_by_a_kd_error(text: str) -> None:
    with suppress(UsageError, NotFoundError):
        spec = ModelSpec.parse(text)
        assert ModelSpec.parse(str(spec)) == spec


def test_importing_the_grammar_imports_no_torch() -> None:
    code = "import sys, kdcli.models.grammar; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
