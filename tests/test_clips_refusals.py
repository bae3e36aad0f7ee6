"""Images where clips are wanted, and the reverse; sizes, tables and folders that are none of clips."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from clip_tools import make_clips, make_weights
from conftest import make_folder
from PIL import Image
from test_clips import write

import kdcli
from kdcli.data.clips import open_clip
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, KdError, UsageError
from kdcli.models.grammar import recorded_model
from kdcli.models.spec import open_model

av = pytest.importorskip("av", reason="PyAV is not installed")
OF_CLIPS, OF_IMAGES = (
    "takes images, and the data are clips",
    "takes clips of 3 frames, and the data are images",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and images of the same classes; a network; a run on each kind of data is a test's own."""
    root = tmp_path_factory.mktemp("place")
    make_clips(root / "v")
    for split in ("train", "test"):
        make_folder(root / "i" / split, classes=2, per_class=4)
        for number, name in enumerate(("run", "walk")):
            (root / "i" / split / f"class{number}").rename(root / "i" / split / name)
    make_weights(root / "w.safetensors")
    return root


@contextmanager
def refused(code: int, *words: str) -> Iterator[None]:
    with pytest.raises(KdError) as found:
        yield
    assert found.value.exit_code == code
    for word in words:
        assert word in f"{found.value.message} {found.value.hint}"


def test_each_command_refuses_the_other_kind(place: Path, tmp_path: Path) -> None:
    clips, images = f"video/{place}/v", f"folder/{place}/i"
    image = f"test_resnet@{place}/w.safetensors"
    clip = f"frames:{image}[size=3x64x64]"
    with refused(2, f"'b' {OF_CLIPS}", "frames:"):
        kdcli.compare(models=[f"a={clip}", f"b={image}"], test=f"{clips}@split=test", workers=0)
    with refused(2, f"'a' {OF_IMAGES}", "video/FOLDER"):
        kdcli.compare(models=[f"a={clip}", f"b={image}"], test=f"{images}@split=test", workers=0)
    line = {"student": clip, "epochs": 1, "batch_size": 3, "workers": 0}
    with refused(2, OF_IMAGES):
        kdcli.train_student(
            f"{clips}@split=train",
            method="labels-only",
            test=f"{images}@split=test",
            out=tmp_path / "o",
            **line,
        )
    with refused(2, OF_IMAGES):
        kdcli.train_student(
            [f"a={clips}@split=train", f"b={images}@split=train"],
            method="multi-task",
            out=tmp_path / "o",
            **line,
        )
    runs = [tmp_path / "s1", tmp_path / "s2"]
    for seed, out in enumerate(runs):
        kdcli.train_student(f"{clips}@split=train", method="labels-only", seed=seed, out=out, **line)
    with refused(2, f"the soup {OF_IMAGES}"):
        kdcli.soup(parents=runs, out=tmp_path / "soup", recalibrate_bn=f"{images}@split=train", workers=0)
    with refused(2, f"the soup {OF_IMAGES}"):
        kdcli.soup(parents=runs, out=tmp_path / "soup2", test=f"{images}@split=test", workers=0)


def test_a_cache_grows_by_its_own_kind_and_its_loader_shows_clips(place: Path, tmp_path: Path) -> None:
    clips, images = f"video/{place}/v@split=train", f"folder/{place}/i@split=train"
    spec = f"test_resnet@{place}/w.safetensors"
    own, other = tmp_path / "c.kd", tmp_path / "i.kd"
    line = {"keep": "logits", "workers": 0}
    kdcli.cache_teachers(clips, cache=own, teacher=f"a=frames:{spec}[size=3x64x64]", **line)
    kdcli.cache_teachers(images, cache=other, teacher=f"a={spec}", **line)
    with refused(21, "c.kd holds clips", "images", "kd cache-teachers"):
        kdcli.cache_extend(own, images)
    with refused(21, "i.kd holds images", "clips", "kd cache-teachers"):
        kdcli.cache_extend(other, clips)
    cache = kdcli.open_cache(own)
    loader = cache.loader(clips, student="frames:test_efficientnet[size=4x32x32]", batch_size=2, workers=0)
    assert next(iter(loader))["image"].shape == (2, 3, 4, 32, 32)
    for student in ("test_efficientnet", 32):
        with pytest.raises(UsageError, match=OF_CLIPS):
            cache.loader(clips, student=student, batch_size=2)


@pytest.mark.parametrize("told", ["2x3x4x5", "0x32x32", "2x0x32", "-2x32x32", "2x32x"])
def test_what_is_no_size(told: str) -> None:
    with pytest.raises(UsageError, match="is no size in pixels"):
        open_model(f"frames:test_resnet[size={told}]", weights="random")


def test_sizes_of_clips_are_for_models_of_clips() -> None:
    for name in ("test_resnet", "torchvision/resnet18"):
        with pytest.raises(UsageError, match="takes images, and 2x32x32 is a size of clips") as found:
            open_model(f"{name}[size=2x32x32]", weights="random")
        assert f"frames:{name}[size=2x32x32]" in found.value.hint
    told = open_model("frames:test_resnet[size=2x48x48]", weights="random", image_size=32)
    assert told.preprocess.size == (2, 32, 32)  # the frames stay as they were told
    with pytest.raises(UsageError, match="takes clips as it is"):
        open_model("frames:torchvision/r3d_18", weights="random")


def test_code_that_only_a_file_names_is_not_run_behind_frames() -> None:
    assert recorded_model("frames:test_resnet[size=2x32x32]") == "frames:test_resnet[size=2x32x32]"
    for text in (
        "os.path:join",
        "frames:os.path:join",
        "frames:frames:os.path:join[size=2x32x32]",
        "frames: os:sep",
    ):
        with pytest.raises(UsageError, match="Python code, and kd runs none that only a file names"):
            recorded_model(text)


def test_tables_say_what_is_wrong_with_a_window(tmp_path: Path) -> None:
    write(tmp_path / "v.mkv", 50, 1)  # 2 s
    table = tmp_path / "t.csv"

    def opened(start: object, end: object, times: str = "@start=start,end=end") -> ImageData:
        table.write_text(f"path,label,start,end\nv.mkv,a,0,1\nv.mkv,b,{start},{end}\n")
        return open_data(f"csv/{table}{times}")

    for window, said in (
        ((1.5, 0.5), "line 3: the clip ends (0.5 s) no later than it begins"), ((1, 1), "no later than it begins"),
        (("nan", 1), "'nan' is no time"), ((-1, 1), "'-1' is no time"), (("one", 2), "'one' is no time"),
        ((0, "inf"), "'inf' is no time"), ((0, 1), "has the path v.mkv#0-1 in line 2 and in line 3"),
    ):  # fmt: skip
        with refused(12, said):
            opened(*window)
    with refused(12, "names videos, such as v.mkv", "start=COLUMN,end=COLUMN"):
        opened(1, 2, times="")
    with refused(2, "has no column 'begin'"):
        opened(1, 2, times="@start=begin")
    data = opened(30, 40)
    with refused(12, "v.mkv#30-40", "without a frame from 30 s to 40 s"):
        data.image(1)
    assert opened(1.5, 40).image(1).size == (3 * 56, 40)  # up to its end


def test_folders_that_hold_no_clips(place: Path, tmp_path: Path) -> None:
    with refused(2, f"Say which: video/{place}/v@split=train"):
        open_data(f"video/{place}/v")
    for name in ("c0/0.png", "c0/1.png", "9.png"):
        file = tmp_path / "f/run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    with refused(12, "in no folder of their own"):
        open_data(f"video/{tmp_path}/f")
    for name, told in (("z.mp4", "no video in it"), ("s.mkv", "no video in it (sound alone)")):
        with av.open(str(tmp_path / name), "w") as container:
            if name == "s.mkv":
                stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
                frame.sample_rate, frame.pts = 16000, 0
                container.mux(stream.encode(frame))
            else:
                stream = container.add_stream("mpeg4", rate=25)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                container.start_encoding()
        folder = tmp_path / name.partition(".")[0] / "run"
        folder.mkdir(parents=True)
        (tmp_path / name).rename(folder / name)
        result = kdcli.check_data(f"video/{folder.parent}").document()
        assert any(each["example"].endswith(told) for each in result["findings"]), result


def test_videos_and_folders_of_frames_are_not_mixed_and_a_class_is_no_clip(tmp_path: Path) -> None:
    def frames(*places: str) -> None:
        for place in places:
            (tmp_path / place).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (16, 12), (40 * number, 0, 0)).save(tmp_path / place / f"{number}.png")

    frames("mixed/a/c0", "mixed/b/c0", "plain/a", "plain/b", "split/train/a", "split/test/a", "good/run/run")
    write(tmp_path / "mixed/c/v.mkv", 3, 0)
    with pytest.raises(BadDataError, match="a/c0 images: clips are files, or folders of frames"):
        open_data(f"video/{tmp_path}/mixed")
    with pytest.raises(BadDataError, match="plain/a is a class"):
        open_data(f"video/{tmp_path}/plain")
    with pytest.raises(BadDataError, match="split/train/a is a class"):
        open_data(f"video/{tmp_path}/split@split=train")
    assert list(open_data(f"video/{tmp_path}/good").keys) == ["run/run"]
    (tmp_path / "none/a").mkdir(parents=True)
    (tmp_path / "none/a/x.flv").write_bytes(b"x")
    with pytest.raises(BadDataError, match="no videos in") as refused:
        open_data(f"video/{tmp_path}/none")
    assert "mp4" in str(refused.value.hint)
    Image.new("RGB", (16, 12)).save(tmp_path / "picture.jpg")
    with pytest.raises(BadDataError, match="an image, not a video"):
        open_clip((tmp_path / "picture.jpg").read_bytes(), "picture.mp4")
