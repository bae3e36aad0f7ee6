"""``python -m lab.video_splits KIND VIDEOS LISTS > VIDEOS/splits.csv``: official splits of sets of actions, for kd.

ucf101    LISTS is ucfTrainTestlist: trainlist01.txt (CLASS/v_CLASS_g08_c01.avi 1), testlist01.txt (without number)
hmdb51    LISTS is testTrainMulti_7030_splits: CLASS_test_split1.txt (NAME.avi 1: train, 2: test, 0: neither)
diving48  LISTS holds Diving48_V2_train.json and ..._test.json ({"vid_name": NAME, "label": 7}: NAME.mp4)

Columns are path (from VIDEOS), label, start and end (empty: a clip is its file), and split1, split2, split3: train,
test or nothing. ``csv/VIDEOS/splits.csv@start=start,split-column=split1,split=train`` is one part for kd.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kdcli.console import console, counted
from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError
from kdcli.files import storage_errors
from kdcli.reading import parse_json

Entry = tuple[str, str, str, str]
"""Path, label, column of the split, and train or test."""
_GROUP = re.compile(r"/(v_.+_g\d+)_c\d+\.avi$")


def main(words: Sequence[str] | None = None) -> int:
    """Write the table to standard output; gives kd's exit code."""
    try:
        arguments = _parser().parse_args(words)
        rows = table(arguments.kind, arguments.videos, arguments.lists)
    except KdError as error:
        console.error(error.message, str(error.hint))
        return error.exit_code
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerows(rows)
    return 0


def table(kind: str, videos: Path, lists: Path) -> list[list[str]]:
    """The rows, the names of the columns first.

    Raises:
        NotFoundError: there are no lists, or videos that they name are not there.
        BadDataError: a line is none of such a list; a clip is in a list twice; clips of one group are on both sides.
    """
    sides: dict[tuple[str, str], dict[str, str]] = {}
    for path, label, split, side in KINDS[kind](lists):
        own = sides.setdefault((path, label), {})
        if split in own:
            raise BadDataError(f"{lists}: {path} is in {split} twice", "Take the official lists as they are.")
        own[split] = side
    if not sides:
        raise NotFoundError(f"{lists} has no lists of {kind}", _FOLDERS[kind])
    _require_whole_groups(sides, lists)
    lacking = [path for path, _ in sides if not (videos / path).is_file()]
    if lacking:
        raise NotFoundError(
            f"{len(lacking)} of {counted(len(sides), 'videos')} in the lists are not there: {videos / lacking[0]}, ...",
            "VIDEOS is the folder in which the classes' folders lie (of diving48 the videos): unpack all archives.",
        )
    splits = sorted({split for own in sides.values() for split in own})
    rows = [[*key, "", "", *(own.get(split, "") for split in splits)] for key, own in sorted(sides.items())]
    return [["path", "label", "start", "end", *splits], *rows]


def _require_whole_groups(sides: Mapping[tuple[str, str], Mapping[str, str]], lists: Path) -> None:
    """Clips of a group of UCF-101 are cut out of one video: apart, the test would be of what was learnt."""
    seen: dict[tuple[str, str], str] = {}
    for (path, _), own in sides.items():
        found = _GROUP.search(path)
        if found is None:
            continue
        for split, side in own.items():
            if seen.setdefault((found[1], split), side) != side:
                raise BadDataError(
                    f"{lists}: {split} has clips of {found[1]} in train and in test",
                    "They are of one video. Take the official lists as they are.",
                )


def _ucf101(lists: Path) -> Iterator[Entry]:
    for file, number, side in _files(lists, r"(train|test)list0([123])\.txt", (2, 1)):
        for line in _lines(file):
            found = re.fullmatch(r"([^/]+)/([^/]+\.avi)(?: \d+)?", line)
            if found is None:
                raise _bad(file, line, "CLASS/NAME.avi, in trainlists with a number behind")
            yield f"{found[1]}/{found[2]}", found[1], f"split{number}", side


def _hmdb51(lists: Path) -> Iterator[Entry]:
    for file, label, number in _files(lists, r"(.+)_test_split([123])\.txt", (1, 2)):
        for line in _lines(file):
            found = re.fullmatch(r"(.+\.avi) ([012])", line)
            if found is None:
                raise _bad(file, line, "NAME.avi, and 0, 1 or 2")
            side = {"1": "train", "2": "test"}.get(found[2])
            if side is not None:
                yield f"{label}/{found[1]}", label, f"split{number}", side


def _diving48(lists: Path) -> Iterator[Entry]:
    for file, side in _files(lists, r"Diving48_V2_(train|test)\.json", (1,)):
        with storage_errors(file):
            entries = parse_json(file.read_bytes(), file, hint="Download it again.")
        for entry in entries if isinstance(entries, list) else [entries]:
            name, label = _fields(entry, file)
            yield f"{name}.mp4", f"{label:02d}", "split1", side


def _fields(entry: Any, file: Path) -> tuple[str, int]:
    match entry:
        case {"vid_name": str(name), "label": int(label)} if not isinstance(label, bool):
            return name, label
    raise _bad(file, str(entry)[:80], '{"vid_name": NAME, "label": NUMBER}')


KINDS: Mapping[str, Callable[[Path], Iterator[Entry]]] = {
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
    "diving48": _diving48,
}
_FOLDERS = {
    "ucf101": "LISTS is the folder ucfTrainTestlist, with trainlist01.txt and testlist01.txt.",
    "hmdb51": "LISTS is the folder testTrainMulti_7030_splits, with brush_hair_test_split1.txt and so on.",
    "diving48": "LISTS is the folder of Diving48_V2_train.json and Diving48_V2_test.json.",
}


def _files(lists: Path, pattern: str, groups: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Files of a folder whose names fit, and those groups of the names."""
    if not lists.is_dir():
        raise NotFoundError(f"there is no folder {lists}", "LISTS is where the official lists were unpacked.")
    with storage_errors(lists):
        files = sorted(lists.iterdir())
    for file in files:
        if (found := re.fullmatch(pattern, file.name)) is not None:
            yield (file, *(found[group] for group in groups))


def _lines(file: Path) -> Iterator[str]:
    with storage_errors(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    return (line.strip() for line in text.splitlines() if line.strip())


def _bad(file: Path, line: str, wanted: str) -> BadDataError:
    return BadDataError(f"{file}: {line!r} is no line of such a list", f"A line is {wanted}.")


class _Parser(argparse.ArgumentParser):
    """Refuses as kd does."""

    def error(self, message: str) -> NoReturn:
        """In two lines."""
        raise UsageError(message, "python -m lab.video_splits --help explains it.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lab.video_splits",
        description="The official splits of sets of actions, as a table for kd.",
        allow_abbrev=False,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="folder of the videos")
    parser.add_argument("lists", type=Path, metavar="LISTS", help="folder of the official lists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
