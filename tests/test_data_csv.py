"""``csv/FILE``: tables of paths."""

import csv
import io
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Shell
from hypothesis import given
from hypothesis import strategies as st
from source_tools import require_as_the_folder

from kdcli.data.multilabel import labels_of
from kdcli.data.sources import ImageData, open_data
from kdcli.data.tables import read_table
from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError


def table(folder: Path, text: str, name: str = "t.csv") -> str:
    (folder / name).write_text(text)
    return f"csv/{folder / name}"


def names_of(data: ImageData) -> list[str]:
    assert data.class_names is not None
    return [data.class_names[label] if label >= 0 else "" for label in data.labels]


def test_what_a_table_gives_a_teacher_is_what_the_folder_gives(
    kd: Callable[..., Shell], images: Path, teachers: dict[str, str]
) -> None:
    rows = "".join(
        f"images/{path.parent.name}/{path.name},{path.parent.name}\n" for path in images.glob("*/*")
    )
    text = table(images.parent, f"file,class\n{rows}", "all.csv")
    require_as_the_folder(kd, images, text, lambda key: f"images/{key}", teachers["a"])


def test_a_table_beside_its_images_is_the_folder_itself_to_a_cache(
    kd: Callable[..., Shell], images: Path, teachers: dict[str, str]
) -> None:
    rows = [f"{path.parent.name}/{path.name},{path.parent.name}\n" for path in images.glob("*/*")]
    text = table(images, f"path,label\n{''.join(reversed(rows))}")
    cached = kd("cache-teachers", images, "--cache", "c.kd", "--teacher", f"t={teachers['a']}")
    assert cached.code == 0, cached.err
    again = kd("cache-teachers", text, "--cache", "c.kd", "--teacher", f"t={teachers['a']}", "--json")
    assert again.code == 0, again.err
    assert again.json["teachers"]["t"]["tasks"]["written"] == 0


def test_columns_splits_and_labels(images: Path) -> None:
    text = table(
        images.parent,
        "id;file;kind;fold;tags\n"
        "1;images/class0/000.png;cat;train;red|big\n"
        "2;./images/class1/001.png; dog ;train;red\n"
        f"3;{images}/class2/002.png;cat;test;\n"
        "4;images/class0/001.png;;test;big\n",
    )
    spec = f"{text}@path=file,label=kind,split-column=fold"
    with pytest.raises(UsageError, match=r"splits \(test, train\)") as raised:
        open_data(spec)
    assert "@split=train" in raised.value.hint
    train, test = open_data(f"{spec},split=training"), open_data(f"{spec},split=test")
    assert list(train.keys) == ["images/class0/000.png", "images/class1/001.png"]
    assert (names_of(train), names_of(test)) == (["cat", "dog"], ["", "cat"])
    assert train.class_names == test.class_names
    assert test.notes == (f"{text[4:]}: 1 of 2 images have no kind",)
    with pytest.raises(NotFoundError, match="no split 'val'"):
        open_data(f"{spec},split=val")
    tags = open_data(f"{spec},split=train,labels=tags")
    found, has = labels_of(tags, "|")
    assert [[found[place] for place in has[label].nonzero()[0]] for label in tags.labels] == [
        ["big", "red"],
        ["red"],
    ]
    again = pickle.loads(pickle.dumps(open_data(test.location)))
    assert (again.keys, again.encoded(1)) == (test.keys, (images / "class2/002.png").read_bytes())
    assert again.path(1) == str(images / "class2/002.png")


def test_numbers_become_names_where_names_are_given(images: Path) -> None:
    text = table(images, "path,label\nclass0/000.png,2\nclass0/001.png,0\nclass0/002.png,10\n")
    assert open_data(text).class_names == ("0", "10", "2")
    (images / "names.txt").write_text("\n".join(f"n{number}" for number in range(12)))
    data = open_data(f"{text}@names=names.txt")
    assert (data.class_names[:2], data.labels.tolist()) == (("n0", "n1"), [2, 0, 10])
    assert open_data(f"{text}@names=11").labels.tolist() == [2, 0, 10]
    for names, said in (
        ("10", "'10' is none of the 10"),
        ("nams.txt", "names.txt'"),
        ("0", "no number of classes"),
    ):
        with pytest.raises(KdError, match=said):
            open_data(f"{text}@names={names}")


def test_a_table_without_labels_says_so(images: Path) -> None:
    data = open_data(table(images, ",file,kind\n0,class0/000.png,cat\n"))
    assert data.class_names is None
    assert "label=COLUMN ('', file, kind)" in data.notes[0]


REFUSED = {
    "up": ("path\nclass0/../../a.png\n", BadDataError, "line 2: the path .* leads out of"),
    "absolute": ("path\n/etc/passwd\n", BadDataError, "leads out of"),
    "root itself": ("path\n.\n", BadDataError, "leads out of"),
    "address": ("path\ns3://bucket/a.png\n", BadDataError, "is an address"),
    "empty": ('path,label\nclass0/000.png,a\n"",b\n', BadDataError, "line 3: '' is no path"),
    "nul": ("path\na\0b\n", BadDataError, "is no path|NUL"),
    "long": (f"path\n{'x' * 300}.png\n", BadDataError, "longer than a path may be"),
    "twice": ("path,label\nclass0/000.png,a\n./class0/000.png,b\n", BadDataError, "in line 2 and in line 3"),
    "open quote": ('path,label\n"class0/000.png,a\nclass0/001.png,b\n', BadDataError, "not CSV"),
    "too many values": (
        "path,label\nclass0/000.png,a,b\n",
        BadDataError,
        "3 values, and there are 2 columns",
    ),
    "alike columns": ("path,label,label\nclass0/000.png,a,b\n", BadDataError, "has the columns"),
    "no rows": ("path,label\n", BadDataError, "has no rows"),
    "no header": ("class0/000.png,a\n", BadDataError, "no column that is usually called"),
    "nothing": ("", BadDataError, "is empty"),
    "two path columns": (
        "path,image\nclass0/000.png,1\n",
        UsageError,
        "'path' and 'image' may both be the path",
    ),
    "not there": ("path\nclas0/000.png\n", BadDataError, "none of 1 file that kd looked for"),
    "alike classes": (
        "path,label\nclass0/000.png,Cat\nclass0/001.png,cat\n",
        BadDataError,
        "differ only by case",
    ),
    "alike splits": (
        "path,split\nclass0/000.png,Val\nclass0/001.png,val\n",
        BadDataError,
        "differ only by case",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_table_may_not_say(images: Path, name: str) -> None:
    text, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said) as raised:
        open_data(table(images, text))
    assert raised.value.hint


def test_columns_that_are_not_there_are_named_with_the_nearest(
    images: Path, kd: Callable[..., Shell]
) -> None:
    text = table(images, "path,label,kind\nclass0/000.png,a,b\n")
    kd("data", "check", f"{text}@label=labl").refused(2, "has no column 'labl'", "Did you mean 'label'?")
    kd("data", "check", f"{text}@path=paths").refused(2, "Did you mean 'path'?")
    kd("data", "check", f"{text}@labels=kinds").refused(2, "Did you mean 'kind'?")
    kd("data", "check", f"{text}@pth=path").refused(2, "Did you mean 'path'?")
    kd("data", "check", f"csv/{images}/tt.csv").refused(11, "Did you mean", "t.csv")
    kd("data", "check", f"{text}@root=nowhere").refused(11, "no folder")
    kd("data", "check", f"csv/{images}").refused(12, "a folder, not a file")
    kd("data", "check", f"{images}/t.csv").refused(12, f"csv/{images}/t.csv")


def test_links_lead_nowhere_outside_and_files_that_are_gone_are_bad_images(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes((images / "class0/000.png").read_bytes())
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "inside.png").symlink_to(images / "class0/000.png")
    os.mkfifo(images / "pipe.png")
    data = open_data(table(images, "path\nlink.png\ninside.png\ngone.png\npipe.png\n"))
    assert list(data.keys) == ["gone.png", "inside.png", "link.png", "pipe.png"]
    assert data.encoded(1) == (images / "class0/000.png").read_bytes()
    for row, said in ((0, "no such file"), (2, "leads out of"), (3, "a pipe")):
        with pytest.raises(BadDataError, match=said):
            data.encoded(row)
    assert open_data(f"{table(images, 'path' + chr(10) + 'images/link.png')}@root=..").encoded(0)


values = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    st.lists(st.tuples(values, values, values), max_size=8), st.sampled_from(",;\t"), st.sampled_from("\n\r")
)
def test_a_table_is_read_as_pythons_writer_wrote_it(
    rows: list[tuple[str, str, str]], mark: str, end: str
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(
        file, delimiter=mark, lineterminator="\r\n" if end == "\r" else "\n", quoting=csv.QUOTE_ALL
    )
    writer.writerows([("a", "b", "c"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        path.write_bytes(file.getvalue().encode())
        found = read_table(path)
    assert found.header == ("a", "b", "c")
    assert [tuple(row) for _, row in found.rows] == rows
    assert found.column("b") == [row[1] for row in rows]


@given(st.binary(max_size=200))
def test_whatever_stands_in_a_table_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        path.write_bytes(b"path,label\n" + content)
        with suppress(KdError):
            open_data(f"csv/{path}")
