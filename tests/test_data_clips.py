"""Clips: their frames, which of them are shown, and what is refused."""

import re
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcli.auditing.hashing import fingerprints
from kdcli.data.clips import TIME_WORDS, Clip, moments, open_clip, pack_frames, random_span
from kdcli.data.sources import open_data
from kdcli.errors import BadDataError

av = pytest.importorskip("av", reason="PyAV is not installed")


def video(
    frames: Sequence[np.ndarray],
    *,
    rate: int = 25,
    times: Sequence[int] | None = None,
    ending: str = "matroska",
) -> bytes:
    """A lossless video of RGB frames; ``times`` in milliseconds in place of a steady rate."""
    file = BytesIO()
    with av.open(file, "w", format=ending) as container:
        stream = container.add_stream("ffv1", rate=rate, options={"slices": "4"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def numbered(count: int, width: int = 48, height: int = 32, seed: int = 0) -> list[np.ndarray]:
    """Frames that differ in every pixel."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def shown(clip: Clip, places: Sequence[int]) -> list[np.ndarray]:
    return [np.asarray(image) for image in clip.at(places)]


def test_frames_come_back_as_they_went_in() -> None:
    frames = numbered(11)
    clip = open_clip(video(frames), "a.mkv")
    assert (clip.frames, clip.size, clip.rate, clip.steady) == (11, (48, 32), 25, True)
    for place, found in zip((0, 3, 3, 10), shown(clip, (0, 3, 3, 10)), strict=True):
        np.testing.assert_array_equal(found, frames[place])


def test_a_long_clip_is_decoded_again_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = video(numbered(9))
    kept = shown(open_clip(encoded, "a"), (1, 4, 4, 8))
    monkeypatch.setattr("kdcli.data.clips._KEPT_BYTES", 3 * 48 * 32 * 3)
    again = open_clip(encoded, "a")
    for _ in range(2):
        for one, other in zip(kept, shown(again, (1, 4, 4, 8)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_part_of_a_video_is_the_frames_of_its_seconds() -> None:
    frames = numbered(20)
    part = open_clip(video(frames, rate=10), "a", (0.5, 1.2))
    assert part.frames == 7  # 0.5, 0.6, ... 1.1 s
    np.testing.assert_array_equal(shown(part, (0,))[0], frames[5])
    assert open_clip(video(frames, rate=10), "a", (1.5, None)).frames == 5
    with pytest.raises(BadDataError, match="without a frame from 7 s to its end"):
        open_clip(video(frames, rate=10), "a", (7.0, None))


def test_frames_that_are_not_equally_far_apart_are_told() -> None:
    uneven = open_clip(video(numbered(5), times=[0, 40, 80, 800, 840]), "a")
    assert (uneven.frames, uneven.steady) == (5, False)
    assert uneven.rate == pytest.approx(4 / 0.84)
    assert open_clip(video(numbered(5), times=[0, 33, 67, 100, 133]), "a").steady  # rounded to milliseconds


def test_a_folder_of_frames_is_a_clip(tmp_path: Path) -> None:
    files = []
    for pixels in numbered(3):
        Image.fromarray(pixels).save(file := BytesIO(), "PNG")
        files.append(file.getvalue())
    clip = open_clip(pack_frames(files), "walk")
    assert (clip.frames, clip.size) == (3, (48, 32))
    np.testing.assert_array_equal(shown(clip, (2,))[0], numbered(3)[2])
    Image.new("RGB", (9, 9)).save(file := BytesIO(), "PNG")
    with pytest.raises(BadDataError, match="frame 3 has"):
        open_clip(pack_frames([*files, file.getvalue()]), "walk").load()
    for broken in (pack_frames(files)[:-1], pack_frames(files) + b"x", b"kd-frames\0x\n", pack_frames([])):
        with pytest.raises(BadDataError):
            open_clip(broken, "walk")


def test_what_is_no_clip_is_refused_by_name(tmp_path: Path) -> None:
    whole = video(numbered(8))
    sound = BytesIO()
    with av.open(sound, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for encoded, reason in (
        (b"", "empty file"),
        (b"no video" * 99, "not a video"),
        (sound.getvalue(), "sound alone"),
        (whole[:40], "not a video"),
    ):  # fmt: skip
        with pytest.raises(BadDataError, match=f"run.mp4: .*{reason}"):
            open_clip(encoded, "run.mp4")


@pytest.mark.parametrize(("ending", "codec"), [("matroska", "ffv1"), ("mp4", "mpeg4"), ("avi", "mpeg4")])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_broken_tail_is_a_bad_clip(ending: str, codec: str, share: float, tmp_path: Path) -> None:
    file = tmp_path / "clip"
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    with av.open(str(file), "w", format=ending, options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "bgr0" if codec == "ffv1" else "yuv420p"
        for pixels in numbered(50, 64, 48):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=stream.pix_fmt))
            )
        container.mux(stream.encode(None))
    whole = file.read_bytes()
    assert open_clip(whole, "a").frames == 50
    with pytest.raises(BadDataError, match=r"ends after|not a video"):
        open_clip(whole[: int(share * len(whole))], "a")


def test_a_table_gives_parts_of_videos(tmp_path: Path) -> None:
    frames = numbered(30)
    (tmp_path / "a.mkv").write_bytes(video(frames, rate=10))
    table = tmp_path / "clips.csv"
    table.write_text("path,begin,until,label\na.mkv,0.5,1.25,run\na.mkv,2,,walk\na.mkv,,0.3,run\n")
    data = open_data(f"csv/{table}@start=begin,end=until")
    assert data.clips
    assert list(data.keys) == ["a.mkv#0-0.3", "a.mkv#0.5-1.25", "a.mkv#2-"]
    clips = [data.picture(row, data.encoded(row), "exact") for row in range(3)]
    assert [isinstance(clip, Clip) and clip.frames for clip in clips] == [3, 8, 10]
    np.testing.assert_array_equal(shown(clips[1], (0,))[0], frames[5])
    assert data.image(2).size == (3 * 48, 32)
    for text, reason in (
        ("path,begin,until,label\na.mkv,2,1,run\n", "ends (1 s) no later than it begins"),
        ("path,begin,until,label\na.mkv,x,1,run\n", "'x' is no time"),
        ("path,begin,until,label\na.mkv,nan,1,run\n", "is no time"),
    ):
        table.write_text(text)
        with pytest.raises(BadDataError, match=re.escape(reason)):
            open_data(f"csv/{table}@start=begin,end=until")
    with pytest.raises(BadDataError, match="names videos") as refused:
        open_data(f"csv/{table}")
    assert "start=COLUMN,end=COLUMN" in refused.value.hint


def test_folders_of_videos_and_of_frames_are_the_same_data(tmp_path: Path) -> None:
    for name in ("run/1", "walk/2"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        (tmp_path / "videos" / name).parent.mkdir(parents=True)
        (tmp_path / "videos" / f"{name}.mkv").write_bytes(video(numbered(4)))
        for place, pixels in enumerate(numbered(4)):
            Image.fromarray(pixels).save(tmp_path / "frames" / name / f"{place}.png")
    one, other = (open_data(f"video/{tmp_path / kind}") for kind in ("videos", "frames"))
    assert (list(one.keys), list(other.keys)) == (["run/1.mkv", "walk/2.mkv"], ["run/1", "walk/2"])
    assert (one.class_names, one.labels.tolist()) == (other.class_names, other.labels.tolist())
    for row in range(2):
        pair = [data.picture(row, data.encoded(row), "exact") for data in (one, other)]
        for left, right in zip(*(shown(clip, range(4)) for clip in pair), strict=True):
            np.testing.assert_array_equal(left, right)
    with pytest.raises(BadDataError, match="in no folder of their own"):
        open_data(f"video/{make_flat(tmp_path)}")


def make_flat(root: Path) -> Path:
    (root / "flat").mkdir()
    Image.fromarray(numbered(1)[0]).save(root / "flat/x.png")
    return root / "flat"


@given(
    st.integers(1, 500),
    st.integers(1, 64),
    st.lists(st.integers(0, 2**64 - 1), min_size=TIME_WORDS, max_size=TIME_WORDS),
)
def test_moments_lie_in_their_span_in_order(frames: int, count: int, random: list[int]) -> None:
    start, span = random_span(random, frames)
    assert 0 <= start < start + span <= frames
    assert 2 * span >= frames
    found = moments(start, span, count)
    assert len(found) == count
    assert found == sorted(found)
    assert start <= found[0]
    assert found[-1] < start + span
    if span >= count:  # equal parts: as numpy has their middles
        edges = start + np.arange(count + 1) * span / count
        np.testing.assert_array_less(edges[:-1] - 1e-9, np.array(found) + 1)
        assert all(
            a <= b <= c
            for a, b, c in zip(edges[:-1], np.array(found) + 0.5 + 0.5, edges[1:] + 1, strict=True)
        )
    else:
        assert found == [min(start + place, start + span - 1) for place in range(count)]


def test_an_audit_tells_clips_apart_by_all_their_frames(tmp_path: Path) -> None:
    frames = numbered(9)
    others = [*frames[:2], *numbered(3, seed=1)[1:3], *frames[4:]]
    for name, content in (("a", frames), ("b", others), ("c", frames)):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{name}.mkv").write_bytes(video(content, rate=24 + (name == "c")))
    found = fingerprints(open_data(f"video/{tmp_path}"), 64, 0)
    assert found.words[0] == found.words[1] == found.words[2]  # their first, middle and last frames are equal
    assert found.pixels[0] == found.pixels[2] != found.pixels[1]
