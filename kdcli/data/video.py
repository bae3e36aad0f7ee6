"""Clips in a folder: ``video/PATH``, ``[SPLIT/]CLASS/.../NAME.mp4``, or folders of frames in place of the files.

* Splits, classes and ``labels.csv`` are those of a folder of images (:mod:`kdcli.data.folder`).
* Where there are no videos, a folder that holds images is a clip: ``[SPLIT/]CLASS/NAME/000001.jpg``. Its frames are
  in plain string order of their names. Its key is the folder's.
* A sample's bytes are the video file's, or those of all its frames.
"""

import os
from pathlib import Path, PurePosixPath
from typing import Final, final

import numpy as np
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.data.base import ImageSource, Listing, SourceKind
from kdcli.data.clips import open_clip, pack_frames
from kdcli.data.decode import bad_image
from kdcli.data.folder import FolderSource, find_folder
from kdcli.data.formats import EXTENSIONS, VIDEOS
from kdcli.data.photos import Picture
from kdcli.data.spec import SPLIT_NAMES
from kdcli.data.walk import Walk
from kdcli.errors import BadDataError
from kdcli.files import storage_errors
from kdcli.types import DecodeMode

ENDINGS: Final = frozenset(VIDEOS)
_KINDS: Final = ", ".join(ending[1:] for ending in sorted(VIDEOS))


@final
class VideoSource(ImageSource):
    """Clips below a folder.

    Args:
        root: absolute path of the folder.
    """

    clips = True

    def __init__(self, root: Path) -> None:
        with storage_errors(root):
            self._files = next(Walk(root, endings=ENDINGS).keys(), None) is not None
            if not self._files and next(Walk(root).keys(), None) is None:
                raise BadDataError(
                    f"there are no videos in {root}, and no folders of frames",
                    f"Give the folder that holds CLASS/NAME.mp4 or CLASS/NAME/0001.jpg; of videos {_KINDS} are read.",
                )
        self._root = root
        self._folder = FolderSource(root, ENDINGS if self._files else EXTENSIONS, "video/")

    @classmethod
    def open(cls, path: Path) -> "VideoSource":
        """Check that ``path`` is a folder; raises like :meth:`FolderSource.open`."""
        FolderSource.open(path, ENDINGS)
        return cls(Path(os.path.normpath(path.absolute())))

    @property
    def text(self) -> str:
        """``video//absolute/path``."""
        return f"video/{self._root.as_posix()}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        found = self._folder.listing(split, task)
        if self._files:
            self._require_no_frames()
            return found
        folders: list[str] = []
        rows: list[int] = []
        for row, key in enumerate(found.keys):
            folder, _, _ = key.rpartition("/")
            if not folder:
                raise BadDataError(
                    f"{self._root} has images that are in no folder of their own, such as {key}",
                    "Give every clip a folder of its frames: CLASS/NAME/000001.jpg; or images without video/.",
                )
            if not folders or folders[-1] != folder:
                if found.class_names is not None and self._is_class(
                    folder, found.class_names[found.labels[row]]
                ):
                    raise BadDataError(
                        f"{self._root / folder} is a class, and its images, such as {key}, are in no folder of their "
                        "own",
                        "Give every clip a folder of its frames: CLASS/NAME/000001.jpg; or images without video/.",
                    )
                folders.append(folder)
                rows.append(row)
        known = set(folders)
        if any(not known.isdisjoint(map(str, PurePosixPath(folder).parents)) for folder in folders):
            raise BadDataError(
                f"{self._root}: a clip has frames and further folders in one folder",
                "Give every clip a folder that holds its frames alone.",
            )
        return Listing(
            KeyTable.from_strings(folders), found.labels[np.array(rows)], found.class_names, found.notes
        )

    def _is_class(self, folder: str, name: str) -> bool:
        """Whether a folder is that of a class, below the root or below a split."""
        before, _, last = folder.rpartition("/")
        return last == name and ("/" not in before and before.lower() in ("", *SPLIT_NAMES))

    def _require_no_frames(self) -> None:
        """Refuse folders of images beside videos: they would be left out, and perhaps a class with them."""
        with storage_errors(self._root):
            videos = set(map(_folder_of, Walk(self._root, endings=ENDINGS).keys()))
            frames = next(
                (each for each in map(_folder_of, Walk(self._root).keys()) if each not in videos), None
            )
        if frames is not None:
            raise BadDataError(
                f"{self._root} holds videos, and {frames} images: clips are files, or folders of frames, not both",
                "Move one kind into another folder.",
            )

    def encoded(self, key: str) -> bytes:
        """The bytes of the file, or of all frames."""
        if self._files:
            return self._folder.encoded(key)
        place = self._root / key
        with storage_errors(place):
            try:
                names = sorted(os.listdir(place))  # noqa: PTH208
            except (FileNotFoundError, NotADirectoryError) as error:
                raise bad_image(str(place), "no such folder of frames") from error
        frames = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]  # noqa: PTH122
        return pack_frames(
            [self._folder.encoded(f"{key}/{name}") for name in frames if not name.startswith(".")]
        )

    def size(self, key: str) -> int:
        """Size of the file; -1 of a folder of frames."""
        return self._folder.size(key) if self._files else -1

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """Its first, middle and last frame in a row."""
        return open_clip(encoded, self.path(key)).strip()

    def picture(self, key: str, encoded: bytes, how: DecodeMode) -> Picture:
        """All of the clip."""
        return open_clip(encoded, self.path(key))

    def path(self, key: str) -> str:
        """Absolute path of the file, or of the folder of frames."""
        return self._folder.path(key)


def _folder_of(key: str) -> str:
    return key.rpartition("/")[0]


VIDEO = SourceKind(
    "clips: [SPLIT/]CLASS/NAME.mp4, or folders of frames [SPLIT/]CLASS/NAME/0001.jpg",
    lambda opening: VideoSource.open(find_folder(f"folder/{opening.rest}", opening.data_root)),
)
