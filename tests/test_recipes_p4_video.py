"""P4's recipe on clips: what is quoted stands in recipes/p4, networks by their own maps, every command by kd itself."""

import json
from pathlib import Path

import pytest
import timm
import torch
from lab import p4
from lab.__main__ import main
from lab.costs import _planned, _Weights
from lab.images import drawn
from lab.places import places_of
from lab.settings import RECIPES, Settings, read_settings
from lab.steps import Lab, StandIn, Step
from lab.tables import read_printed
from recipe_tools import run_tiny
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from kdcli.data.clips import Clip
from kdcli.data.sources import open_data
from kdcli.models.fused import FusionSpec, JointTeacher, Parent
from kdcli.models.grammar import parse_size

FOLDER = RECIPES / "p4-video"
SETS = ("ucf101", "hmdb51", "diving48")
ALIKE = {"student_levels", "baselines", "train.", "joint.", "cache.", "student.", "select"}
"""Settings, and beginnings of names, that are P4's protocol: recipes/p4 holds them against the paper's words."""
OFFICIAL = {"ucf101": (9537, 3783, 101), "hmdb51": (51 * 70, 51 * 30, 51), "diving48": (15027, 1970, 48)}


def _steps(settings: Settings) -> dict[str, Step]:
    steps = p4.steps(Lab(settings, places_of(settings).stand_ins(), Path("/out")))
    return {step.name: step for step in steps}


def test_the_protocol_is_that_of_recipes_p4_and_the_rest_says_that_it_is_ours() -> None:
    images = read_settings(RECIPES / "p4/recipe.yaml").settings
    clips = read_settings(FOLDER / "recipe.yaml").settings
    assert all(each.ours for each in clips.values())
    protocol = {name for name in clips if any(name.startswith(each) for each in ALIKE)}
    assert {name for name, each in clips.items() if each.paper} <= protocol
    for name in protocol - {"joint.map_size"}:
        own, other = clips[name], images[name]
        assert (own.value, own.paper, own.quote) == (other.value, other.paper, other.quote), name
    for network, numbers in clips["networks"].value.items():
        of_t1 = images["networks"].value.get(network, images["networks"].value["resnet18"])
        for name in set(of_t1) - {"batch_size"}:
            assert numbers.get(name) == (of_t1[name] or None), (network, name)


def test_nothing_is_printed_of_clips() -> None:
    tables = read_printed(FOLDER / "printed.yaml")
    assert {name for names in (p4.TABLES["v1"], p4.TABLES["v2"]) for name in names} <= set(tables)
    assert not [
        value
        for table in tables.values()
        for row in table.rows.values()
        for value in row
        if value is not None
    ]


def test_the_official_splits_are_what_is_trained_and_tested_on() -> None:
    settings = read_settings(FOLDER / "recipe.yaml")
    for name, (train, test, classes) in OFFICIAL.items():
        data = settings[f"data.{name}"]
        assert (data["images"], data["classes"]) == ({"train": train, "test": test}, classes)
        assert data["source"] is None
        assert [data[side] for side in ("train", "test")] == [
            f"start=start,split-column=split1,split={side}" for side in ("train", "test")
        ]


def _kept(text: str, tap: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What a cache keeps of a clip (embedding and map), and 10^9 multiply-adds, by the library's own network."""
    name, _, told = text.partition("[")
    size, plain = parse_size(told.removeprefix("size=").removesuffix("]")), name.rpartition(":")[2]
    with torch.device("meta"):
        clips = plain.startswith("torchvision/")
        model = (get_model(plain.removeprefix("torchvision/")) if clips else timm.create_model(plain)).eval()
        shown = torch.zeros(1, 3, *size) if clips else torch.zeros(size[0], 3, *size[1:])
        found: list[torch.Tensor] = []
        model.get_submodule(tap).register_forward_hook(lambda _module, _inputs, given: found.append(given))
        with FlopCounterMode(display=False) as count, torch.no_grad():
            model(shown)
        width = model.fc.in_features if clips else model.num_features
        given = found[0] if clips else found[0].movedim(0, 1)[None]
        return torch.zeros(1, width), given, count.get_total_flops() / 2e9


def test_every_network_has_the_maps_of_its_levels_and_the_arithmetic_that_is_counted() -> None:
    settings = read_settings(FOLDER / "recipe.yaml")
    for name, networks in settings["tuples"].items():
        kept = [
            _kept(settings["networks"][each]["model"], *settings["taps"][each]) for each in networks.values()
        ]
        assert [gmacs for _, _, gmacs in kept] == pytest.approx(
            [settings["gmacs"][each] for each in networks.values()], abs=0.02
        )
        for depth, levels in enumerate(settings["levels"][name]):
            shapes = [each[depth].shape for each in kept]
            sizes = [tuple(shape[2:]) or None for shape in shapes]
            meeting = (min(size[0] for size in sizes if size), 7, 7) if depth else None
            parents = tuple(
                Parent(str(n), shape[1], size)
                for n, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
            )
            options = {
                "space": settings["joint.space"],
                "map_channels": (settings["joint.map_channels"],) * depth,
            }
            with torch.device("meta"):
                joint = JointTeacher(FusionSpec(levels, parents, {"a": 101}, size=meeting, **options)).eval()
                inputs = [torch.zeros(shape) for shape in shapes]
            with FlopCounterMode(display=False) as count, torch.no_grad():
                maps = joint(inputs, "a").maps
            assert {tuple(each.shape[2:]) for each in maps.values()} == ({meeting} if depth else set())
            counted = settings["joint_gmacs"][name][levels]
            assert count.get_total_flops() / 2e9 == pytest.approx(counted, rel=0.01)


def test_maps_meet_where_there_are_maps() -> None:
    steps = _steps(read_settings(FOLDER / "recipe.yaml"))
    assert "--map-size" not in steps["v1/seed0/joint/L1"].words
    assert ("--map-size", "7") in set(
        zip(steps["v1/seed0/joint/L2"].words, steps["v1/seed0/joint/L2"].words[1:], strict=False)
    )
    (text,) = steps["v1/seed0/students/ucf101"].files.values()
    one, two = json.loads(text)["students"].values()
    assert (one.get("map_resize"), two["map_resize"], two["student_tap"]) == (None, "pool", ["layer4"])
    assert not [step for step in steps.values() if "--teacher-size" in step.words]
    kinds = [step.kind for step in steps.values()]
    assert kinds.count("cache") == 3 * 2 + 3 * 2 * 2  # V2's networks have two kinds of taps


def test_what_is_said_of_tuples_of_other_data_sets() -> None:
    """By hand: two tuples, of one data set and of two."""
    tuples = {"v1": ["a"], "v2": ["a", "b"]}
    rows = dict.fromkeys(p4.CLAIMED, 50.0) | {"student/L1": 52.0, "student/L2": 56.0, "joint/L2": 55.0}
    table = {(row, "a/acc1"): value for row, value in rows.items()}
    other = table | {(row, "b/acc1"): value - 1 for row, value in rows.items()}
    other["dataset-specific", "b/acc1"] = 46.0
    other["joint-head", "b/acc1"] = 39.0
    tables = {"P4-VIDEO-1": table, "P4-VIDEO-2": other}
    found = {row: value for (row, _), value in p4.claims(tables, tuples).items()}
    assert found == {
        "student/L1 - dataset-specific": (2 + 2 + 5) / 3,
        "student/L2 - dataset-specific": (6 + 6 + 9) / 3,
        "student/L2 - joint/L2": 1,
        "student - dataset-specific: least": 2,
        "student - dataset-specific: most": 9,
        "mean student - other baseline: least": 2,
        "mean student - other baseline: most": (6 + 16) / 2,
    }
    del other["joint-head", "b/acc1"]
    assert p4.claims(tables, tuples) == {}


def test_stand_ins_are_clips() -> None:
    places = places_of(read_settings(FOLDER / "recipe.yaml")).stand_ins()
    assert places["hmdb51"].part("test") == drawn("hmdb51", 3570, 1530, 51, 16) + "@split=test"
    data = open_data(drawn("a", 4, 2, 2, 5) + "@split=train")
    assert data.clips
    clip = data.picture(0, data.encoded(0), "exact")
    assert isinstance(clip, Clip)
    assert (clip.frames, clip.size) == (5, (48, 48))
    assert len({frame.tobytes() for frame in clip.at(range(5))}) == 5
    assert data.source.decode(data.keys[0], data.encoded(0)).size == (3 * 48, 48)
    assert not open_data(drawn("a", 4, 2, 2)).clips


@pytest.mark.parametrize(
    ("model", "channels", "frames"),
    [("torchvision/r3d_18[size=16x32x32]", 512, 2), ("frames:test_resnet[size=4x64x64]", 96, 4)],
)
def test_caches_of_clips_are_planned_with_networks_of_zeros(
    model: str, channels: int, frames: int, tmp_path: Path
) -> None:
    """Of a clip more: float16 of its embedding and its map of 2 x 2 places, its key and its view."""
    weights = _Weights(tmp_path)

    def planned(clips: int) -> int:
        words = (
            "cache-teachers", drawn("a", clips, 0, 2, 6), "--cache", str(tmp_path / "c.kd"), "--teacher", "t=x",
            "--keep", "features,maps:layer4", "--views", "eval",
        )  # fmt: skip
        return _planned(Step("s", words, stand_ins={"t": StandIn(model, 2)}), weights)

    row = (planned(128) - planned(64)) / 64
    assert 0 <= row - 2 * channels * (1 + 4 * frames) < 300


def test_the_tiny_form_has_the_steps_of_the_whole() -> None:
    tiny = _steps(read_settings(FOLDER / "recipe.yaml", tiny=True))
    whole = _steps(read_settings(FOLDER / "recipe.yaml"))
    extra = {f"v1/seed0/cache/{data}-{split}-1" for data in SETS for split in ("train", "test")}
    left = {f"v2/seed0/cache/{data}-{split}-1" for data in SETS for split in ("train", "test")}
    assert set(tiny) - set(whole) <= extra
    assert {name for name in whole if "diving48" not in name} - set(tiny) <= left


def test_every_command_of_the_full_size_is_one_that_kd_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["p4-video", "--out", str(tmp_path), "--dry-run", "--stand-ins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (3 + 2 + 2 + 3 + 1) + 6 + 12
    assert all(" kd " in line for line in lines)
    assert not list(tmp_path.rglob("*.json"))


def test_without_data_it_says_what_to_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["p4-video", "--out", str(tmp_path), "--dry-run"]) == 11
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: nobody said where these data sets are: ucf101, hmdb51, diving48"
    assert "--data hmdb51=SOURCE (csv/TABLE as python -m lab.video_splits hmdb51 writes it)" in hint


@pytest.mark.slow
def test_the_tiny_form_runs_whole_and_goes_on(tmp_path: Path) -> None:
    values = run_tiny("p4-video", tmp_path / "o")
    sets = tuple(read_settings(FOLDER / "recipe.yaml", tiny=True)["tuples"]["v1"])
    for (table, row, column), cell in values.items():  # everything but the set that the tiny form leaves out
        here = any(name in f"{row} {column}" for name in sets)
        assert (cell["measured"] is not None) == (here and table != "P4-VIDEO-T"), (table, row, column)
    runs = tmp_path / "o/runs/v2/seed0"
    student = json.loads((runs / "students/hmdb51/L2/result.json").read_text())
    assert values["P4-VIDEO-2", "student/L2", "hmdb51/acc1"]["measured"] == 100 * student["test"]["top1"]
    export = json.loads((runs / "students/hmdb51/L2/export/config.json").read_text())
    assert export["frames"] == 2
