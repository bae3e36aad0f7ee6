"""Folders as people have them: what is left out is said, once a kind; what would lose or make a class is refused."""

import contextlib
import os
import re
import socket
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from kdcli.data import formats
from kdcli.data.decode import decode_image
from kdcli.data.formats import EXTENSIONS, format_of, make_known
from kdcli.data.names import alike, folded, told_apart
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, KdError, MissingExtraError, NotFoundError, StorageError, UsageError

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
Value = TypeVar("Value")


def png(level: int = 0) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 3), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, *names: str, data: bytes | None = None) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number) if data is None else data)
    return root


def soon(function: Callable[[], Value], seconds: float = 20.0) -> Value:
    """What a function gives, or a failure where it hangs."""
    found: list[Value | BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without the packages of the extra."""
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    formats.lacks.cache_clear()
    yield
    formats.lacks.cache_clear()


# --- files are files --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "dead link", "circle", "endless"])
def test_what_is_no_file_is_a_bad_image_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    fill(tmp_path, "cat/a.png", "dog/a.png")
    bad = tmp_path / "cat/x.jpg"
    keep = socket.socket(socket.AF_UNIX)
    match kind:
        case "pipe":
            os.mkfifo(bad)
        case "socket":
            here = Path.cwd()
            os.chdir(bad.parent)  # the path of a socket may have 107 bytes only
            keep.bind(bad.name)
            os.chdir(here)
        case "device":
            bad.symlink_to("/dev/zero")
        case "folder":
            (tmp_path / "elsewhere").mkdir()
            bad.symlink_to(tmp_path / "elsewhere")
        case "dead link":
            bad.symlink_to(tmp_path / "gone")
        case "circle":
            bad.symlink_to(bad)
        case _:
            bad.symlink_to("/dev/stdin")
    try:
        if kind == "folder":
            (tmp_path / "elsewhere").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
            bad.unlink()
            bad.symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
        data = soon(lambda: open_data(str(tmp_path)))
        assert list(data.keys) == ["cat/a.png", "cat/x.jpg", "dog/a.png"]
        with pytest.raises(BadDataError, match=r"x\.jpg") as raised:
            soon(lambda: data.image(1))
        assert "--bad-images drop" in raised.value.hint
    finally:
        keep.close()


def test_an_image_that_is_too_large_is_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "cat/a.png", "dog/a.png")
    with (tmp_path / "cat/a.png").open("r+b") as file:
        file.truncate(513 * 2**20)  # a hole: it takes no room
    with pytest.raises(BadDataError, match="at most 536870912 are read"):
        open_data(str(tmp_path)).image(0)


def test_a_file_that_grows_is_read_whole(tmp_path: Path) -> None:
    assert open_data(str(fill(tmp_path, "a.png"))).encoded(0) == (tmp_path / "a.png").read_bytes()
    from kdcli.reading import read_bytes

    assert read_bytes(Path("/proc/self/cmdline")) == Path("/proc/self/cmdline").read_bytes()  # tells no size
    with pytest.raises(BadDataError, match="more than 5 bytes"):
        read_bytes(Path("/proc/self/status"), 5)


@pytest.mark.parametrize("what", ["without", "labels", "recipe"])
def test_other_files_that_are_none_are_refused_at_once(tmp_path: Path, what: str) -> None:
    fill(tmp_path / "d", "cat/a.png", "dog/a.png")
    place = tmp_path / ("d/labels.csv" if what == "labels" else "pipe.yaml")
    os.mkfifo(place)
    if what == "recipe":
        from kdcli.data.recipes import find_recipe

        with pytest.raises(KdError, match="is a pipe") as raised:
            soon(lambda: find_recipe(str(place)))
        assert raised.value.exit_code == 10
        return
    spec = f"{tmp_path}/d@" + (f"without={place}" if what == "without" else "labels=x")
    with pytest.raises(BadDataError, match="is a pipe"):
        soon(lambda: open_data(spec))


@given(st.binary(max_size=80))
@example(b"")
@example(b"\xef\xbb\xbfcat/a.png\r\n\r\ncat/b.png")
@example(b"cat/a.png\0\n")
@example(b"cat/a.png\ncat/b.png\ndog/a.png\n")
def test_a_without_file_of_any_bytes_leaves_out_its_lines_or_is_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = fill(Path(folder) / "d", "cat/a.png", "cat/b.png", "dog/a.png")
        (Path(folder) / "w").write_bytes(content)
        try:
            kept = set(open_data(f"{root}@without={folder}/w").keys)
        except BadDataError:
            return
        lines = {line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")}
        assert kept == {"cat/a.png", "cat/b.png", "dog/a.png"} - lines


# --- what is left out -------------------------------------------------------------------------


def notes_of(text: str | Path) -> list[str]:
    return list(open_data(str(text)).notes)


def one(notes: list[str], word: str) -> str:
    (found,) = [note for note in notes if word in note]
    return found


def test_a_good_folder_has_nothing_to_say(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.JPG", "dog/deep/c.gif", "cat/.hidden.apng", ".git/x.png")
    fill(tmp_path, "cat/notes.txt", "README", "dog/list.csv", data=b"some text")
    assert notes_of(tmp_path) == []


def test_each_kind_of_thing_that_is_left_out_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.png")
    fill(tmp_path, "cat/a.apng", "cat/b.ico", "dog/c.cr2", "dog/d.jxr", data=b"x")
    fill(tmp_path, "cat/IMG_1", "dog/IMG_2")
    fill(tmp_path, "@eaDir/a.png", "cat/@eaDir/b.png", "$RECYCLE.BIN/c.png", "lost+found/d.png")
    fill(tmp_path, "System Volume Information/e.png", "__MACOSX/f.png", "dog/.ipynb_checkpoints/g.png")
    (tmp_path / "bird").mkdir()
    fill(tmp_path, "fish/notes.txt", data=b"x")
    data = open_data(str(tmp_path))
    assert list(data.keys) == ["cat/a.png", "dog/b.png"]
    assert data.class_names == ("cat", "dog")
    assert len(data.notes) == 4
    assert ".apng 1, .cr2 1, .ico 1, .jxr 1" in one(list(data.notes), "4 images of kinds")
    assert "IMG_" in one(list(data.notes), "2 images whose names have no ending")
    assert "@eaDir 2" in one(list(data.notes), "7 folders of the system")
    assert re.search(r"such as (bird|fish)", one(list(data.notes), "2 folders hold no images"))
    printed = capsys.readouterr().err
    assert all(printed.count(note) == 1 for note in data.notes)


@pytest.mark.parametrize("names", [("dog/a.ico", "dog/b.apng"), ("dog/IMG1",)])
def test_a_class_that_would_vanish_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    fill(tmp_path, "cat/a.png", *names)
    with pytest.raises(BadDataError, match="the class 'dog' would vanish") as raised:
        open_data(str(tmp_path))
    assert raised.value.hint


def test_a_folder_of_archives_says_to_unpack_them(tmp_path: Path) -> None:
    fill(tmp_path, "train-0.tar", "train-1.tar", data=b"x")
    with pytest.raises(BadDataError, match="2 archives") as raised:
        open_data(str(tmp_path))
    assert "tar -xf" in raised.value.hint
    with pytest.raises(BadDataError, match="is a file") as raised:
        open_data(str(tmp_path / "train-0.tar"))
    assert "Unpack" in raised.value.hint


@pytest.mark.parametrize(
    "names",
    [
        ("Dog/a.png", "dog/b.png"),
        (f"{NFC}/a.png", f"{NFD}/b.png"),
        ("STRASSE/a.png", "straße/b.png"),
        ("b/a.png", "b\u200b/b.png"),
        ("cat/a.png", "ca\u2060t/b.png"),
    ],
)
def test_two_classes_that_look_like_one_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    fill(tmp_path / "one", *names)
    fill(tmp_path / "two", f"train/{names[0]}", f"test/{names[1]}")
    with pytest.raises(BadDataError, match="differ only by case, Unicode form or"):
        open_data(str(tmp_path / "one"))
    for split in ("train", "test"):
        with pytest.raises(BadDataError, match="differ only by case, Unicode form or"):
            open_data(f"{tmp_path}/two@split={split}")


def test_labels_that_look_like_one_or_hold_a_nul_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "2.png")
    for other, said in (("a\x01", "invisible characters"), ("a\ufeff", "invisible"), ("a\0", "holds a NUL")):
        (tmp_path / "labels.csv").write_text(f"key,label\n1.png,a\n2.png,{other}\n")
        with pytest.raises(BadDataError, match=said) as caught:
            open_data(f"{tmp_path}@labels=label")
        assert caught.value.exit_code == 12


def test_letters_may_be_classes(tmp_path: Path) -> None:
    assert open_data(str(fill(tmp_path, "A/1.png", "a/2.png"))).class_names == ("A", "a")


def test_names_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    fill(tmp_path, f"{NFC}/a.png", f"{NFD}/b.png")
    with pytest.raises(BadDataError, match=r"\(composed, NFC\).*\(decomposed, NFD\)|NFD\).*NFC\)"):
        open_data(str(tmp_path))
    fill(tmp_path / "x", f"{NFD}/a.png", "tea/b.png")
    with pytest.raises(UsageError, match=r"no class '.*' \(composed, NFC\), but '.*' \(decomposed, NFD\)"):
        open_data(f"{tmp_path}/x@classes={NFC}")


@given(st.text("aAbBé\u0301ſß", min_size=1, max_size=4), st.text("aAbBé\u0301ſß", min_size=1, max_size=4))
def test_alike_is_what_unicode_calls_a_caseless_match(one: str, other: str) -> None:
    """The Unicode standard, definition D145: NFD(toCasefold(NFD(X)))."""

    def canonical(text: str) -> str:
        nfd = unicodedata.normalize
        return nfd("NFD", nfd("NFD", text).casefold())

    if canonical(one) == canonical(other):
        assert folded(one) == folded(other)
    if one != other and len(one) > 1 and len(other) > 1:
        assert bool(alike([one, other])) == (folded(one) == folded(other))
    assert len(set(told_apart(one, other))) == (1 if one == other else 2)


def test_test_classes_without_training_images_are_said_from_either_side(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/fox/1.png")
    for split in ("train", "test"):
        note = one(notes_of(f"{tmp_path}@split={split}"), "no training images")
        assert "1 of 2 classes of 'test'" in note
        assert "'fox'" in note


def test_files_that_differ_only_by_case_are_said(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path, "cat/a.png", "cat/A.png", "dog/b.png")))
    assert len(data) == 3
    assert "'cat/A.png' and 'cat/a.png'" in one(list(data.notes), "1 pairs of names")


# --- labels.csv -------------------------------------------------------------------------------


def test_blanks_around_labels_are_left_out_and_said(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "labels.csv").write_text("key,colour\na.png, red \nb.png,red\nc.png,blue\n")
    data = open_data(f"{tmp_path}@labels=colour")
    assert (data.class_names, data.labels.tolist()) == (("blue", "red"), [1, 1, 0])
    assert "1 values of colour have blanks" in one(list(data.notes), "blanks")


def test_keys_in_another_case_are_said_and_refused_where_a_class_goes_with_them(tmp_path: Path) -> None:
    fill(tmp_path, "Cat/1.png", "Cat/2.png", "Dog/1.png")
    rows = "key,kind\nCat/1.png,x\ncat/2.PNG,x\nDog/1.png,y\nfox/9.png,x\n"
    (tmp_path / "labels.csv").write_text(rows)
    data = open_data(f"{tmp_path}@labels=kind")
    assert data.labels.tolist() == [0, -1, 1]
    note = one(list(data.notes), "2 keys are no images here")
    assert "'cat/2.PNG' where the image is 'Cat/2.png' (1 keys differ so)" in note
    assert "Cat/2.png" in one(list(data.notes), "1 of 3 images have no row")
    (tmp_path / "labels.csv").write_text(rows.replace("Dog/1", "dog/1"))
    with pytest.raises(BadDataError, match=r"no image of the class 'y'.*'dog/1.png' is not 'Dog/1.png'"):
        open_data(f"{tmp_path}@labels=kind")


def test_rows_of_other_splits_are_not_missed(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "test/1.png")
    (tmp_path / "labels.csv").write_text("key,kind\ntrain/1.png,b\ntest/1.png,a\n")
    assert notes_of(f"{tmp_path}@split=train,labels=kind") == []


def test_a_row_with_too_many_values_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text("key,kind\na.png,red, green\n")
    with pytest.raises(BadDataError, match=r"line 2: 3 values, and there are 2 columns"):
        open_data(f"{tmp_path}@labels=kind")


CELL = st.text(st.sampled_from('ab, "\n\réA'), max_size=4)


@given(st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "A.png", "z", ""]), CELL), max_size=5))
def test_labels_csv_gives_each_key_its_own_row_or_is_refused(rows: list[tuple[str, str]]) -> None:
    import csv

    with tempfile.TemporaryDirectory() as folder:
        root = fill(Path(folder), "a.png", "b.png")
        with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("key", "kind"), *rows])
        try:
            data = open_data(f"{root}@labels=kind")
        except BadDataError:
            return
        wanted = {key: value.strip() for key, value in rows}
        names = data.class_names or ()
        found = [names[label] if label >= 0 else "" for label in data.labels]
        assert found == [wanted.get(key, "") for key in data.keys]
        assert len({folded(name) for name in names if len(name) > 1}) == len([n for n in names if len(n) > 1])


@given(st.binary(max_size=60))
def test_labels_csv_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = fill(Path(folder), "a.png")
        (root / "labels.csv").write_bytes(content)
        with contextlib.suppress(BadDataError, UsageError):
            open_data(f"{root}@labels=kind")


# --- formats of the extra ---------------------------------------------------------------------


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    make_known({"HEIF": "HEIC", "JXL": "JPEG XL"}.get(kind, kind))
    buffer = BytesIO()
    (image or Image.new("RGB", (32, 24), (200, 30, 90))).save(buffer, kind, **options)
    return buffer.getvalue()


EXTRA_FORMATS = [("HEIF", "HEIC", ".heic"), ("JXL", "JPEG XL", ".jxl"), ("AVIF", "AVIF", ".avif")]


@pytest.mark.parametrize(("kind", "name", "ending"), EXTRA_FORMATS)
def test_formats_of_the_extra_are_read(tmp_path: Path, kind: str, name: str, ending: str) -> None:
    encoded = saved(kind)
    assert format_of(encoded[:64]) == name
    fill(tmp_path, f"cat/a{ending}", f"dog/iphone{ending}", data=encoded)
    fill(tmp_path, "dog/renamed.jpg", data=encoded)
    data = open_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    for row in range(3):
        image = data.image(row)
        assert image.size == (32, 24)
        assert np.abs(np.asarray(image)[12, 16].astype(int) - (200, 30, 90)).max() < 12


@pytest.mark.parametrize(("kind", "ending"), [("HEIF", ".heic"), ("JXL", ".jxl")])
def test_without_the_extra_the_samples_are_the_same_and_it_is_named(
    tmp_path: Path, kind: str, ending: str, request: pytest.FixtureRequest
) -> None:
    fill(tmp_path, f"cat/a{ending}", data=saved(kind))
    fill(tmp_path, "cat/b.png", "dog/c.png")
    there = open_data(str(tmp_path))
    request.getfixturevalue("without_extras")
    Image.init()
    here = open_data(str(tmp_path))
    assert here.keys == there.keys
    assert "kdcli[formats]" in one(list(here.notes), "1 images cannot be read by this installation")
    (tmp_path / "cat/b.png").unlink()
    fill(tmp_path, f"ant/a{ending}", data=saved(kind))
    fill(tmp_path, "ant/b.png")
    with pytest.raises(MissingExtraError, match=r"no image of the class 'cat' \(1, such as cat/a") as raised:
        open_data(str(tmp_path))
    assert raised.value.exit_code == 13
    assert "kdcli[formats]" in raised.value.hint


def test_a_decoder_that_is_not_there_is_named(without_extras: None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = b"\0\0\0\x1cftypheic" + bytes(200)
    with pytest.raises(BadDataError, match=r"x\.jpg: HEIC, which this installation cannot read") as raised:
        decode_image(encoded, "x.jpg")
    assert "kdcli[formats]" in raised.value.hint


@pytest.mark.parametrize("kind", ["HEIF", "JXL", "JPEG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_rotations_are_followed_once(kind: str, orientation: int) -> None:
    """However a format keeps it: the red corner is where Pillow's own exif_transpose of a PNG puts it."""
    from PIL import ImageOps

    picture = Image.new("RGB", (48, 32), "blue")
    picture.paste((255, 0, 0), (0, 0, 24, 16))
    exif = Image.Exif()
    exif[274] = orientation
    plain = BytesIO()
    picture.save(plain, "PNG", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(plain)).convert("RGB")
    found = decode_image(saved(kind, picture, exif=exif.tobytes(), quality=95), "x")
    assert found.size == wanted.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted).astype(int)).mean() < 12


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(1, 1), (16, 24), (257, 300), (700, 7000), (9000, 3), (640, 480)])
def test_the_head_of_a_jpeg_xl_file_tells_its_size(mode: str, size: tuple[int, int]) -> None:
    from kdcli.data.jxl import header

    for options in ({}, {"lossless": True}, {"use_container": True}):
        assert header(saved("JXL", Image.new(mode, size), **options)) == (*size, 1)


@given(st.binary(max_size=70))
def test_heads_of_any_bytes_are_read(head: bytes) -> None:
    from kdcli.data.jxl import header

    for start in (b"", b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"):
        format_of(start + head)
        header(start + head)


def test_a_jpeg_xl_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = saved("JXL", Image.new("L", (600, 500)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 149_999)
    with pytest.raises(BadDataError, match="300000 pixels; at most 299998"):
        decode_image(encoded, "x.jxl")


# --- what is a sample -------------------------------------------------------------------------

NAME = st.text(st.sampled_from("abAé.-_0 \u0301"), min_size=1, max_size=5).filter(
    lambda name: not name.startswith(".") and "/" not in name
)


@given(st.lists(st.tuples(NAME, NAME, st.sampled_from([".png", ".JPG", ".txt", ".heic", ""])), max_size=8))
def test_samples_follow_from_names_alone(names: list[tuple[str, str, str]]) -> None:
    """An independent walk finds the same keys; labels are the first folders in plain string order."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for top, name, ending in names:
            fill(root, f"{top}/{name}{ending}", data=b"no image")
        wanted = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.is_file() and path.suffix.lower() in EXTENSIONS
        )
        tops = sorted({key.split("/")[0] for key in wanted})
        try:
            data: ImageData | None = open_data(folder)
        except (BadDataError, MissingExtraError, UsageError, NotFoundError, StorageError):
            data = None
        if data is None:
            assert not wanted or alike(tops)
            return
        assert list(data.keys) == wanted
        assert data.class_names == tuple(tops)
        assert [tops[label] for label in data.labels] == [key.split("/")[0] for key in wanted]


def test_a_labels_csv_that_is_there_and_not_asked_for_is_said(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("key,size,tail\n1.png,big,yes\n2.png,small,no\n")
    assert "choose its labels with @labels=size|tail" in one(notes_of(tmp_path), "labels.csv is not used")
    assert notes_of(f"{tmp_path}@labels=size") == []
