"""``parquet/PATH``. Oracle: pyarrow itself."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shell
from PIL import Image
from source_tools import require_as_the_folder

from kdcli.data import parquet
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, NotFoundError, UsageError

pa = pytest.importorskip("pyarrow", reason="needs the extra parquet: pip install 'kdcli[parquet]'")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet: pip install 'kdcli[parquet]'")


def png(gray: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (gray, gray, gray)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, columns: dict[str, Any], group: int = 3, names: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path, row_group_size=group)
    return path


def names_of(data: ImageData) -> list[str]:
    assert data.class_names is not None
    return [data.class_names[label] if label >= 0 else "" for label in data.labels]


def test_what_parquet_gives_a_teacher_is_what_the_folder_gives(
    kd: Callable[..., Shell], images: Path, teachers: dict[str, str]
) -> None:
    files = sorted(images.glob("*/*"), key=lambda path: path.name)
    for number in range(2):
        mine = files[number::2]
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in mine]
        keys = [path.relative_to(images).as_posix() for path in mine]
        write(
            images.parent / f"p/{number}.parquet",
            {"image": cells, "label": [path.parent.name for path in mine], "id": keys},
            5,
        )
    require_as_the_folder(kd, images, f"parquet/{images.parent}/p@key=id", lambda key: key, teachers["a"])


@pytest.mark.parametrize("group", [1, 4, 100])
@pytest.mark.parametrize("struct", [True, False])
def test_rows_are_what_pyarrow_reads(tmp_path: Path, group: int, struct: bool) -> None:
    for name, first in (("b", 0), ("a", 11)):
        bytes_ = [png(first + row) for row in range(11)]
        cells = [{"bytes": each, "path": None} for each in bytes_] if struct else bytes_
        write(tmp_path / f"{name}.parquet", {"x": list(range(11)), "picture": cells}, group)
    data = open_data(f"parquet/{tmp_path}@label=x,names=11")
    assert list(data.keys) == [f"{name}.parquet/{row:07d}" for name in "ab" for row in range(11)]
    both = [pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in "ab"]
    for place in (3, 21, 0, 10, 11, 12, 1):
        cell = [*both[0], *both[1]][place]
        assert data.encoded(place) == (cell["picture"]["bytes"] if struct else cell["picture"])
        assert data.labels[place] == cell["x"]
    again = pickle.loads(pickle.dumps(open_data(data.location)))
    assert (again.keys, again.encoded(4)) == (data.keys, data.encoded(4))
    assert not data.notes


def test_labels_of_all_kinds(tmp_path: Path) -> None:
    held = [png(row) for row in range(4)]
    text = f"parquet/{write(tmp_path / 'a.parquet', {'image': held, 'label': [2, 1, -1, None]}, names=['1', '2', '3'])}"
    data = open_data(text)
    assert (data.class_names, data.labels.tolist()) == (("1", "2", "3"), [2, 1, -1, -1])
    assert f"{text}: 2 of 4 images have no label" in data.notes
    columns = {
        "image": held,
        "label": [2, 1, 0, 0],
        "name": ["b", " a", "", None],
        "tags": [["x", "y"], ["y"], [], None],
    }
    text = f"parquet/{write(tmp_path / 'b.parquet', columns)}"
    with pytest.raises(UsageError, match="numbers, from 0 to 2"):
        open_data(text)
    assert names_of(open_data(f"{text}@names=3")) == ["2", "1", "0", "0"]
    assert names_of(open_data(f"{text}@label=name")) == ["b", "a", "", ""]
    assert names_of(open_data(f"{text}@labels=tags")) == ["x|y", "y", "|", ""]
    (tmp_path / "names.txt").write_text("1\n2\n0\n")
    with pytest.raises(BadDataError, match="name of one class of names= and the number of another"):
        open_data(f"{text}@names=names.txt")
    write(tmp_path / "c.parquet", {"image": held, "label": [0, 1, 2, 3]}, names=["a", "b"])
    with pytest.raises(BadDataError, match="2 is no number of its 2 classes"):
        open_data(f"parquet/{tmp_path}/c.parquet")
    write(tmp_path / "d.parquet", {"image": held, "label": [0.0, 1.0, 2.0, 3.0]})
    with pytest.raises(BadDataError, match="is no label"):
        open_data(f"parquet/{tmp_path}/d.parquet")
    unlabelled = open_data(f"parquet/{write(tmp_path / 'e.parquet', {'image': held, 'n': [1, 2, 3, 4]})}")
    assert unlabelled.class_names is None
    assert "label=COLUMN (image, n)" in unlabelled.notes[0]


def test_splits_and_keys(tmp_path: Path) -> None:
    for name, first in (("train-0", 0), ("train-1", 2), ("test-0", 4)):
        columns = {"image": [png(first), png(first + 1)], "label": ["a", "b"], "id": [9 - first, 8 - first]}
        write(tmp_path / f"{name}.parquet", columns)
    with pytest.raises(UsageError, match=r"splits \(test, train\)"):
        open_data(f"parquet/{tmp_path}")
    data = open_data(f"parquet/{tmp_path}@split=train,key=id")
    assert list(data.keys) == ["6", "7", "8", "9"]
    assert [data.image(row).getpixel((0, 0))[0] for row in range(4)] == [3, 2, 1, 0]  # type: ignore[index]
    assert names_of(data) == ["b", "a", "b", "a"]
    write(tmp_path / "train-1.parquet", {"image": [png(1)], "label": ["a"], "id": [9]})
    with pytest.raises(BadDataError, match="has the key 9 more than once"):
        open_data(f"parquet/{tmp_path}@split=train,key=id")
    write(
        tmp_path / "train-1.parquet", {"image": [png(1)], "label": ["a"], "id": pa.array([None], pa.string())}
    )
    with pytest.raises(BadDataError, match="row 0: 'None' is no key"):
        open_data(f"parquet/{tmp_path}@split=train,key=id")


def test_splits_of_a_column(tmp_path: Path, kd: Callable[..., Shell]) -> None:
    for name, first in (("a", 0), ("b", 4)):
        columns = {
            "image": [png(first + row) for row in range(4)], "label": ["x", "y", "x", "z"],
            "part": ["train", "val", "train", ""],
        }  # fmt: skip
        write(tmp_path / f"{name}.parquet", columns, 3)
    with pytest.raises(UsageError, match=r"splits \(train, val, and 2 in none\)"):
        open_data(f"parquet/{tmp_path}@split-column=part")
    data = open_data(f"parquet/{tmp_path}@split-column=part,split=train")
    assert list(data.keys) == [f"{name}.parquet/000000{row}" for name in "ab" for row in (0, 2)]
    assert [data.image(row).getpixel((0, 0))[0] for row in range(4)] == [0, 2, 4, 6]  # type: ignore[index]
    assert (names_of(data), data.class_names) == (["x"] * 4, ("x", "y", "z"))
    assert open_data(f"{data.spec}").keys == data.keys
    kd("data", "check", f"parquet/{tmp_path}@split-column=prt").refused(
        2, "no column 'prt'", "Did you mean 'part'"
    )


@pytest.mark.parametrize(("group", "slow"), [(100, True), (8, False)])
def test_random_order_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, slow: bool
) -> None:
    """A disk that takes 200 ms for a read: what is said is what was waited for."""
    random = np.random.default_rng(0)
    held = [random.bytes(2000) for _ in range(100)]
    data = open_data(f"parquet/{write(tmp_path / 'a.parquet', {'image': held}, group)}")
    monkeypatch.setattr(parquet, "_SLOW", 100.0)
    assert data.source.random_cost() == ""  # read in no time
    real = parquet.FileStamp.opened
    monkeypatch.setattr(parquet.FileStamp, "opened", lambda self: time.sleep(0.2) or real(self))
    said = data.source.random_cost()
    assert bool(said) == slow
    if slow:
        cost, each = (float(found) for found in re.findall(r"([\d.]+) ms", said))
        assert 200 <= cost < 20_000
        assert each == pytest.approx(cost / 100, rel=0.1)
        assert "group of 100 (" in said
        assert "row_group_size=8" in said


def test_what_is_refused(tmp_path: Path, kd: Callable[..., Shell]) -> None:
    path = write(tmp_path / "a.parquet", {"image": [png(1)], "label": ["a"], "thumb": [b"x"], "n": [1]})
    kd("data", "check", "parquet/a.parquet").refused(2, "may all be images", "image=image")
    kd("data", "check", "parquet/a.parquet@image=imag").refused(2, "no column 'imag'", "Did you mean 'image'")
    kd("data", "check", "parquet/a.parquet@image=n").refused(12, "the column n holds no images")
    kd("data", "check", "parquet/a.parquet@image=image,label=lable").refused(2, "Did you mean 'label'")
    kd("data", "check", "parquet/a.parquet@image=image,key=idd").refused(2, "no column 'idd'")
    kd("data", "check", "parquet/b.parquet").refused(11, "no file", "Did you mean")
    whole = path.read_bytes()
    for content in (b"", whole[:-9], whole[:40], b"PAR1" + bytes(50) + b"PAR1", png(1)):
        (tmp_path / "c.parquet").write_bytes(content)
        with pytest.raises(BadDataError, match="is no Parquet file, or damaged"):
            open_data(f"parquet/{tmp_path}/c.parquet")
    os.mkfifo(tmp_path / "d.parquet")
    with pytest.raises(BadDataError, match="is a pipe"):
        open_data(f"parquet/{tmp_path}/d.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"no .parquet file"):
        open_data(f"parquet/{tmp_path}/empty")
    kd("data", "check", "a.parquet").refused(12, "parquet/")


def test_rows_without_an_image_and_files_that_change(tmp_path: Path) -> None:
    cells = [
        {"bytes": None, "path": "/etc/passwd"},
        None,
        {"bytes": b"", "path": None},
        {"bytes": png(1), "path": "x"},
    ]
    path = write(tmp_path / "a.parquet", {"image": cells})
    data = open_data(f"parquet/{path}")
    for row, said in ((0, "names the file /etc/passwd and holds none"), (1, "no image"), (2, "empty file")):
        with pytest.raises(BadDataError, match=said):
            data.image(row)
    assert data.image(3).size == (4, 3)
    write(path, {"image": [png(5)] * 4, "n": [1] * 4})
    with pytest.raises(BadDataError, match="has changed since"):
        data.encoded(0)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["pyarrow"] = sys.modules["pyarrow.parquet"] = None
from kdcli.data.sources import open_data
from kdcli.errors import MissingExtraError
try:
    open_data("parquet/{tmp_path}/a.parquet")
except MissingExtraError as error:
    print(error.hint)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "pip install 'kdcli[parquet]'\n"
