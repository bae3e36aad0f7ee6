"""``kd data check`` against folders whose faults are known, and a plain count of them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcli.checking.check import check
from kdcli.checking.config import CheckConfig
from kdcli.checking.result import CheckResult
from kdcli.cli.app import main
from kdcli.data.sources import open_data
from kdcli.errors import NotFoundError, OutputExistsError, UsageError


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """train: 12 cats, 11 dogs, 1 fox; test: cats and a wolf; each fault once or twice."""
    train, test = tmp_path / "p/train", tmp_path / "p/test"
    for name in ("train/cat", "train/dog", "train/fox", "test/cat", "test/wolf"):
        (tmp_path / "p" / name).mkdir(parents=True)
    for number in range(12):
        picture(number).save(train / f"cat/{number:02d}.png")
    for number in range(11):
        picture(100 + number).save(train / f"dog/{number:02d}.png")
    picture(200, (100, 20)).save(train / "fox/wide.png")
    (train / "cat/copy.png").write_bytes((train / "cat/03.png").read_bytes())  # equal bytes
    picture(4).save(train / "cat/same.bmp")  # equal pixels only
    picture(105).save(train / "cat/torn.png")  # a dog as well
    picture(7).save(test / "cat/seen.bmp")  # a training image
    picture(300).save(test / "cat/new.png")
    picture(301).save(test / "wolf/new.png")
    (train / "dog/zz.jpg").write_bytes(b"no image")
    os.mkfifo(train / "dog/zz.png")
    picture(400).convert("CMYK").save(train / "dog/cmyk.jpg")
    exif = Image.Exif()
    exif[274] = 6
    picture(401).save(train / "dog/turned.jpg", exif=exif)
    picture(402).save(train / "dog/moving.gif", save_all=True, append_images=[picture(403)])
    return tmp_path


def run(place: Path, **options: Any) -> CheckResult:
    fields = {"data": f"{place}/p@split=train", "test": f"{place}/p@split=test", "workers": 0}
    return check(CheckConfig(**{**fields, **options}))


def found(result: CheckResult) -> dict[str, tuple[int, bool, str]]:
    return {each.what: (each.images, each.problem, each.example) for each in result.findings}


def test_every_fault_is_found_and_nothing_else(place: Path) -> None:
    result = run(place)
    seen = found(result)
    counts = {what: (images, problem) for what, (images, problem, _) in seen.items()}
    assert counts == {
        "cannot be read": (2, True),
        "the same file as an earlier one": (2, False),
        "the same pixels as an earlier one": (1, False),
        "equal images of different classes": (2, True),
        "one side more than 4 times the other": (1, False),
        "colours neither RGB nor gray": (2, False),
        "turned by EXIF": (1, False),
        "animated, first frame used": (1, False),
        "in classes of fewer than 10": (1, False),
        "classes without images": (0, False),
        "also in --test": (1, True),
        "of classes that DATA lacks, in --test": (1, False),
        "of classes that --test lacks": (17, False),
        "note": (0, False),
    }
    assert seen["the same file as an earlier one"][2] == "train/cat/copy.png = train/cat/03.png"
    assert seen["also in --test"][2] == "train/cat/07.png = test/cat/seen.bmp"
    assert seen["one side more than 4 times the other"][2] == "train/fox/wide.png: 100 x 20"
    assert "no training images" in seen["note"][2]
    assert set(result.excluded) == {
        "train/dog/zz.jpg", "train/dog/zz.png", "train/cat/copy.png", "train/cat/same.bmp", "train/cat/torn.png",
        "train/dog/05.png", "train/cat/07.png",
    }  # fmt: skip


def test_duplicates_are_those_that_plain_python_finds(place: Path) -> None:
    data = open_data(f"{place}/p@split=train")
    first: dict[bytes, int] = {}
    copies = 0
    for row in range(len(data)):
        try:
            image = data.image(row)
        except ValueError:
            continue
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        copies += first.setdefault(digest, row) != row
    seen = found(run(place))
    assert sum(count for what, (count, *_) in seen.items() if "as an earlier one" in what) == copies


def test_sizes_and_modes_are_pillows(place: Path) -> None:
    side = run(place, test=None).data
    images = []
    for path in sorted((place / "p/train").rglob("*.*")):
        if path.name not in ("zz.jpg", "zz.png"):
            with Image.open(path) as image:
                width, height = image.size
                images.append(
                    (image.mode, *((height, width) if path.name == "turned.jpg" else (width, height)))
                )
    widths = sorted(width for _, width, _ in images)
    assert side.width == (widths[0], float(np.median(widths)), widths[-1])
    assert dict(side.modes) == {mode: sum(m == mode for m, *_ in images) for mode in {m for m, *_ in images}}
    assert (side.images, side.turned, side.animated) == (len(images) + 2, 1, 1)


def test_what_is_left_after_the_written_file_is_clean(place: Path) -> None:
    out = place / "bad.txt"
    run(place, write_exclude=out)
    assert len(out.read_text().splitlines()) == 7
    again = run(place, data=f"{place}/p@split=train,without={out}")
    assert again.problems == 0
    assert again.excluded == ()
    with pytest.raises(OutputExistsError):
        run(place, write_exclude=out)
    with pytest.raises(NotFoundError):
        run(place, write_exclude=place / "no/bad.txt")
    with pytest.raises(UsageError):
        run(place, data=f"{place}/p@split=train++folder/{place}/p@split=test", write_exclude=place / "x")


def test_workers_change_nothing(place: Path) -> None:
    assert run(place, workers=2).document() == run(place).document()


def test_case_between_two_folders_is_a_problem(tmp_path: Path) -> None:
    for number, name in enumerate(("a/Dog", "a/cat", "b/dog", "b/cat")):
        (tmp_path / name).mkdir(parents=True)
        picture(number).save(tmp_path / name / "1.png")
    seen = found(run(tmp_path, data=f"{tmp_path}/a", test=f"{tmp_path}/b"))
    assert seen["classes that differ by case, Unicode form or invisible characters"][1:] == (
        True,
        "'Dog' and 'dog'",
    )


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(each) for each in arguments])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("data", "check", f"{place}/p@split=train", "--workers", 0)
    assert code_of(*base, "--test", f"{place}/p@split=test", "--write-exclude", place / "x.txt") == 12
    told = capsys.readouterr()
    assert "PROBLEM  2       cannot be read" in told.out
    assert f"without={place}/x.txt" in told.err
    assert (
        code_of("data", "check", f"{place}/p@split=train,without={place}/x.txt", "--workers", 0, "--json")
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == 0
    assert document["data"]["classes"] == {"cat": 11, "dog": 13, "fox": 1, "wolf": 0}
    assert code_of("data", "check", "sklearn/digits@n=20", "--workers", 0) == 0
    assert code_of("data", "check", place / "nowhere") == 11


def test_what_was_found_is_printed_before_the_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.png", "a/2\n.png", "b/3.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / "d" / name)
    out = tmp_path / "bad.txt"
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path / "d"), "--write-exclude", str(out), "--workers", "0"])
    assert ended.value.code == 12
    told = capsys.readouterr()
    assert "PROBLEM" in told.out
    assert "does not fit on a line" in told.err
    assert not out.exists()
