"""Recordings of motion that come with pybullet."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from kdcli.errors import MissingExtraError

Array = np.ndarray[Any, np.dtype[np.float64]]
EXTRA: Final = "pip install pybullet av"
JOINTS: Final = {
    "chest": slice(7, 11), "neck": slice(11, 15), "right_hip": slice(15, 19), "right_knee": slice(19, 20),
    "right_ankle": slice(20, 24), "right_shoulder": slice(24, 28), "right_elbow": slice(28, 29),
    "left_hip": slice(29, 33), "left_knee": slice(33, 34), "left_ankle": slice(34, 38),
    "left_shoulder": slice(38, 42), "left_elbow": slice(42, 43),
}  # fmt: skip
"""Where a pose has them; before them place and turn of the root. Turns are w, x, y, z; knees and elbows have angles."""
TURNS: Final = [slice(3, 7), *(part for part in JOINTS.values() if part.stop - part.start == 4)]


@final
@dataclass(frozen=True, slots=True)
class Motion:
    """A recording.

    Attributes:
        times: of its poses, in seconds from 0.
        poses: a row each, as the file has them; height is y.
        loops: whether its end leads into its beginning.
    """

    times: Array
    poses: Array
    loops: bool

    def at(self, time: float) -> Array:
        """The pose at a time: a loop goes on from where it has come to, another one stays at its end."""
        length = self.times[-1]
        rounds, rest = divmod(time, length) if self.loops else (0, min(time, length))
        place = min(int(np.searchsorted(self.times, rest, "right")) - 1, len(self.times) - 2)
        share = (rest - self.times[place]) / (self.times[place + 1] - self.times[place])
        one, other = self.poses[place], self.poses[place + 1].copy()
        for part in TURNS:  # a turn and its negative are one
            other[part] *= 1 if one[part] @ other[part] >= 0 else -1
        pose: Array = one + share * (other - one)
        for part in TURNS:
            pose[part] /= np.linalg.norm(pose[part])
        pose[[0, 2]] += rounds * (self.poses[-1] - self.poses[0])[[0, 2]]
        return pose


@cache
def motion(action: str) -> Motion:
    """A recording that comes with pybullet."""
    path = data() / "data" / "motions" / f"humanoid3d_{action}.txt"
    document = json.loads(path.read_text())
    rows = np.array(document["Frames"], dtype=np.float64)
    times = np.concatenate([[0.0], np.cumsum(rows[:-1, 0])])
    return Motion(times, rows[:, 1:], document["Loop"] == "wrap")


def data() -> Path:
    """Where pybullet has its recordings and bodies."""
    return Path(library()[1].getDataPath())


@cache
def library() -> tuple[Any, Any]:
    """The modules pybullet and pybullet_data.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        import pybullet
        import pybullet_data
    except ImportError as error:
        raise MissingExtraError("pybullet is not installed, whose recordings are rendered", EXTRA) from error
    return pybullet, pybullet_data
