"""What holds for every source of image files: what is cached through it is what is cached through the folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import Shell

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import open_data


def require_as_the_folder(
    kd: Callable[..., Shell], folder: Path, other: str, key_of: Callable[[str], str], teacher: str
) -> None:
    """Cache both with one teacher: equal logits, and equal identities of the images, image by image.

    Args:
        kd: runs a command in the folder's parent.
        folder: of images.
        other: the same images by another source.
        key_of: what the other source calls the folder's image.
        teacher: spec of a small teacher.
    """
    for name, data in (("folder", str(folder)), ("other", other)):
        done = kd(
            "cache-teachers", data, "--cache", f"{name}.kd", "--teacher", f"t={teacher}", "--dtype", "float32"
        )
        assert done.code == 0, done.err
    files, found = open_data(str(folder)), open_data(other)
    assert sorted(map(key_of, files.keys)) == list(found.keys)
    row_of = {key: row for row, key in enumerate(found.keys)}
    order = np.array([row_of[key_of(key)] for key in files.keys])
    names = [
        [data.class_names[label] for label in data.labels] for data in (files, found) if data.class_names
    ]
    assert names[0] == [names[1][row] for row in order]
    caches = [CacheSet.open([folder.parent / f"{name}.kd"]) for name in ("folder", "other")]
    rows = [cache.rows_of(data) for cache, data in zip(caches, (files, found), strict=True)]
    logits = [cache.gather("t", "logits", each) for cache, each in zip(caches, rows, strict=True)]
    np.testing.assert_array_equal(logits[0], logits[1][order])
    assert len({row.tobytes() for row in logits[0]}) == len(files)  # not merely equal, as zeros are
    for mine, theirs in zip(caches[0].content(rows[0]), caches[1].content(rows[1]), strict=True):
        np.testing.assert_array_equal(mine, theirs[order])
