"""What a run would cost, said before anything is written; and teachers that do not know their trade."""

import json
import shlex
from pathlib import Path

import pytest
from small_cache import write_images, write_teachers

from kdcli.cache.reader import CacheReader
from kdcli.cli.app import main
from kdcli.errors import BadDataError, IdentityError, NoSpaceError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.costs import plan_cache
from kdcli.extract.extract import cache_teachers
from kdcli.extract.speeds import BATCHES


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "img", {"a": 25, "b": 20})
    return tmp_path


def config(place: Path, **options: object) -> CacheConfig:
    specs = write_teachers(place / "nets")
    return CacheConfig(
        data="img",
        cache=place / "c.kd",
        teacher=tuple(f"{name}={spec}" for name, spec in specs.items()),
        workers=0,
        block_rows=32,
        **options,
    )


def files_in(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_planned_bytes_are_those_that_are_written(place: Path, backend: str) -> None:
    asked = config(
        place,
        keep=("logits", "topk:3", "features", "maps:layer4@eval"),
        views="eval+train:2",
        backend=backend,
    ).model_copy(update={"teacher": (f"big={write_teachers(place / 'nets')['big']}",)})
    plan = plan_cache(asked)
    assert not (place / "c.kd").exists()
    assert plan.bytes_missing == plan.bytes
    assert plan.images == 45 * 3
    cache_teachers(asked)
    written = files_in(place / "c.kd" / f"data.{backend}")
    chunks = sum(size for name, size in written.items() if "/c." in name)
    assert chunks == plan.bytes
    assert sum(written.values()) <= 1.02 * plan.bytes or sum(written.values()) - plan.bytes < 20_000
    again = plan_cache(asked)
    assert (again.tasks, again.bytes_missing, again.images) == (0, 0, 0)
    more = plan_cache(asked.model_copy(update={"keep": ("features", "maps:layer3@eval")}))
    assert more.bytes_missing == sum(
        size for name, size in more.arrays["big"].items() if name.startswith("maps")
    )


def test_what_does_not_fit_is_not_begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.extract.places.available_bytes", lambda _root: 1000)
    with pytest.raises(NoSpaceError, match=r"needs .* more, and 1\.0 kB are free") as caught:
        cache_teachers(config(place))
    assert caught.value.exit_code == 31
    assert not (place / "c.kd").exists()


def test_a_teacher_for_a_part_of_a_cache_is_refused_with_the_command_for_all(place: Path) -> None:
    asked = config(place)
    cache_teachers(asked.model_copy(update={"teacher": asked.teacher[:1]}))
    part = asked.model_copy(update={"data": "img@shots=5", "teacher": asked.teacher[1:]})
    with pytest.raises(
        IdentityError, match=r"img@shots=5 is a part of what .*c\.kd holds \(folder/img\)"
    ) as caught:
        cache_teachers(part)
    command = caught.value.hint.removeprefix("Leave the data out: ").partition(";")[0]
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command)[1:])
    assert left.value.code == 0
    assert set(CacheReader(place / "c.kd").teachers) == {"big", "small"}


def test_a_plan_that_does_not_fit_is_one_document(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kdcli.extract.places.available_bytes", lambda _root: 1000)
    asked = config(place)
    command = ["cache", "plan", str(asked.data), "--cache", str(asked.cache), "--teacher", asked.teacher[0]]
    with pytest.raises(SystemExit) as left:
        main([*command, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (left.value.code, document["error"]["code"]) == (31, 31)
    assert (document["fits"], document["bytes_free"]) == (False, 1000)
    assert document["bytes_missing"] > 1000


def test_measuring_runs_every_stage_and_leaves_nothing_behind(place: Path) -> None:
    before = files_in(place)
    asked = config(place)
    before |= files_in(place)
    found = plan_cache(asked, measured=True).measured
    assert found is not None
    assert found.forward.keys() == {"big", "small"}
    assert min(found.decode, found.write_mb, *found.forward.values()) > 0
    rates = {
        "decode": found.decode,
        "forward": 1 / sum(1 / rate for rate in found.forward.values()),
        "write": found.write,
    }
    assert found.bound == min(rates, key=lambda name: rates[name])
    assert found.hours == pytest.approx(45 / rates[found.bound] / 3600)
    assert files_in(place) == before
    assert BATCHES == 20


def test_a_teacher_that_gets_too_little_right_is_refused_before_it_runs(place: Path) -> None:
    from kdcli.models.export import export_model
    from kdcli.models.spec import open_model

    asked = config(place)
    with pytest.raises(UsageError, match="no logits of the classes"):
        cache_teachers(asked.model_copy(update={"min_accuracy": 0.5}))
    model = open_model("test_resnet", weights="random", num_classes=2, image_size=32)
    model.network.plain.fc.bias.data[:] = model.network.plain.fc.bias.data.new_tensor([100.0, 0.0])
    export_model(model, place / "says-a", ["a", "b"])
    one = asked.model_copy(update={"teacher": (f"t=local-dir:{place / 'says-a'}",)})
    with pytest.raises(BadDataError, match=r"gets 0\.556 of 45 labelled images right, less than"):
        cache_teachers(one.model_copy(update={"min_accuracy": 0.56}))
    assert not (place / "c.kd").exists()
    cache_teachers(one.model_copy(update={"min_accuracy": 0.55}))
    assert (place / "c.kd").exists()
