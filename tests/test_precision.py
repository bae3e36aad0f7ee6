"""The precision that networks compute at: what is chosen, what torch is set to, what records of it allow."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_place import Place, make_place

from kdcli import precision
from kdcli.cache.reader import CacheReader
from kdcli.comparing.compare import compare
from kdcli.comparing.config import CompareConfig
from kdcli.devices import Device
from kdcli.errors import DeviceError, IdentityError, OutputExistsError
from kdcli.extract.canary import require_close, run_canary
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.extract.rerun import Sources
from kdcli.precision import Precision, amp_on, computing, require_repeatable, resolve_amp, tolerance
from kdcli.probing.config import ProbeConfig
from kdcli.probing.probe import eval_probe
from kdcli.training.train import train_student

CPU = Device("cpu", "a processor", 8, 8, {"bf16": "yes", "fp16": "emulated", "tf32": "no"})
OLD = Device("cuda:0", "Tesla V100", 16, 16, {"bf16": "emulated", "fp16": "yes", "tf32": "no"})
NEW = Device("cuda:0", "NVIDIA A100", 40, 40, {"bf16": "yes", "fp16": "yes", "tf32": "yes"})


@pytest.mark.parametrize(
    ("asked", "on_cpu", "on_old", "on_new"),
    [
        ("auto", "off", "off", "bf16"),
        ("off", "off", "off", "off"),
        ("tf32", "off", "off", "tf32"),
        ("bf16", "bf16", None, "bf16"),
        ("fp16", "fp16", "fp16", "fp16"),
    ],
)
def test_what_is_chosen(asked: Any, on_cpu: str, on_old: str | None, on_new: str) -> None:
    assert amp_on(asked, CPU) == on_cpu
    assert amp_on(asked, NEW) == on_new
    if on_old is not None:
        assert amp_on(asked, OLD) == on_old
        return
    with pytest.raises(DeviceError, match="Tesla V100") as caught:
        amp_on(asked, OLD)
    assert "--amp fp16" in caught.value.hint


@pytest.mark.parametrize("recorded", ["off", "tf32", "bf16", "fp16"])
def test_auto_goes_on_with_what_is_recorded(recorded: str) -> None:
    assert resolve_amp("auto", "cpu", recorded) == recorded
    assert (
        resolve_amp("off", "cpu", recorded) == "off"
    )  # asked for by name: the record's own check refuses it


@pytest.mark.parametrize("junk", [None, "", "fp8", 3, ["off"]])
def test_what_is_no_precision_is_no_record(junk: Any) -> None:
    assert resolve_amp("auto", "cpu", junk) == "off"


@pytest.mark.parametrize(
    ("amp", "compute", "allowed"),
    [
        # Recorded now, with TF32 as a precision: what was recorded bounds the difference, wherever it runs.
        ("off", {"device": "cpu"}, 3e-3),
        ("off", {"device": "cuda"}, 3e-3),
        ("tf32", {"device": "cuda"}, 1e-2),
        ("tf32", {"device": "cpu"}, 1e-2),
        ("fp16", {"device": "cuda"}, 1e-2),
        ("bf16", {"device": "cuda"}, 6e-2),
        ("bf16", {"device": "cpu"}, 6e-2),
        # Recorded earlier: convolutions on cards were in TF32, whatever was said of matrix products.
        ("off", {"device": "cpu", "tf32": False}, 3e-3),
        ("off", {"device": "cuda", "tf32": False}, 1e-2),
        ("off", {"device": "cuda", "tf32": True}, 1e-2),
        ("bf16", {"device": "cuda", "tf32": True}, 6e-2),
    ],
)
def test_what_a_record_allows(amp: Any, compute: dict[str, Any], allowed: float) -> None:
    assert tolerance(amp, compute) == allowed


def switches() -> dict[str, Any]:
    """All that torch knows of TF32 on cards, by both of its ways."""
    backends = torch.backends

    def read(get: Callable[[], Any]) -> Any:
        try:
            return get()
        except RuntimeError:
            return "torch refuses to say"

    return {
        "matmul": backends.cuda.matmul.fp32_precision,
        "conv": backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "rnn": backends.cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "old matmul": read(lambda: backends.cuda.matmul.allow_tf32),
        "old cudnn": read(lambda: backends.cudnn.allow_tf32),
        "word": read(torch.get_float32_matmul_precision),
    }


EXACT = {"matmul": "ieee", "conv": "ieee", "rnn": "ieee", "old matmul": False, "old cudnn": False}
ROUNDED = {"matmul": "tf32", "conv": "tf32", "rnn": "tf32", "old matmul": True, "old cudnn": True}


@pytest.fixture
def _clean() -> Any:
    yield
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    torch.backends.cuda.matmul.fp32_precision = "none"


BEFORE = {
    "as torch starts": lambda: None,
    "set by the old way": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "set by the new way": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "set for everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "set by its word": lambda: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(("amp", "expected"), [("off", EXACT), ("bf16", EXACT), ("tf32", ROUNDED)])
def test_products_are_exact_or_tf32_whole_and_can_be_read_by_both_ways(
    before: str, amp: Any, expected: dict[str, Any]
) -> None:
    """Whoever set it how: torch.compile reads it, and refuses where its two ways contradict each other."""
    BEFORE[before]()
    found = switches()
    with Precision(amp).applied("cuda:0"):
        now = switches()
        assert {name: now[name] for name in expected} == expected
        with Precision("off").applied("cuda:0"), Precision("tf32").applied("cuda:0"):
            assert {name: switches()[name] for name in ROUNDED} == ROUNDED
        assert switches() == now
    kinds = ("matmul", "conv", "rnn")
    assert {name: switches()[name] for name in kinds} == {name: found[name] for name in kinds}
    assert "torch refuses to say" not in switches().values() or "torch refuses to say" in found.values()


def test_a_forward_on_a_processor_touches_no_switch() -> None:
    before = switches()
    with computing("cpu", "tf32"):
        assert switches() == before
        assert not torch.is_autocast_enabled("cpu")
    with computing("cpu", "bf16"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_deterministic_is_set_whole_and_taken_back() -> None:
    def state() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        )

    before = state()
    with Precision("off", deterministic=True).applied("cpu"):
        assert state() == (True, True, False)
    assert state() == before
    with Precision("off").applied("cpu"):
        assert state() == before


@pytest.mark.parametrize(
    ("device", "given", "started", "left"),
    [
        ("cpu", None, True, None),
        ("cuda:0", None, False, ":4096:8"),
        ("auto", ":16:8", True, ":16:8"),
        ("cuda:0", ":0:0", False, DeviceError),
        ("cuda:0", None, True, DeviceError),
    ],
)
def test_cublas_is_told_before_cuda_starts_or_it_is_refused(
    device: str, given: str | None, started: bool, left: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    if left is DeviceError:
        with pytest.raises(DeviceError, match=name) as caught:
            require_repeatable(device)
        assert f"{name}=:4096:8" in caught.value.hint
        return
    require_repeatable(device)
    assert os.environ.get(name) == left


def test_records_name_what_is_unusual() -> None:
    assert Precision("bf16").document() == {"amp": "bf16"}
    assert Precision("off", True).document() == {"amp": "off", "deterministic": True}


def test_the_module_loads_without_torch() -> None:
    program = "import sys, kdcli.precision, kdcli.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- caches and runs keep to what they were begun with ---------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("precision"), views="eval", per_class=3)


@pytest.fixture
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    """This processor, taken for a card that has bfloat16."""
    monkeypatch.setattr(precision, "device_of", lambda name: NEW)


def caching(place: Place, cache: Path, *teachers: str, **changes: Any) -> CacheConfig:
    specs = tuple(f"{name}={place.specs[name]}" for name in teachers)
    fields = {"data": place.data, "workers": 0, "device": "cpu", "views": "eval"}
    return CacheConfig(cache=cache, teacher=specs, **{**fields, **changes})


@pytest.mark.usefixtures("_card")
def test_a_cache_goes_on_at_its_teachers_precision_and_a_new_teacher_at_the_devices(
    place: Place, tmp_path: Path
) -> None:
    cache = tmp_path / "c.kd"
    cache_teachers(caching(place, cache, "gen", amp="off", keep=("logits",)))
    cache_teachers(caching(place, cache, "gen", "exp"))  # auto
    assert {name: record.amp for name, record in CacheReader(cache).teachers.items()} == {
        "gen": "off",
        "exp": "bf16",
    }
    assert "tf32" not in CacheReader(cache).teachers["gen"].compute
    with pytest.raises(IdentityError, match="amp was off, is bf16"):
        cache_teachers(caching(place, cache, "gen", amp="bf16"))
    require_close(cache, found := run_canary(cache, Sources(data=place.data, device="cpu", workers=0)))
    assert {each.teacher: each.tolerance for each in found} == {"gen": 3e-3, "exp": 6e-2}


def test_a_cache_that_a_card_began_is_filled_by_a_processor_without_being_asked(
    place: Place, tmp_path: Path
) -> None:
    cache = tmp_path / "c.kd"
    cache_teachers(caching(place, cache, "gen", amp="bf16", keep=("logits",)))
    cache_teachers(caching(place, cache, "gen"))
    record = CacheReader(cache).teachers["gen"]
    assert (record.amp, record.keep) == ("bf16", ("logits", "features"))


def test_what_a_processor_computes_in_float32_is_recorded_as_float32(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "c.kd"
    cache_teachers(caching(place, cache, "gen", amp="tf32"))
    assert CacheReader(cache).teachers["gen"].amp == "off"
    cache_teachers(caching(place, cache, "gen", amp="off"))  # and so is no other teacher


@pytest.mark.usefixtures("_card")
def test_a_run_goes_on_at_its_precision(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    began = train_student(place.config("off", epochs=1, amp="off"))
    assert began.details["amp"] == "off"
    again = train_student(place.config("off", epochs=1))  # auto, on what is now a card
    assert again == began
    assert "amp: 'off'" in (place.root / "off" / "config.yaml").read_text()
    with pytest.raises(OutputExistsError, match="amp was off, is bf16"):
        train_student(place.config("off", epochs=1, amp="bf16"))
    new = train_student(place.config("new", epochs=1))
    assert new.details["amp"] == "bf16"
    monkeypatch.undo()  # a processor again
    assert train_student(place.config("new", epochs=1)) == new
    anew = train_student(place.config("new", epochs=1, overwrite=True))
    assert anew.details["amp"] == "off"


def test_deterministic_changes_no_bit_on_a_processor_and_is_part_of_the_run(place: Place) -> None:
    train_student(place.config("usual", epochs=2, method="distill-equal"))
    done = train_student(place.config("same", epochs=2, method="distill-equal", deterministic=True))
    assert done.details["deterministic"] is True
    for file in ("heads.safetensors", "export/model.safetensors"):
        assert (place.root / "usual" / file).read_bytes() == (place.root / "same" / file).read_bytes()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(OutputExistsError, match="deterministic"):
        train_student(place.config("same", epochs=2, method="distill-equal"))


def test_probes_and_comparisons_are_exact_unless_asked_and_say_so(place: Place, tmp_path: Path) -> None:
    student = f"gen={place.specs['gen']}"
    common = {"test": place.test, "workers": 0, "device": "cpu"}
    few = {"data": place.data, "model": (student,), "draws": 2, "shots": 2, **common}
    exact, mixed = (eval_probe(ProbeConfig(**few, amp=amp)).protocol for amp in ("off", "bf16"))
    assert "amp" not in exact
    assert mixed == {**exact, "amp": "bf16"}
    assert ProbeConfig(**few).amp == "off"
    models = (student, f"again={place.specs['gen']}")
    for amp, source in (("off", "forward"), ("off", "kept"), ("bf16", "forward")):
        config = CompareConfig(models=models, out=tmp_path / "out", amp=amp, **common)
        found = compare(config).models["gen"]
        assert (found.amp, found.source) == (amp, source)
