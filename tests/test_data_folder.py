"""Folders of images."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcli.data.sources import open_data
from kdcli.data.walk import Walk
from kdcli.errors import BadDataError, NotFoundError, StorageError, UsageError


def fill(root: Path, *names: str) -> Path:
    """Write a small image for each name; the gray level tells them apart."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".gif": "GIF", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), "PNG")
        Image.new("RGB", (4, 3), (number, number, number)).save(path, kind)
    return root


def keys_of(text: str | Path) -> list[str]:
    return list(open_data(str(text)).keys)


def test_classes_are_the_first_folders_and_keys_are_sorted_posix_paths(tmp_path: Path) -> None:
    data = open_data(
        str(fill(tmp_path, "dog/b.JPG", "cat/deep/a.png", "cat/b.gif", "cat-2/a.jpeg", "cat/deep.png"))
    )
    assert list(data.keys) == ["cat-2/a.jpeg", "cat/b.gif", "cat/deep.png", "cat/deep/a.png", "dog/b.JPG"]
    assert data.class_names == ("cat", "cat-2", "dog")
    assert data.labels.tolist() == [1, 0, 0, 0, 2]
    assert data.path(4) == str(tmp_path / "dog/b.JPG")
    assert data.encoded(4) == (tmp_path / "dog/b.JPG").read_bytes()
    assert data.sizes().tolist() == [len(data.encoded(row)) for row in range(5)]
    assert data.image(2).getpixel((0, 0)) == (4, 4, 4)


@given(st.lists(st.text("ab-./0\u00e9 ", min_size=1, max_size=9), min_size=1, max_size=12))
def test_a_walk_yields_plain_string_order(names: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        root, expected = Path(folder), set()
        for name in names:
            parts = [f"_{part}" for part in name.split("/") if part]
            path = root.joinpath(*parts[:-1], f"{parts[-1] if parts else '_'}.png")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError:  # one name is both a file and a folder
                continue
            expected.add(path.relative_to(root).as_posix())
        assert list(Walk(root).keys()) == sorted(expected)


def test_hidden_and_foreign_files_are_skipped(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "cat/.b.png", ".git/c.png")
    (tmp_path / "cat/notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    data = open_data(str(tmp_path))
    assert list(data.keys) == ["cat/a.png"]
    assert data.class_names == ("cat",)


def test_links_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "store", "1.png", "more/2.png")
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/cat/a.png").symlink_to(tmp_path / "store/1.png")
    (tmp_path / "set/dog").symlink_to(tmp_path / "store/more")
    assert keys_of(tmp_path / "set") == ["cat/a.png", "dog/2.png"]


def test_a_link_in_a_circle_is_refused_and_a_dead_link_is_a_bad_image(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png")
    (tmp_path / "cat/b.png").symlink_to(tmp_path / "gone.png")
    data = open_data(str(tmp_path))
    assert data.sizes()[1] == -1
    with pytest.raises(BadDataError, match=r"b\.png: no such file"):
        data.encoded(1)
    (tmp_path / "cat/again").symlink_to(tmp_path)
    with pytest.raises(BadDataError, match="link to a folder that contains it"):
        open_data(str(tmp_path))


def test_images_directly_in_the_folder_have_no_labels(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path, "a.png", "b.png")))
    assert data.class_names is None
    assert data.labels.tolist() == [-1, -1]


def test_a_mix_of_both_is_refused_with_an_example_of_each(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "cat/b.png")
    with pytest.raises(BadDataError, match=r"cat/b\.png, a\.png"):
        open_data(str(tmp_path))


@pytest.mark.parametrize(
    ("split", "folder"), [("train", "training"), ("val", "validation"), ("testing", "test")]
)
def test_splits_go_by_all_their_names_and_stay_in_the_keys(tmp_path: Path, split: str, folder: str) -> None:
    fill(tmp_path, f"{folder}/cat/1.png", "other/cat/2.png")
    assert keys_of(f"{tmp_path}@split={split}") == [f"{folder}/cat/1.png"]


def test_the_exact_name_of_a_split_wins(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "training/a/1.png", "extra/a/1.png")
    assert keys_of(f"{tmp_path}@split=training") == ["training/a/1.png"]
    assert keys_of(f"{tmp_path}@split=extra") == ["extra/a/1.png"]


def test_all_splits_number_their_classes_alike(tmp_path: Path) -> None:
    fill(
        tmp_path, "train/ant/1.png", "train/bee/1.png", "train/cow/1.png", "test/ant/1.png", "test/cow/1.png"
    )
    train, test = (open_data(f"{tmp_path}@split={split}") for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "bee", "cow")
    assert test.labels.tolist() == [0, 2]


def test_an_unlabelled_split_may_stand_beside_labelled_ones(tmp_path: Path) -> None:
    fill(tmp_path, "train/ant/1.png", "test/1.png")
    assert open_data(f"{tmp_path}@split=test").class_names is None


@pytest.mark.parametrize(
    "names",
    [
        ("train/cat/1.png", "test/cat/1.png"),
        ("train/1.png", "val/1.png"),
        ("train/cat/1.png",),
        ("training/cat/1.png", "validation/cat/1.png", "annotations/x/1.png"),
        ("Train/cat/1.png", "depth/x/1.png"),
    ],
)
def test_splits_are_never_taken_for_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    fill(tmp_path, *names)
    with pytest.raises(UsageError, match="holds splits") as raised:
        open_data(str(tmp_path))
    assert "@split=" in raised.value.hint


def test_a_class_that_is_called_like_a_split_is_taken_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, "bus/1.png", "car/1.png", "train/1.png")
    assert open_data(str(tmp_path)).class_names == ("bus", "car", "train")
    assert "'train' is taken as a class" in capsys.readouterr().err


def test_a_split_that_is_not_there_names_what_is(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.png", "dog/1.png")
    with pytest.raises(NotFoundError, match=r"no split 'train'.*cat, dog"):
        open_data(f"{tmp_path}@split=train")
    fill(tmp_path / "s", "train/cat/1.png", "val/cat/1.png")
    with pytest.raises(NotFoundError) as raised:
        open_data(f"{tmp_path / 's'}@split=test")
    assert "train, val" in raised.value.hint


def test_a_path_that_is_missing_a_file_or_empty(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no folder"):
        open_data(str(tmp_path / "no"))
    (tmp_path / "file.png").touch()
    with pytest.raises(BadDataError, match="is a file"):
        open_data(str(tmp_path / "file.png"))
    with pytest.raises(NotFoundError):
        open_data(str(tmp_path / "file.png/below"))
    (tmp_path / "empty/cat").mkdir(parents=True)
    with pytest.raises(BadDataError, match="no images"):
        open_data(str(tmp_path / "empty"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_a_storage_error(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png")
    (tmp_path / "cat").chmod(0)
    try:
        with pytest.raises(StorageError, match="ermission"):
            open_data(str(tmp_path))
    finally:
        (tmp_path / "cat").chmod(0o700)


def test_what_the_system_refuses_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        open_data(str(tmp_path / ("x" * 300)))
    data = open_data(str(fill(tmp_path, "cat/a.png")))
    (tmp_path / "cat/a.png").unlink()
    (tmp_path / "cat/a.png").mkdir()
    with pytest.raises(BadDataError, match=r"a\.png: is a folder"):
        data.encoded(0)


def test_a_file_name_that_is_no_text_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with pytest.raises(BadDataError, match="not UTF-8"):
        list(Walk(tmp_path).keys())


def test_relative_folders_lie_below_the_data_root_or_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "root/flowers", "a/1.png")
    fill(tmp_path / "here/birds", "a/2.png")
    fill(tmp_path / "here/folder/fish", "a/3.png")
    monkeypatch.chdir(tmp_path / "here")
    assert list(open_data("flowers", data_root=tmp_path / "root").keys) == ["a/1.png"]
    assert list(open_data("folder/flowers", data_root=tmp_path / "root").keys) == ["a/1.png"]
    assert list(open_data("folder/birds", data_root=tmp_path / "root").keys) == ["a/2.png"]
    assert keys_of("folder/fish") == ["a/3.png"]
    with pytest.raises(NotFoundError):
        open_data("flowers")


def test_location_reopens_the_same_data_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "a@b=c/set", *(f"train/{name}/{index}.png" for name in ("x", "y") for index in range(9)))
    monkeypatch.chdir(tmp_path / "a@b=c")
    data = open_data("./set/../set@split=train,classes=x,shots=4,seed=7")
    monkeypatch.chdir("/")
    again = open_data(data.location)
    assert again.keys == data.keys
    assert again.location == data.location
    assert again.spec.source == f"folder/{tmp_path}/a@b=c/set"


def test_labels_csv_carries_further_tasks(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    (tmp_path / "labels.csv").write_text(
        "\ufeffkey,size,tail\ndog/1.png,big,\ncat/2.png,small,yes\ncat/1.png,big,no\nx,tiny,no\n"
    )
    size = open_data(f"{tmp_path}@labels=size")
    assert size.class_names == ("big", "small", "tiny")
    assert size.labels.tolist() == [0, 1, 0, -1]
    assert open_data(f"{tmp_path}@labels=tail").labels.tolist() == [0, 1, -1, -1]
    assert open_data(str(tmp_path)).class_names == ("cat", "dog")
    assert open_data(f"{tmp_path}@labels=class").class_names == ("cat", "dog")
    with pytest.raises(UsageError, match="Did you mean 'size'"):
        open_data(f"{tmp_path}@labels=sizes")


def test_labels_csv_serves_splits_and_folders_without_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "test/1.png")
    (tmp_path / "labels.csv").write_text("key,kind\ntrain/1.png,b\ntest/1.png,a\n")
    data = open_data(f"{tmp_path}@split=train,labels=kind")
    assert (data.class_names, data.labels.tolist()) == (("a", "b"), [1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"name,kind\na.png,x\n", "columns"),
        (b"", "is empty"),
        (b"key,kind,kind\na.png,x,y\n", "columns"),
        (b"key,kind\na.png,x\na.png,y\n", "more than once"),
        (b"key,kind\nb.png,x\n", "none of the images"),
        (b"key,kind\n", "none of the images"),
        (b"key,kind\n\xff\xfe,x\n", "UTF-8"),
    ],
)
def test_a_labels_csv_that_cannot_be_used_is_bad_data(tmp_path: Path, text: bytes, said: str) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(BadDataError, match=said):
        open_data(f"{tmp_path}@labels=kind")


def test_unknown_tasks_without_a_labels_csv(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no labels 'style'"):
        open_data(f"{fill(tmp_path, 'cat/1.png')}@labels=style")


def test_data_is_picklable_and_small_per_row(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path, *(f"c{index % 3}/{index}.png" for index in range(30)))))
    again = pickle.loads(pickle.dumps(data))
    assert again.keys == data.keys
    assert again.encoded(7) == data.encoded(7)
    part = again.select(np.array([5, 2]))
    assert list(part.keys) == [data.keys[5], data.keys[2]]
    assert part.labels.tolist() == data.labels[[5, 2]].tolist()
    assert part.path(0) == data.path(5)


def test_a_bad_image_is_named_by_its_path(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png")
    (tmp_path / "cat/b.png").write_bytes((tmp_path / "cat/a.png").read_bytes()[:40])
    data = open_data(str(tmp_path))
    with pytest.raises(BadDataError, match=r"cat/b\.png: "):
        data.image(1)
