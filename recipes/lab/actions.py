"""Clips of people who act, rendered: pybullet's fifteen recordings of motion, in three worlds.

There is one recording an action. A world has a body, a camera, a scene and eight of the actions. A split has sides
from which an action is seen (:data:`SECTORS`) that no other split has, mirrored or not. Of every clip its own are:
which part of the recording it shows, its speed, whether it is mirrored, proportions, height and distance of the
camera, colours, light. The same arguments give the same frames.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from colorsys import hsv_to_rgb
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, final
from xml.etree import ElementTree

import numpy as np

from kdcli.errors import MissingExtraError
from kdcli.files import make_folder, storage_errors
from lab.motions import EXTRA, JOINTS, Array, data, library, motion

Range = tuple[float, float]

SIDE: Final = 112  # pixels of a frame
FRAMES: Final = 16  # of a clip
RATE: Final = 12  # frames a second
SECTORS: Final[Mapping[str, tuple[Range, ...]]] = {
    "train": ((0, 20), (40, 60), (80, 100), (120, 140), (160, 180)),
    "val": ((67, 73), (147, 153)),
    "test": ((27, 33), (107, 113)),
}
"""Degrees between the way that a recording faces at its beginning and the camera, by split; on either side."""


@final
@dataclass(frozen=True, slots=True)
class World:
    """What the clips of a data set share.

    Attributes:
        actions: names of recordings.
        body: ``capsules``, ``sticks`` or ``blocks``.
        floor: ``plain``, ``checks`` or ``stripes``.
        heights: of the camera above the horizon, in degrees.
        field: of view, in degrees.
        distance: of the camera, in metres.
        follows: whether the camera goes with the body; else it stays where the middle of the action is.
        light: on a body where no lamp shines, and what a lamp adds.
        brightness: of the scene.
    """

    actions: tuple[str, ...]
    body: str
    floor: str
    heights: Range
    field: float
    distance: Range
    follows: bool
    light: tuple[float, float]
    brightness: Range


WORLDS: Final[Mapping[str, World]] = {
    "studio": World(
        ("walk", "run", "jump", "kick", "punch", "spinkick", "dance_a", "dance_b"),
        "capsules", "plain", (2, 12), 30, (4.2, 5.2), True, (0.6, 0.5), (0.75, 1.0),
    ),
    "yard": World(
        ("walk", "run", "crawl", "roll", "cartwheel", "backflip", "getup_facedown", "spin"),
        "sticks", "checks", (28, 42), 40, (2.4, 3.0), True, (0.5, 0.7), (0.5, 0.9),
    ),
    "night": World(
        ("jump", "punch", "spinkick", "dance_b", "spin", "crawl", "backflip", "getup_faceup"),
        "blocks", "stripes", (-1, 8), 50, (2.6, 3.3), False, (0.35, 0.8), (0.05, 0.3),
    ),
}  # fmt: skip


# --- bodies -------------------------------------------------------------------------------------

_THICK: Final = {"capsules": 1.0, "sticks": 0.7, "blocks": 0.85}


def body(kind: str, thickness: float) -> str:
    """URDF text of pybullet's humanoid with other shapes around the same joints.

    Args:
        kind: see :class:`World`.
        thickness: of its limbs; 1 is that of the kind.
    """
    text = (data() / "humanoid" / "humanoid.urdf").read_text()
    robot = ElementTree.fromstring(text.rstrip("\0\n"))  # the file ends with a zero
    for joint in robot.iter("joint"):
        if joint.get("type") == "spherical":  # or the library says on standard output what it takes instead
            ElementTree.SubElement(joint, "axis", xyz="1 0 0")
    for link in robot.iter("link"):
        for collision in link.findall("collision"):
            link.remove(collision)
            visual = ElementTree.SubElement(link, "visual")
            visual.extend(list(collision))
            (shape,) = next(visual.iter("geometry"))
            _shape(shape, kind, thickness * (1.0 if link.get("name") == "neck" else _THICK[kind]))
    return ElementTree.tostring(robot, encoding="unicode")


def _shape(shape: ElementTree.Element, kind: str, thickness: float) -> None:
    if shape.tag == "box":  # feet
        long, *others = map(float, str(shape.get("size")).split())
        shape.set("size", " ".join(map(str, (long, *(thickness * each for each in others)))))
        return
    radius = thickness * float(str(shape.get("radius")))
    if kind != "blocks":
        shape.set("radius", str(radius))
        return
    long = float(shape.get("length", 0)) + 1.8 * radius
    shape.tag = "box"
    shape.attrib = {"size": f"{1.8 * radius} {1.8 * radius} {long}"}


# --- clips --------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Clip:
    """What a clip shows, drawn by its name.

    Attributes:
        world: one of :data:`WORLDS`.
        split: one of :data:`SECTORS`.
        action: one of the world's.
        number: among the clips of the three.
    """

    world: str
    split: str
    action: str
    number: int

    def frames(self) -> "Iterator[np.ndarray[Any, np.dtype[np.uint8]]]":
        """[SIDE, SIDE, 3] each.

        Raises:
            MissingExtraError: pybullet is not installed.
        """
        seed = hashlib.sha256(f"{self.world}/{self.split}/{self.action}/{self.number}".encode()).digest()
        random = np.random.default_rng(list(seed))
        poses, take = self._poses(random), _take(random, WORLDS[self.world], self.split)
        middle = (poses[:, :3].min(axis=0) + poses[:, :3].max(axis=0)) / 2
        with _figure(take) as figure:
            for pose in poses:
                at = pose[:3] if take.world.follows else middle
                camera = take.camera(np.array([at[0], 0.75, at[2]]))
                figure.set(pose)
                frame = figure.draw(camera, take.backdrop(camera))
                yield frame[:, ::-1] if take.mirrored else frame

    def _poses(self, random: np.random.Generator) -> Array:
        """A part of the recording: anywhere in a loop, else as late as leaves it to the end."""
        recorded, speed = motion(self.action), random.uniform(0.8, 1.25)
        length, span = recorded.times[-1], speed * (FRAMES - 1) / RATE
        begin = random.uniform(0, length if recorded.loops else max(0.0, length - span))
        poses = np.array([recorded.at(begin + span * place / (FRAMES - 1)) for place in range(FRAMES)])
        poses[:, [0, 2]] -= poses[0, [0, 2]]
        return poses


@final
@dataclass(frozen=True, slots=True)
class _Camera:
    eye: Array
    target: Array
    field: float


@final
@dataclass(frozen=True, slots=True)
class _Take:
    """All of a clip but its poses."""

    world: World
    side: float
    height: float
    distance: float
    mirrored: bool
    thickness: float
    size: float
    colours: Array
    floor: Array
    lamp: Array
    grain: Array

    def camera(self, target: Array) -> _Camera:
        side, height = np.radians([self.side, self.height])
        away = np.array([np.cos(height) * np.cos(side), np.sin(height), np.cos(height) * np.sin(side)])
        return _Camera(target + self.distance * away, target, self.world.field)

    def backdrop(self, camera: _Camera) -> Array:
        """Floor and what is behind it, [3, SIDE, SIDE] from 0 to 1."""
        ahead = camera.target - camera.eye
        ahead /= np.linalg.norm(ahead)
        right = np.cross(ahead, [0.0, 1.0, 0.0])
        right /= np.linalg.norm(right)
        up = np.cross(right, ahead)
        reach = np.tan(np.radians(camera.field) / 2) * (2 * (np.arange(SIDE) + 0.5) / SIDE - 1)
        x, y, z = (ahead[axis] + reach * right[axis] - reach[:, None] * up[axis] for axis in range(3))
        far = -camera.eye[1] / np.minimum(y, -1e-3)
        tiles = [np.floor((camera.eye[axis] + far * ray) / _TILE) for axis, ray in ((0, x), (2, z))]
        shade = 1 - _SHADE[self.world.floor](*tiles) * np.exp(-far / 12)
        wall = 1 - 0.4 * np.clip(y / reach[-1], 0, 1)
        bright = np.where(y < 0, shade, wall) + self.grain
        colours: Array = np.where(y < 0, *self.floor[:, :, None, None]) * bright
        return colours


_TILE: Final = 0.6  # metres
_SHADE: Final[Mapping[str, Callable[[Array, Array], Array]]] = {
    "plain": lambda x, _: np.zeros_like(x),
    "checks": lambda x, z: 0.25 * ((x + z) % 2),
    "stripes": lambda x, _: 0.25 * (x % 2),
}


def _take(random: np.random.Generator, world: World, split: str) -> _Take:
    sector = SECTORS[split][random.integers(len(SECTORS[split]))]
    return _Take(
        world,
        side=random.choice([-1, 1]) * random.uniform(*sector),
        height=random.uniform(*world.heights),
        distance=random.uniform(*world.distance),
        mirrored=bool(random.integers(2)),
        thickness=random.uniform(0.8, 1.25),
        size=random.uniform(0.9, 1.1),
        colours=np.array([_colour(random, (0.4, 0.9), (0.5, 1.0)) for _ in range(3)]),
        floor=np.array([_colour(random, (0.1, 0.4), world.brightness) for _ in range(2)]),
        lamp=np.array([random.uniform(-1, 1), random.uniform(0.6, 1.5), random.uniform(-1, 1)]),
        grain=random.normal(0, 0.02, (SIDE, SIDE)),
    )


def _colour(random: np.random.Generator, saturation: Range, value: Range) -> tuple[float, float, float]:
    return hsv_to_rgb(random.uniform(), random.uniform(*saturation), random.uniform(*value))


@cache
def _client() -> int:
    """One world of pybullet for all clips, which are drawn one after the other: opening one takes as long as a clip."""
    bullet = library()[0]
    return int(bullet.connect(bullet.DIRECT))


@contextmanager
def _figure(take: _Take) -> "Iterator[_Figure]":
    """A body, for the time of the block."""
    bullet, client = library()[0], _client()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "body.urdf"
        file.write_text(body(take.world.body, take.thickness))
        number = bullet.loadURDF(str(file), globalScaling=_SCALE * take.size, physicsClientId=client)
    try:
        yield _Figure(take, client, number)
    finally:
        bullet.removeBody(number, physicsClientId=client)


_SCALE: Final = 0.25
"""pybullet's humanoid is that many times as large as the one that was recorded."""
_PARTS: Final = {"hip": 1, "knee": 1, "ankle": 2, "neck": 2, "elbow": 2, "wrist": 2}
"""Number of the colour of a link; of the others it is the first."""


@final
class _Figure:
    """A body in pybullet, drawn on the processor."""

    def __init__(self, take: _Take, client: int, number: int) -> None:
        self._bullet, self._take, self._client, self._number = library()[0], take, client, number
        self._joints: dict[str, int] = {}
        for joint in range(self._bullet.getNumJoints(number, physicsClientId=client)):
            told = self._bullet.getJointInfo(number, joint, physicsClientId=client)
            self._joints[told[1].decode()] = joint
            colour = take.colours[_PARTS.get(told[12].decode().rpartition("_")[2], 0)]
            self._bullet.changeVisualShape(number, joint, rgbaColor=[*colour, 1], physicsClientId=client)

    def set(self, pose: Array) -> None:
        """Take a pose."""
        self._bullet.resetBasePositionAndOrientation(
            self._number, pose[:3] * self._take.size, _xyzw(pose[3:7]), physicsClientId=self._client
        )
        for name, part in JOINTS.items():
            turn = _xyzw(pose[part]) if part.stop - part.start == 4 else pose[part]
            self._bullet.resetJointStateMultiDof(
                self._number, self._joints[name], turn, physicsClientId=self._client
            )

    def draw(self, camera: _Camera, backdrop: Array) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """[SIDE, SIDE, 3]."""
        bullet, (ambient, lamp) = self._bullet, self._take.world.light
        _, _, pixels, _, seen = bullet.getCameraImage(
            SIDE, SIDE, bullet.computeViewMatrix(camera.eye, camera.target, [0, 1, 0]),
            bullet.computeProjectionMatrixFOV(camera.field, 1.0, 0.1, 20.0),
            lightDirection=self._take.lamp, lightAmbientCoeff=ambient, lightDiffuseCoeff=lamp,
            lightSpecularCoeff=0.1, shadow=0, renderer=bullet.ER_TINY_RENDERER, physicsClientId=self._client,
        )  # fmt: skip
        figure = np.asarray(pixels, np.uint8).reshape(SIDE, SIDE, 4)[..., :3]
        behind = (255 * backdrop.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
        return np.where(np.asarray(seen).reshape(SIDE, SIDE, 1) < 0, behind, figure)


def _xyzw(turn: Array) -> Array:
    return np.roll(turn, -1)


# --- files --------------------------------------------------------------------------------------


def render(folder: Path, world: str, counts: Mapping[str, int]) -> None:
    """Write ``folder/SPLIT/ACTION/NUMBER.mp4``; what is there is left alone.

    Args:
        folder: of the world's clips.
        world: one of :data:`WORLDS`.
        counts: clips of each action, by split.

    Raises:
        MissingExtraError: pybullet or PyAV is not installed.
        StorageError, NoSpaceError: the folder cannot be written.
    """
    with storage_errors(folder):
        for split, count in counts.items():
            for action in WORLDS[world].actions:
                make_folder(folder / split / action)
                for number in range(count):
                    path = folder / split / action / f"{number:03}.mp4"
                    if not path.exists():
                        _write(path, Clip(world, split, action, number).frames())


def _write(path: Path, frames: "Iterator[np.ndarray[Any, np.dtype[np.uint8]]]") -> None:
    """As MPEG-4, which every PyAV has; at its place when it is whole."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("PyAV is not installed, which writes clips", EXTRA) from error
    half = path.with_suffix(".part")
    with av.open(str(half), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIDE, SIDE, "yuv420p", 1_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))
    half.replace(path)
