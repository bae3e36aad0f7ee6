"""P4's study on clips: the actions that are rendered, its steps, and its tiny run."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import actions, motions
from lab.actions import SECTORS, WORLDS, Clip, render
from lab.motions import Motion
from lab.places import Places
from lab.realworld import p4, study
from lab.realworld.__main__ import main, the_claims_page
from lab.realworld.claims import Claim, read_claims
from lab.realworld.shared import Room
from lab.settings import RECIPES, read_settings
from lab.steps import Lab, Step

from kdcli.errors import MissingExtraError

FOLDER = study.CLIPS.folder
STUDIES = ["--studies", "realworld-video"]


def room_of(out: Path, *, tiny: bool, **given: Any) -> Room:
    settings = read_settings(FOLDER / "recipe.yaml", tiny=tiny, given=given)
    return study.room_of(Lab(settings, Places({}), out), tiny=tiny)


def claims() -> list[Claim]:
    return [claim for claim in read_claims(FOLDER / "claims.yaml") if claim.paper == "p4"]


def option(step: Step, name: str) -> list[str]:
    return [value for flag, value in zip(step.words, step.words[1:], strict=False) if flag == f"--{name}"]


# --- the study -----------------------------------------------------------------------------------


def test_the_committed_claims_page_is_that_of_the_claims() -> None:
    page = RECIPES.parent / "docs" / "realworld-p4-video-claims.md"
    assert page.read_text() == the_claims_page(study.CLIPS)


def test_every_world_has_its_claims_and_enough_seeds() -> None:
    settings = read_settings(FOLDER / "recipe.yaml")
    assert list(settings["p4.sets"]) == list(WORLDS)
    assert settings["p4.seeds"] >= 3
    assert settings["clips.tested"] == "test"
    asked = {(claim.row, claim.than, claim.column) for claim in claims()}
    for column in (*WORLDS, "mean"):
        assert ("student L2", "student L1", column) in asked
        assert ("student L1", "data-set-specific", column) in asked


def test_networks_of_images_are_shown_frames_and_the_split_that_is_tested_can_be_another(
    tmp_path: Path,
) -> None:
    for tested in ("test", "val"):
        room = room_of(tmp_path, tiny=False, **{"clips.tested": tested})
        found = {step.name: step for step in study.CLIPS.steps(room)}
        own = found["p4/seed1/own/yard"]
        shown = f"{room.settings['frames']}x{room.settings['image_size']}x{room.settings['image_size']}"
        assert option(own, "student") == [f"frames:local-dir:{tmp_path}/weights/lite1[size={shown}]"]
        assert option(own, "test") == [f"video/{tmp_path}/clips/yard@split={tested}"]
        assert own.words[1].startswith(f"video/{tmp_path}/clips/yard@split=train,")


def test_the_tiny_run_gives_all_that_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDIES, "--out", str(tmp_path), "--tiny", "--docs", str(tmp_path)]) == 0
    values = p4.values(room_of(tmp_path, tiny=True))
    for claim in claims():
        for row in [claim.row, *([claim.than] if isinstance(claim.than, str) else [])]:
            by_seed = values[row, claim.column]
            assert by_seed
            assert all(0 <= value <= 100 for value in by_seed.values())
    page = capsys.readouterr().out
    assert (tmp_path / "realworld-p4-video.md").read_text() == page[:-1]
    assert page.count("\n| P4: ") == len(claims())
    assert "not run" not in page
    assert "Not all has run" not in page
    assert main([*STUDIES, "--out", str(tmp_path), "--tiny", "--page", "--set", "p4.seeds=2"]) == 0
    assert "Not all has run: 22 of 41 steps are finished." in capsys.readouterr().out


def test_without_pybullet_it_is_said_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pybullet", None)
    for kept in (motions.library, motions.motion):
        kept.cache_clear()
    assert main([*STUDIES, "--out", str(tmp_path)]) == MissingExtraError.exit_code
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: pybullet is not installed, whose recordings are rendered"
    assert second == f"hint: {motions.EXTRA}"


# --- the clips -----------------------------------------------------------------------------------


def test_no_side_is_of_two_splits() -> None:
    """Sides are on either side of the line of sight, so a mirrored clip has the same one."""
    ranges = sorted((*each, split) for split, found in SECTORS.items() for each in found)
    for (_, end, split), (begin, _, other) in pairwise(ranges):
        assert split != other
        assert begin - end >= 7
    assert {split for *_, split in ranges} == {"train", "val", "test"}


def test_worlds_differ_in_their_actions_and_share_some() -> None:
    for world in WORLDS.values():
        assert len(set(world.actions)) == 8
        for other in WORLDS.values():
            assert other is world or set(world.actions) & set(other.actions) not in (
                set(),
                set(world.actions),
            )
    looks = [(world.body, world.floor, world.heights, world.field) for world in WORLDS.values()]
    assert len({each for look in zip(*looks, strict=True) for each in look}) == 3 * 4


def test_a_motion_has_its_poses_at_their_times_and_goes_on_or_stays() -> None:
    poses = np.zeros((3, 43))
    poses[:, 0] = 0, 1, 4  # it goes on
    for part in motions.TURNS:
        poses[:, part.start] = 1, -1, 1  # a turn and its negative are one
    poses[:, 19] = 0, 2, 0  # an angle
    looping = Motion(np.array([0.0, 0.5, 2.0]), poses, True)
    staying = Motion(looping.times, poses, False)
    for motion in (looping, staying):
        np.testing.assert_allclose(motion.at(0.25)[[0, 3, 19]], [0.5, 1, 1])
        np.testing.assert_allclose(np.abs(motion.at(1.25)[[0, 3, 19]]), [2.5, 1, 1])
    np.testing.assert_allclose(np.abs(looping.at(4.25)[[0, 3, 19]]), [8.5, 1, 1])
    np.testing.assert_allclose(np.abs(staying.at(4.25)[[0, 3, 19]]), [4, 1, 0])


@pytest.fixture(scope="module")
def bullet() -> Any:
    for kept in (motions.library, motions.motion):
        kept.cache_clear()
    return pytest.importorskip(
        "pybullet", reason="pybullet is not installed (no wheels for Python 3.12): " + motions.EXTRA
    )


@pytest.mark.usefixtures("bullet")
@pytest.mark.parametrize("world", WORLDS)
def test_a_clip_is_the_same_each_time_and_no_other_ones(world: str) -> None:
    action = WORLDS[world].actions[-1]
    one, again, other = (
        np.stack(list(Clip(world, "train", action, number).frames())) for number in (0, 0, 1)
    )
    assert one.shape == (actions.FRAMES, actions.SIDE, actions.SIDE, 3)
    assert np.array_equal(one, again)
    assert np.abs(one.astype(int) - other).mean() > 5
    moved = np.abs(np.diff(one.astype(int), axis=0)).max(axis=(1, 2, 3))
    assert (moved > 50).all()  # somebody moves between any two frames


def test_limbs_are_where_the_recording_turns_them(bullet: Any) -> None:
    """The oracle chains rotations of scipy by hand, hip to knee to ankle; lengths are those of the URDF."""
    from scipy.spatial.transform import Rotation

    pose = motions.motion("kick").at(0.7)
    take = actions._take(np.random.default_rng(0), WORLDS["studio"], "train")
    with actions._figure(take) as figure:
        figure.set(pose)
        joint = figure._joints["left_ankle"]
        found = bullet.getLinkState(figure._number, joint, 0, True, figure._client)[4]

    def turn(part: slice) -> Any:
        return Rotation.from_quat(np.roll(pose[part], -1))

    root, hip = turn(slice(3, 7)), turn(motions.JOINTS["left_hip"])
    knee = Rotation.from_rotvec([0, 0, pose[33]])
    below = hip.apply(np.add([0, -1.686184, 0], knee.apply([0, -1.63948, 0])))
    wanted = pose[:3] + 0.25 * root.apply(np.add([0, 0, -0.339548], below))
    np.testing.assert_allclose(found, take.size * wanted, atol=1e-3)


@pytest.mark.usefixtures("bullet")
def test_files_are_written_once_and_hold_the_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    render(tmp_path, "night", {"val": 1})
    files = sorted(tmp_path.rglob("*.mp4"))
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        f"val/{action}/000.mp4" for action in sorted(WORLDS["night"].actions)
    ]
    with av.open(str(files[0])) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    drawn = list(Clip("night", "val", files[0].parent.name, 0).frames())
    assert len(read) == actions.FRAMES
    assert np.abs(np.stack(read).astype(int) - np.stack(drawn)).mean() < 6  # compressed
    before = [file.stat().st_mtime_ns for file in files]
    render(tmp_path, "night", {"val": 1})
    assert [file.stat().st_mtime_ns for file in files] == before
