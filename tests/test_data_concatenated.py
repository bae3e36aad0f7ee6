"""``A++B``: one data set of the images of several, for a cache and for a student."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder
from small_cache import write_cache, write_teachers
from test_training_run import interrupt, same_student

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import open_data
from kdcli.data.spec import DataSpec
from kdcli.errors import CacheMissingError, NotFoundError, UsageError
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student

JOINT = "sklearn/digits@split=train,n=20++sklearn/digits@split=test,n=15,seed=3"


# --- grammar and samples ----------------------------------------------------------------------


def test_the_text_of_a_joined_spec_parses_to_the_same_spec() -> None:
    spec = DataSpec.parse(" a/b@classes=cat+dog,n=3++glyphs/greek@n=2++folder/c++d@shots=1".strip())
    assert [str(part) for part in spec.members] == [
        "folder/a/b@classes=cat+dog,n=3", "glyphs/greek@n=2", "folder/c++d@shots=1"
    ]  # fmt: skip
    assert DataSpec.parse(str(spec)) == spec
    assert DataSpec.parse("c++d").members == ()
    assert str(DataSpec.parse("c++d@n=2")) == "folder/c++d@n=2"


def test_a_set_joined_with_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="joined with itself"):
        DataSpec.parse("sklearn/digits@n=5++sklearn/digits@n=5")


def test_a_joined_set_has_the_samples_of_its_members_under_one_numbering() -> None:
    data = open_data(JOINT)
    assert len(data) == len(data.keys) == len(data.sizes()) == 35
    assert list(data.keys) == sorted(set(data.keys))
    assert open_data(data.location).keys == data.keys
    worker = pickle.loads(pickle.dumps(data))
    parts = [open_data(part) for part in JOINT.split("++")]
    for row in (0, 19, 20, 34):
        part, own = (parts[0], row) if row < 20 else (parts[1], row - 20)
        assert data.encoded(row) == part.encoded(own) == worker.encoded(row)
        np.testing.assert_array_equal(np.asarray(data.image(row)), np.asarray(part.image(own)))
        assert data.path(row) == part.path(own)
        assert data.keys[row].partition("/")[2] == part.keys[own]
    assert data.labels.tolist() == [*parts[0].labels, *parts[1].labels]


def test_more_than_ten_members_stay_in_order() -> None:
    data = open_data("++".join(f"sklearn/digits@n=2,seed={seed}" for seed in range(12)))
    assert list(data.keys) == sorted(data.keys)
    assert {key.partition("/")[0] for key in data.keys} == {f"{number:02d}" for number in range(12)}


def test_labels_stay_where_the_classes_agree_whatever_their_order_and_whoever_has_none(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path / "a", per_class=2, size=28)
    make_folder(tmp_path / "b", per_class=2, size=28, seed=1)
    data = open_data(f"folder/{tmp_path}/a++folder/{tmp_path}/b@labels=none++folder/{tmp_path}/b")
    assert data.class_names == ("class0", "class1", "class2")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, *[-1] * 6, 0, 0, 1, 1, 2, 2]


def test_labels_of_different_classes_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "a", per_class=2, size=28)
    data = open_data(f"folder/{tmp_path}/a++sklearn/digits@n=3")
    assert data.class_names is None
    assert set(data.labels) == {-1}
    assert "name different classes, so their labels are left out" in capsys.readouterr().err


def test_relative_members_reopen_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "a", per_class=2, size=28)
    make_folder(tmp_path / "b++c", per_class=1, size=28)
    data = open_data("a++folder/b++c", data_root=tmp_path)
    monkeypatch.chdir("/")
    assert open_data(data.location).keys == data.keys
    assert len(data) == 9


def test_a_folder_behind_plus_plus_without_its_scheme_is_explained(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        open_data("a++b", data_root=tmp_path)
    assert "written folder/PATH" in caught.value.hint


# --- a cache and a student --------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_teachers(tmp_path_factory.mktemp("teachers"))


def proxies(folder: Path) -> tuple[str, str]:
    make_folder(folder / "a", per_class=5, size=28)
    return f"folder/{folder / 'a'}", "glyphs/greek@n=13"


def student(cache: tuple[Path, ...], data: str, out: Path) -> StudentConfig:
    return StudentConfig(
        data=data, cache=cache, student="test_resnet", method="consolidation-crd", generalist="big", out=out,
        image_size=32, epochs=2, batch_size=8, workers=0, device="cpu",
    )  # fmt: skip


def test_teachers_see_joined_proxies_once_and_a_killed_student_goes_on_to_the_same_bits(
    tmp_path: Path, teachers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = "++".join(proxies(tmp_path))
    cache = write_cache(tmp_path / "c.kd", joined, teachers, views="eval+train:2", recipe="glyph")
    for words in (["verify", "--live"], ["info"]):
        command = [sys.executable, "-m", "kdcli", "cache", words[0], str(cache), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    whole = train_student(student((cache,), joined, tmp_path / "whole"))
    assert whole.details["images"] == 28
    killed = student((cache,), joined, tmp_path / "killed")
    interrupt(killed, 5, monkeypatch)
    train_student(killed)
    assert same_student(killed.out, tmp_path / "whole")


def test_caches_of_the_members_serve_the_joined_set(tmp_path: Path, teachers: dict[str, str]) -> None:
    one, other = proxies(tmp_path)
    caches = tuple(
        write_cache(tmp_path / f"{number}.kd", data, teachers, eval_geometry="shared:1")
        for number, data in enumerate((one, other))
    )
    joined = open_data(f"{one}++{other}")
    rows = CacheSet.open(caches).rows_of(joined)
    assert sorted(rows) == [*range(15), *(row + CacheSet.open(caches).offsets[1] for row in range(13))]
    together = write_cache(tmp_path / "c.kd", f"{one}++{other}", teachers, eval_geometry="shared:1")
    whole = CacheSet.open([together])
    for name in teachers:
        apart = CacheSet.open(caches).gather(name, "logits", rows, 0)
        np.testing.assert_allclose(apart, whole.gather(name, "logits", whole.rows_of(joined), 0), atol=2e-3)
    result = train_student(student(caches, f"{one}++{other}", tmp_path / "out"))
    assert result.details["images"] == 28
    assert torch.isfinite(torch.tensor(result.history[-1]["loss"]))
    with pytest.raises(CacheMissingError, match="13 of 28 samples are not in"):
        train_student(student(caches[:1], f"{one}++{other}", tmp_path / "half"))
