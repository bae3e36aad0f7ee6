"""Tables of official splits, made of lists as UCF-101, HMDB-51 and Diving48 publish them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lab.video_splits import main

from kdcli.data.sources import open_data

Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def splits(capsys: pytest.CaptureFixture[str]) -> Told:
    def told(*words: object) -> tuple[int, str, str]:
        return main(list(map(str, words))), *capsys.readouterr()

    return told


def _videos(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"a video")
    return folder


def _lists(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


WALK = [f"Walk/v_Walk_g{group:02d}_c0{clip}.avi" for group in (1, 8) for clip in (1, 2)]
RUN = ["Run/v_Run_g01_c01.avi", "Run/v_Run_g08_c01.avi"]


def test_ucf101_keeps_the_sides_of_all_its_splits(splits: Told, tmp_path: Path) -> None:
    videos = _videos(tmp_path / "UCF-101", *WALK, *RUN, "Walk/v_Walk_g25_c01.avi")
    lists = _lists(
        tmp_path / "ucfTrainTestlist",
        classInd="1 Run\n2 Walk\n",
        trainlist01=f"{RUN[1]} 1\r\n{WALK[2]} 2\r\n{WALK[3]} 2\r\n",
        testlist01=f"{RUN[0]}\n{WALK[0]}\n{WALK[1]}\n",
        trainlist02=f"{RUN[0]} 1\n{WALK[0]} 2\n",
        testlist02=f"{WALK[2]}\n",
    )
    code, told, _ = splits("ucf101", videos, lists)
    assert code == 0
    assert told.splitlines() == [
        "path,label,start,end,split1,split2",
        f"{RUN[0]},Run,,,test,train",
        f"{RUN[1]},Run,,,train,",
        f"{WALK[0]},Walk,,,test,train",
        f"{WALK[1]},Walk,,,test,",
        f"{WALK[2]},Walk,,,train,test",
        f"{WALK[3]},Walk,,,train,",
    ]


def test_what_is_written_is_a_part_for_kd(splits: Told, tmp_path: Path) -> None:
    """As the recipe opens it; names of HMDB-51 hold commas, parentheses and #."""
    names = {"#1, (HQ)_wave_u_0.avi": 1, "b_wave_u_1.avi": 2, "c_wave_u_2.avi": 0}
    videos = _videos(
        tmp_path / "hmdb", *(f"{label}/{name}" for label in ("draw_sword", "wave") for name in names)
    )
    lines = "".join(f"{name} {side} \n" for name, side in names.items())
    lists = _lists(
        tmp_path / "lists", draw_sword_test_split1=lines, wave_test_split1=lines, wave_test_split2=lines
    )
    code, told, _ = splits("hmdb51", videos, lists)
    assert code == 0
    (videos / "splits.csv").write_text(told)
    parts = {
        side: open_data(f"csv/{videos}/splits.csv@start=start,split-column=split1,split={side}")
        for side in ("train", "test")
    }
    for side, name in (("train", "#1, (HQ)_wave_u_0.avi"), ("test", "b_wave_u_1.avi")):
        part = parts[side]
        assert list(part.keys) == [f"draw_sword/{name}#0-", f"wave/{name}#0-"]
        assert part.clips
        assert part.class_names == ("draw_sword", "wave")
        np.testing.assert_array_equal(part.labels, [0, 1])
        assert part.encoded(0) == b"a video"


def test_diving48_is_numbered(splits: Told, tmp_path: Path) -> None:
    videos = _videos(tmp_path / "rgb", "_a-1_00000.mp4", "b_00001.mp4")
    lists = _lists(tmp_path / "lists")
    for side, name, label in (("train", "_a-1_00000", 10), ("test", "b_00001", 9)):
        entry = {"vid_name": name, "label": label, "start_frame": 0, "end_frame": 71}
        (lists / f"Diving48_V2_{side}.json").write_text(json.dumps([entry]))
    code, told, _ = splits("diving48", videos, lists)
    assert code == 0
    assert told.splitlines()[1:] == ["_a-1_00000.mp4,10,,,train", "b_00001.mp4,09,,,test"]


@pytest.mark.parametrize(
    ("lists", "code", "message", "hint"),
    [
        ({}, 11, "has no lists of ucf101", "trainlist01.txt"),
        ({"trainlist01": f"{WALK[0]} 1\n{RUN[0]} 1\n"}, 11, "1 of 2 videos in the lists are not there: ", "unpack"),
        ({"trainlist01": "Walk 1\n"}, 12, "'Walk 1' is no line of such a list", "CLASS/NAME.avi"),
        ({"trainlist01": f"{WALK[0]} 1\n", "testlist01": f"{WALK[1]}\n"}, 12, "has clips of v_Walk_g01", "one video"),
        ({"trainlist01": f"{WALK[0]} 1\n", "testlist01": f"{WALK[0]}\n"}, 12, "is in split1 twice", "official"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(
    splits: Told, tmp_path: Path, lists: dict[str, str], code: int, message: str, hint: str
) -> None:
    """A random split of UCF-101 would have one video's clips on both sides, so such lists are none of its."""
    videos = _videos(tmp_path / "UCF-101", *WALK)
    found, told, said = splits("ucf101", videos, _lists(tmp_path / "lists", **lists))
    assert (found, told) == (code, "")
    error, advice = said.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert advice.startswith("hint: ")
    assert hint in advice


@pytest.mark.parametrize("entry", [[{"vid_name": "a"}], [{"vid_name": "a", "label": "1"}], {"a": 1}, [True]])
def test_json_of_another_kind_is_refused(splits: Told, tmp_path: Path, entry: object) -> None:
    lists = _lists(tmp_path / "lists")
    (lists / "Diving48_V2_test.json").write_text(json.dumps(entry))
    code, _, said = splits("diving48", tmp_path, lists)
    assert code == 12
    assert "is no line of such a list" in said
    (lists / "Diving48_V2_test.json").write_text("[")
    assert splits("diving48", tmp_path, lists)[0] == 12


def test_words_that_are_refused(splits: Told, tmp_path: Path) -> None:
    assert splits("ucf11", tmp_path, tmp_path)[0] == 2
    code, _, said = splits("ucf101", tmp_path, tmp_path / "none")
    assert code == 11
    assert said.splitlines()[0] == f"error: there is no folder {tmp_path / 'none'}"
