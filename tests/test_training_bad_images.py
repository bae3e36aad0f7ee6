"""``kd train-student --bad-images drop``: the run that there would be without the images that cannot be read."""

import json
from pathlib import Path

import pytest
from conftest import make_folder
from test_training_run import same_student
from training_place import Place, make_place

from kdcli.checking.check import check
from kdcli.checking.config import CheckConfig
from kdcli.data import each
from kdcli.errors import BadDataError, OutputExistsError, StoppedEarly
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.training import readable
from kdcli.training.train import train_student

BAD = ("class0/003.png", "class1/000.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """As usual, with two bad images of 24, one bad test image, and the good ones' keys."""
    place = make_place(tmp_path_factory.mktemp("bad"))
    for name in (*(f"images/{key}" for key in BAD), "held-out/class2/001.png"):
        path = place.root / name
        path.write_bytes(path.read_bytes()[:100])
    (place.root / "bad.txt").write_text("".join(f"{key}\n" for key in BAD))
    (place.root / "bad-test.txt").write_text("class2/001.png\n")
    return place


def recorded(out: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((out / "run.json").read_text())["bad_images"]
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_the_run_on_the_other_images(
    place: Place, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle is --bad-images fail on the same data without=FILE: weights and metrics, bit for bit."""
    config = place.config(
        f"drop{workers}", test=place.test, workers=workers, bad_images="drop", validation=0.25
    )
    result = train_student(config)
    printed = capsys.readouterr().err
    assert "2 of 24 images cannot be read and are left out" in printed
    assert "class0/003.png" in printed
    assert "1 of 9 images cannot be read" in printed
    other = place.config(
        f"without{workers}",
        data=f"{place.data}@without={place.root}/bad.txt",
        test=f"{place.test}@without={place.root}/bad-test.txt",
        validation=0.25,
    )
    expected = train_student(other)
    assert same_student(config.out, other.out)
    assert result.test == expected.test
    found = recorded(config.out)
    assert [sorted(keys) for keys in found.values()] == [sorted(BAD), ["class2/001.png"]]
    assert all("003.png: " in reason for key, reason in found[f"folder/{place.data}"].items() if "003" in key)


def test_the_default_refuses_names_the_option_and_leaves_out_free(place: Place) -> None:
    config = place.config("dead")
    with pytest.raises(BadDataError, match=r"00\d\.png: ") as raised:
        train_student(config)
    assert "train-student leave such images out with --bad-images drop" in raised.value.hint
    train_student(config.model_copy(update={"bad_images": "drop"}))
    assert (config.out / "result.json").is_file()


def test_a_run_that_goes_on_leaves_out_what_it_left_out_without_a_second_look(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config("resumed", bad_images="drop")
    whole = place.config("at-once", bad_images="drop")
    train_student(whole)
    from kdcli.training.checkpoint import CheckpointWriter
    from kdcli.training.fit import Lane

    real, calls = Lane.step, []

    def step(self: Lane, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            with CheckpointWriter() as writer:
                self.save(writer)
            raise StoppedEarly("enough", "go on")
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Lane, "step", step)
    with pytest.raises(StoppedEarly):
        train_student(config)
    monkeypatch.setattr(Lane, "step", real)

    def never(*_: object) -> None:
        raise AssertionError("it looks again")

    monkeypatch.setattr(readable, "look_at_each", never)
    train_student(config)
    assert same_student(config.out, whole.out)
    assert recorded(config.out) == recorded(whole.out)


def test_rows_that_the_cache_marks_as_bad_are_left_out_and_the_others_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path)
    make_folder(tmp_path / "more", per_class=8, size=28, seed=3)
    for key in BAD:
        path = tmp_path / "more" / key
        path.write_bytes(path.read_bytes()[:100])
    cache = tmp_path / "more.kd"
    cache_teachers(
        CacheConfig(
            data=str(tmp_path / "more"),
            cache=cache,
            teacher=(f"gen={place.specs['gen']}",),
            views="eval+train:2",
            recipe="mild",
            workers=0,
            device="cpu",
            bad_images="drop",
        )
    )
    seen: list[str] = []
    real = each.look_at_each

    def counted(data, look, workers):  # type: ignore[no-untyped-def]
        seen.extend(data.keys)
        return real(data, look, workers)

    monkeypatch.setattr(readable, "look_at_each", counted)
    changes = {"data": str(tmp_path / "more"), "cache": (cache,), "validation": 0.25}
    config = place.config("dropped", "distill-equal", bad_images="drop", **changes)
    train_student(config)
    assert sorted(seen) == sorted(BAD)
    assert sorted(recorded(config.out)[f"folder/{tmp_path}/more"]) == sorted(BAD)
    (tmp_path / "bad.txt").write_text("".join(f"{key}\n" for key in BAD))
    changes["data"] = f"{tmp_path}/more@without={tmp_path}/bad.txt"
    other = place.config("without", "distill-equal", **changes)
    train_student(other)
    assert same_student(config.out, other.out)


def test_other_options_for_a_run_with_an_export_are_told_in_plain_words(place: Place) -> None:
    config = place.config("begun", bad_images="drop")
    train_student(config)
    for name in ("result.json", "metrics.jsonl"):
        (config.out / name).unlink()
    with pytest.raises(OutputExistsError, match="holds another run: seed was 0, is 7") as raised:
        train_student(config.model_copy(update={"seed": 7}))
    assert "--overwrite" in raised.value.hint
    assert len(raised.value.message) < 200


def test_a_class_that_would_lose_all_its_images_is_never_lost_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_place(tmp_path)
    for path in sorted((tmp_path / "images/class1").iterdir()):
        path.write_bytes(b"no image")
    with pytest.raises(
        BadDataError, match="8 of 24 images cannot be read, all of class class1 among them"
    ) as raised:
        train_student(place.config("lost", bad_images="drop"))
    assert "DATA@classes=except:class1" in raised.value.hint
    train_student(
        place.config("left-out", data=f"{place.data}@classes=except:class1", bad_images="drop", epochs=1)
    )
    findings = {each.what: each for each in check(CheckConfig(data=place.data, workers=0)).findings}
    finding = findings["cannot be read, and are all that their class has"]
    assert (finding.images, finding.problem) == (8, True)
    assert "class1" in finding.example
    config = CacheConfig(
        data=place.data, cache=tmp_path / "new.kd", teacher=(place.specs["gen"],), workers=0, device="cpu",
        bad_images="drop",
    )  # fmt: skip
    capsys.readouterr()
    cache_teachers(config)
    assert "all images of class class1 cannot be read" in capsys.readouterr().err
