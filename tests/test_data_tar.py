"""``tar/PATH``: WebDataset's shards. Oracles: Python's tarfile and GNU tar."""

import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import Shell
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from source_tools import require_as_the_folder

from kdcli.data.paths import FileStamp
from kdcli.data.sources import ImageData, open_data
from kdcli.data.tar_index import TarIndex, index_of
from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture(autouse=True, scope="module")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def png(gray: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (gray, gray, gray)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, files: dict[str, bytes | tarfile.TarInfo], form: str = "pax") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            info.size = len(content) if isinstance(content, bytes) else info.size
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def index(path: Path) -> TarIndex:
    return index_of(FileStamp.of(path))


def read(path: Path) -> dict[str, bytes]:
    found, data = index(path), path.read_bytes()
    return {
        name: data[start : start + size]
        for name, start, size in zip(found.names, found.starts.tolist(), found.sizes.tolist(), strict=True)
    }


def names_of(data: ImageData) -> list[str]:
    assert data.class_names is not None
    return [data.class_names[label] if label >= 0 else "" for label in data.labels]


def test_what_shards_give_a_teacher_is_what_the_folder_gives(
    kd: Callable[..., Shell], images: Path, teachers: dict[str, str]
) -> None:
    files = sorted(images.glob("*/*"))
    for number in range(3):
        members: dict[str, bytes | tarfile.TarInfo] = {}
        for path in files[number::3]:
            stem = f"{path.parent.name}/{path.stem}"
            members |= {f"{stem}.cls": path.parent.name.encode(), f"{stem}.png": path.read_bytes()}
        write(images.parent / f"shards/{number}.tar", members)
    shard_of = {path.relative_to(images).as_posix(): place % 3 for place, path in enumerate(files)}
    require_as_the_folder(
        kd,
        images,
        f"tar/{images.parent}/shards/*.tar",
        lambda key: f"{shard_of[key]}.tar/{key}",
        teachers["a"],
    )


# --- labels, kept beside the index ----------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two splits of images, with labels in two kinds of files; an own cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, split in enumerate(("train", "val")):
        files: dict[str, bytes | tarfile.TarInfo] = {}
        for row in range(4):
            files[f"{split}{row}.png"] = png(40 * row + number)
            files[f"{split}{row}.cls"] = "abca"[row].encode()
            files[f"{split}{row}.txt"] = ("ä|b" if row else "").encode()
        write(tmp_path / f"set/{split}-0.tar", files)
    return tmp_path / "set"


QUESTIONS = ("", "@split=train", "@split=val", "@label=txt", "@split=train,label=txt")


@pytest.mark.parametrize("question", QUESTIONS)
def test_labels_are_read_once(labelled: Path, monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    if question in ("", "@label=txt"):
        (labelled / "val-0.tar").unlink()
    first = open_data(f"tar/{labelled}{question}")
    with monkeypatch.context() as patch:
        patch.setattr("kdcli.data.tars.TarSource._listing", lambda *_: pytest.fail("read anew"))
        again = open_data(f"tar/{labelled}{question}")
    assert (again.keys, again.class_names) == (first.keys, first.class_names)
    assert again.labels.tolist() == first.labels.tolist()
    assert again.labels.dtype == first.labels.dtype
    assert again.labels.flags.writeable
    assert again.labels.flags.aligned
    assert again.image(0).tobytes() == first.image(0).tobytes()
    worker = pickle.loads(pickle.dumps(again))
    assert names_of(worker) == names_of(first)


def test_what_is_asked_otherwise_is_answered_otherwise(labelled: Path) -> None:
    found = [names_of(open_data(f"tar/{labelled}{question}")) for question in QUESTIONS[1:3]] * 2
    assert found == [list("abca")] * 4
    assert names_of(open_data(f"tar/{labelled}@split=train,label=txt")) == ["", "ä|b", "ä|b", "ä|b"]
    (labelled / "names.txt").write_text("b\na\nc\n")
    assert names_of(open_data(f"tar/{labelled}@split=train,names=names.txt")) == list("abca")
    assert open_data(f"tar/{labelled}@split=train,names=names.txt").class_names == ("b", "a", "c")
    (labelled / "names.txt").write_text("c\na\nb\n\n")
    assert open_data(f"tar/{labelled}@split=train,names=names.txt").class_names == ("c", "a", "b")
    (labelled / "classes.txt").write_text("c\nb\na\n")
    assert open_data(f"tar/{labelled}@split=train").class_names == ("c", "b", "a")


def test_a_changed_tar_is_read_anew(labelled: Path) -> None:
    (labelled / "val-0.tar").unlink()
    assert names_of(open_data(f"tar/{labelled}")) == list("abca")
    state = (labelled / "train-0.tar").stat()
    data = (labelled / "train-0.tar").read_bytes()
    found = index(labelled / "train-0.tar")
    place = int(found.starts[found.find("train0.cls")])
    (labelled / "train-0.tar").write_bytes(data[:place] + b"c" + data[place + 1 :])
    os.utime(labelled / "train-0.tar", ns=(state.st_atime_ns, state.st_mtime_ns + 1000))
    assert names_of(open_data(f"tar/{labelled}")) == list("cbca")
    (labelled / "train-0.tar").rename(labelled / "train-1.tar")
    assert next(iter(open_data(f"tar/{labelled}").keys)).startswith("train-1.tar/")


@given(st.data())
def test_a_damaged_answer_is_none(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        write(Path(folder) / "a.tar", {"1.png": png(1), "1.cls": b"a", "2.png": png(2), "2.cls": b"b"})
        before = open_data(f"tar/{folder}/a.tar")
        (file,) = (Path(folder) / "kd" / "tars").glob("*.listing")
        raw = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            del raw[place:]
        else:
            raw[place] ^= data.draw(st.integers(1, 255))
        file.write_bytes(raw)
        after = open_data(f"tar/{folder}/a.tar")
        assert after.keys == before.keys
        assert names_of(after) == names_of(before) == ["a", "b"]
        assert file.read_bytes() != raw


def test_sizes_are_found_in_any_order(labelled: Path) -> None:
    data = open_data(f"tar/{labelled}@split=train")
    expected = [len(data.encoded(row)) for row in range(len(data))]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 3, 0]):
        assert data.select(np.array(order)).sizes().tolist() == [expected[row] for row in order]
    assert data.source.size("train-0.tar/none.png") == -1


# --- the index against other readers and writers --------------------------------------------------

parts = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60).filter(
    lambda part: part not in (".", "..")
)
paths = st.lists(parts, min_size=1, max_size=5).map("/".join)


@given(
    st.dictionaries(paths, st.binary(max_size=1500), min_size=1, max_size=6), st.sampled_from(list(FORMATS))
)
def test_an_index_finds_what_tarfile_finds(files: dict[str, bytes], form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        try:
            write(path, dict(files), form)
        except ValueError:  # ustar has no room for the name
            return
        with tarfile.open(path) as tar:
            expected = {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]
        assert read(path) == expected == files
        assert list(index(path).names) == sorted(files)
        again = pickle.loads(pickle.dumps(index(path)))
        for name in files:
            assert again.names[again.find(name)] == name
        assert again.find("\U0010ffff" * 400) == -1


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_what_the_program_tar_writes(tmp_path: Path, form: str) -> None:
    long = "x" * (90 if form == "v7" else 140) + ".png"
    if form == "ustar":
        long = f"{'d' * 90}/{'x' * 90}.png"
    for name in ("a.png", "sub/b.png", "sub/.hidden.png", long):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(len(name)))
    subprocess.run(
        ["tar", f"--format={form}", "-C", tmp_path / "in", "-cf", tmp_path / "a.tar", "."], check=True
    )
    assert read(tmp_path / "a.tar") == {
        path.relative_to(tmp_path / "in").as_posix(): path.read_bytes()
        for path in (tmp_path / "in").rglob("*")
        if path.is_file()
    }
    data = open_data(f"tar/{tmp_path}/a.tar")
    assert list(data.keys) == sorted(f"a.tar/{name}" for name in ("a.png", "sub/b.png", long))


def test_a_size_that_only_an_extended_header_tells(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size, info.pax_headers = 700, {"size": "700", "comment": "x" * 3000}
    buffer = info.tobuf(tarfile.PAX_FORMAT)
    place = buffer.rindex(b"a.png") + 124
    block = bytearray(buffer[place - 124 :])
    block[124:136] = b"00000000000\0"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:512]) + 256)
    (tmp_path / "a.tar").write_bytes(buffer[: place - 124] + block + b"y" * 700 + bytes(68 + 1024))
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [each.size for each in tar] == [700]
    assert read(tmp_path / "a.tar") == {"a.png": b"y" * 700}


@given(st.data())
def test_a_tar_that_is_cut_off_anywhere_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.tar", {"a.png": b"a" * 700, "b" * 130: b"b", "c": b""}, "gnu")
        whole = path.read_bytes()
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # where the header of c ends
        path.write_bytes(whole[: data.draw(st.integers(0, end + 511))])
        with pytest.raises(BadDataError, match=r"cut off|empty"):
            index(path)


@given(st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4))
def test_a_tar_that_is_damaged_anywhere_is_refused_or_read_within_its_bounds(
    damage: list[tuple[int, bytes]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(
            Path(folder) / "a.tar", {"a.png": b"a" * 700, "b" * 130: b"b", "c": b"", "\xe9": b"d"}, "pax"
        )
        content = bytearray(path.read_bytes())
        for place, wrong in damage:
            content[place : place + len(wrong)] = wrong
        path.write_bytes(content)
        with suppress(BadDataError):
            found = index(path)
            assert (found.starts + found.sizes <= len(content)).all()


# --- what is refused ------------------------------------------------------------------------------


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


REFUSED: dict[str, tuple[dict[str, bytes | tarfile.TarInfo], str]] = {
    "up": ({"a.png": b"x", "../b.png": b"x"}, "leads out of the archive"),
    "up inside": ({"a/../../b.png": b"x"}, "leads out of the archive"),
    "absolute": ({"/etc/a.png": b"x"}, "leads out of the archive"),
    "folder up": ({"..": entry("..", tarfile.DIRTYPE)}, "leads out of the archive"),
    "link": ({"a.png": entry("a.png", tarfile.SYMTYPE, "/etc/passwd")}, "a.png is a link"),
    "hard link": ({"a.png": b"x", "b.png": entry("b.png", tarfile.LNKTYPE, "a.png")}, "b.png is a hard link"),
    "device": ({"a.png": entry("a.png", tarfile.CHRTYPE)}, "is a device"),
    "pipe": ({"a.png": entry("a.png", tarfile.FIFOTYPE)}, "is a pipe"),
    "twice": ({"a.png": b"x", "./a.png": b"y"}, "holds the file a.png twice"),
    "case": ({"a.png": b"x", "a.PNG": b"y"}, "differ only by case"),
    "no images": ({"a.txt": b"x", ".b.png": b"y"}, "there are no images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_tar_may_not_hold(tmp_path: Path, name: str) -> None:
    files, said = REFUSED[name]
    with pytest.raises(BadDataError, match=said) as raised:
        open_data(f"tar/{write(tmp_path / 'a.tar', files)}")
    assert raised.value.hint


def test_what_is_no_plain_tar(tmp_path: Path, kd: Callable[..., Shell]) -> None:
    write(tmp_path / "a.tar", {"a.png": png(1)})
    for kind in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / f"a.tar.{kind}", f"w:{kind}") as tar:
            tar.add(tmp_path / "a.tar", "a.tar")
    kd("data", "check", "tar/a.tar.gz").refused(12, "is compressed (gzip)", "gzip -dk")
    for kind, said in (("bz2", "bzip2"), ("xz", "xz")):
        with pytest.raises(BadDataError, match=said):
            open_data(f"tar/{tmp_path}/a.tar.{kind}")
    (tmp_path / "b.tar").write_bytes(png(1) + bytes(2000))
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    os.mkfifo(tmp_path / "d.tar")
    kd("data", "check", "tar/b.tar").refused(12, "is no tar")
    kd("data", "check", "tar/c.tar").refused(12, "more follows behind the end", "tar -Af")
    kd("data", "check", "tar/d.tar").refused(12, "a pipe")
    kd("data", "check", "tar/x.tar").refused(11, "no file", "Did you mean")
    kd("data", "check", "tar/x-*.tar").refused(11, "no file matches x-*.tar")
    kd("data", "check", "tar/a.tar@labels=cls").refused(2, "has no labels 'cls'")
    kd("data", "check", "a.tar").refused(12, "tar/")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    kd("data", "check", "tar/a.tar").refused(12, "is cut off")


# --- samples and labels ---------------------------------------------------------------------------


def shards(root: Path) -> Path:
    """Two shards of training and one of validation; the grays tell the images apart."""
    for shard, first in (("train-0", 0), ("train-1", 2), ("val-0", 4)):
        files: dict[str, bytes | tarfile.TarInfo] = {}
        for number in (first, first + 1):
            about = {"label": number % 3, "name": f"n{number % 3}", "tags": ["a", f"t{number}"], "none": None}
            files |= {f"{number}.json": json.dumps(about).encode(), f"{number}.PNG": png(number)}
            files |= {f"{number}.cls": str(number % 3).encode()}
        write(root / f"{shard}.tar", files)
    return root


def test_labels_splits_and_names(tmp_path: Path) -> None:
    text = f"tar/{shards(tmp_path)}"
    with pytest.raises(UsageError, match=r"holds splits \(train, val\)"):
        open_data(text)
    with pytest.raises(UsageError, match="numbers, from 0 to 2") as raised:
        open_data(f"{text}@split=train")
    assert "names=3 " in raised.value.hint
    train = open_data(f"{text}@split=train,names=3")
    assert list(train.keys) == [
        "train-0.tar/0.PNG",
        "train-0.tar/1.PNG",
        "train-1.tar/2.PNG",
        "train-1.tar/3.PNG",
    ]
    assert names_of(train) == ["0", "1", "2", "0"]
    assert [train.image(row).getpixel((0, 0))[0] for row in range(4)] == [0, 1, 2, 3]  # type: ignore[index]
    assert train.sizes().tolist() == [len(train.encoded(row)) for row in range(4)]
    assert train.path(0) == f"{tmp_path}/train-0.tar/0.PNG"
    with pytest.raises(BadDataError, match="'2' is none of the 2 classes"):
        open_data(f"{text}@split=train,names=2")
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    val = open_data(f"{text}@split=validation")
    assert (names_of(val), val.class_names) == (["bee", "cat"], ("ant", "bee", "cat"))
    assert names_of(open_data(f"tar/{tmp_path}/val-*.tar@label=json:label")) == ["bee", "cat"]
    (tmp_path / "classes.txt").unlink()
    named = open_data(f"{text}@split=train,label=json:name")
    assert (names_of(named), named.class_names) == (["n0", "n1", "n2", "n0"], ("n0", "n1", "n2"))
    assert names_of(open_data(f"{text}@split=val,labels=json:tags")) == ["a|t4", "a|t5"]
    with pytest.raises(UsageError, match=r"no field 'lable'. Did you mean 'label'"):
        open_data(f"{text}@split=val,label=json:lable")
    again = pickle.loads(pickle.dumps(open_data(train.location)))
    assert (again.keys, again.encoded(3)) == (train.keys, train.encoded(3))


def test_samples_of_several_images_and_samples_that_shards_share(tmp_path: Path) -> None:
    write(tmp_path / "m/0.tar", {"a.jpg": b"x", "a.seg.png": png(1), "a.cls": b"k"})
    with pytest.raises(UsageError, match=r"a has 2 images: jpg, seg.png") as raised:
        open_data(f"tar/{tmp_path}/m")
    assert raised.value.hint.endswith("image=jpg")
    data = open_data(f"tar/{tmp_path}/m@image=seg.png")
    assert (list(data.keys), names_of(data)) == (["0.tar/a.seg.png"], ["k"])
    for number in range(2):
        write(tmp_path / f"r/{number}.tar", {"a.png": png(number)})
    with pytest.raises(BadDataError, match=r"the sample a is in 0.tar and in 1.tar"):
        open_data(f"tar/{tmp_path}/r")
    data = open_data(f"tar/{tmp_path}/r@repeats=allowed")
    assert [data.image(row).getpixel((0, 0))[0] for row in range(2)] == [0, 1]  # type: ignore[index]
    assert "used without labels" in data.notes[0]
    with pytest.raises(NotFoundError, match="no split 'train'"):
        open_data(f"tar/{tmp_path}/r@repeats=allowed,split=train")


def test_labels_that_are_none(tmp_path: Path) -> None:
    for content, said in ((b"\xff", "not text"), (b"x" * 1001, "is no label"), (b"a\nb", "is no label")):
        path = write(tmp_path / "a.tar", {"a.png": png(1), "a.cls": content})
        with pytest.raises(BadDataError, match=said):
            open_data(f"tar/{path}")
    for document in ("[1]", "{", '{"a": true}', '{"a": 1.5}', '{"a": ["x|y"]}', '{"a": 1, "a": 2}'):
        path = write(tmp_path / "a.tar", {"a.png": png(1), "a.json": document.encode()})
        with pytest.raises(BadDataError):
            open_data(f"tar/{path}@label=json:a")
    path = write(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"cat", "b.png": png(2)})
    data = open_data(f"tar/{path}")
    assert (names_of(data), data.notes) == (["cat", ""], (f"tar/{path}: 1 of 2 images have no cls",))


# --- the index on disk ----------------------------------------------------------------------------


def test_an_index_is_made_once_and_again_when_the_tar_or_the_index_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "a.tar", {"a.png": png(1)})
    data = open_data(f"tar/{path}")
    (kept,) = (tmp_path / "cache").rglob("*.index")
    made = kept.stat().st_mtime_ns, kept.stat().st_ino
    index_of.cache_clear()
    assert open_data(f"tar/{path}").encoded(0) == png(1)
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == made
    sound = kept.read_bytes()
    for damaged in (
        b"",
        sound[:-1],
        sound[:60] + b"\1" + sound[61:],
        b"kd-tar 1 999999999999 " + sound,
        b"x" + sound,
    ):
        kept.write_bytes(damaged)
        index_of.cache_clear()
        assert open_data(f"tar/{path}").encoded(0) == png(1)
        assert kept.read_bytes() == sound
    write(path, {"b.png": png(2), "a.png": png(3)})
    with pytest.raises(BadDataError, match="has changed since"):
        data.encoded(0)
    assert open_data(f"tar/{path}").encoded(0) == png(3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_folder_that_cannot_be_written_is_told(tmp_path: Path, kd: Callable[..., Shell]) -> None:
    write(tmp_path / "a.tar", {"a.png": png(1)})
    (tmp_path / "locked").mkdir(mode=0o500)
    kd("data", "check", "tar/a.tar", env={"XDG_CACHE_HOME": str(tmp_path / "locked")}).refused(32, "locked")


def test_whatever_a_tar_holds_is_refused_in_words(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / "a.tar").write_bytes(bytes([number]) * 512 * (number % 4 + 1))
        with pytest.raises(KdError) as raised:
            open_data(f"tar/{tmp_path}/a.tar")
        assert raised.value.hint
