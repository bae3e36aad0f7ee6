"""Every registered method: trained, stopped and gone on with, told, printed. A new one is covered as it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Shell
from pydantic import ValidationError
from training_place import STUDENT, Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import NotFoundError, StoppedEarly, UsageError
from kdcli.methods.base import Method, Setup, find_method
from kdcli.methods.fixmatch import FIXMATCH
from kdcli.methods.weighted import DISTILL_EQUAL, LabelsOnly
from kdcli.options.resolving import command_line, resolve, to_yaml
from kdcli.registry import METHODS
from kdcli.training.config import StudentConfig
from kdcli.training.engine import Engine
from kdcli.training.train import train_student
from kdcli.types import RankedSource, Ranking


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("methods"), maps=True)


def config_of(place: Place, method: Method, out: str) -> StudentConfig:
    """What the method's needs ask for, and nothing else: two steps."""
    needs = method.needs
    fields: dict[str, Any] = {"epochs": 1, "batch_size": 16, "student": place.specs["gen"]}
    sets = (f"one={place.data}@classes=class0+class1", f"two={place.data}@n=20")
    fields["data"] = sets if needs.sets else f"{place.data}@labelled=0.5" if needs.unlabelled else place.data
    fields["cache"] = (place.cache,) if needs.kinds else ()
    fields["teacher"] = ("gen",) if needs.kinds else ()
    if needs.generalist:
        fields["generalist"] = "gen"
        fields["teacher"] = ("gen", "exp")
    if "maps" in needs.kinds:  # of the student as of the teacher: its last has one cell
        fields |= {"student_tap": ("blocks.3",), "teacher_tap": ("blocks.3",)}
    small = {"levels": "features", "top_classes": 2, "crd_dim": 8, "unlabelled_ratio": 1.0}
    fields |= {name: value for name, value in small.items() if name in method.Options.model_fields}
    if needs.kinds and not needs.unlabelled:
        fields.pop("unlabelled_ratio", None)
    return place.config(out, method.name, **fields)


def ranking_of(place: Place, method: Method) -> Ranking | None:
    if not method.needs.ranking:
        return None
    cache = CacheSet.open([place.cache])
    source = RankedSource("gen", cache.teacher("gen").id, 0.5, 1.0)
    return Ranking(cache.cache_ids[0], "parc", "features", {"size": 24, "seed": 0}, (source,))


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_two_steps_is_stopped_and_goes_on_to_the_same_weights(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = find_method(name)
    whole, halved = (config_of(place, method, f"{name}-{part}") for part in ("whole", "halved"))
    ranking = ranking_of(place, method)
    result = train_student(whole, ranking=ranking)
    said = capsys.readouterr().err
    assert result.history[-1]["steps"] >= 2
    assert f"{name}: " in said
    step = Engine.step

    def one_only(engine: Engine, batch: Any, number: int) -> dict[str, float]:
        if number:
            raise StoppedEarly("stopped", "Go on.")
        return step(engine, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", one_only)
        with pytest.raises(StoppedEarly):
            train_student(halved, ranking=ranking)
    train_student(halved, ranking=ranking)
    for file in ("export/model.safetensors", "heads.safetensors"):
        assert (whole.out / file).read_bytes() == (halved.out / file).read_bytes(), file
    assert train_student(whole, ranking=ranking).history == result.history  # the same run, so nothing to do


@pytest.mark.parametrize("name", METHODS)
def test_its_options_are_flat_in_files_flags_and_records(place: Place, name: str, tmp_path: Path) -> None:
    method = find_method(name)
    config = config_of(place, method, f"{name}-printed")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert resolve(StudentConfig, {}, file=file) == config
    line = command_line(config)
    for option, value, field in config.items():
        if value != field.default and option != "data":
            assert f"--{option.replace('_', '-')}" in line
    assert set(method.Options.model_fields) <= set(config.model_dump(mode="json"))
    json.dumps(config.model_dump(mode="json"))


def test_options_of_other_methods_are_said_and_set_aside(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdcli.training.resolve import make_plan

    plan = make_plan(place.config("aside", DISTILL_EQUAL.name, threshold=0.5, mcl_every=3))
    assert "distill-equal does not use --threshold, --mcl-every" in capsys.readouterr().err
    assert not plan.config.aside


class Halved(LabelsOnly):
    """Half of the labels' loss."""

    def forward(self, student: Any, teacher: Any, batch: Any) -> Any:
        parts = super().forward(student, teacher, batch)
        return {**parts, "loss": parts["loss"] / 2}


class Stranger(Method):
    """A method of another package."""

    def build(self, setup: Setup) -> LabelsOnly:
        return Halved()


STRANGER = Stranger(
    name="stranger", paper="none", equation="none", summary="Half.", needs=FIXMATCH.needs.__class__(labels=True),
    defaults=FIXMATCH.defaults,
)  # fmt: skip
NO_METHOD = 3


def test_an_object_of_ones_own_is_a_method(place: Place) -> None:
    result = train_student(place.config("stranger", f"{__name__}:STRANGER", cache=(), epochs=1))
    assert result.method == "stranger"


def test_what_is_no_method_is_refused_in_one_line() -> None:
    def refusal(method: str) -> str:
        with pytest.raises((UsageError, NotFoundError)) as caught:
            resolve(StudentConfig, {"data": "d", "student": STUDENT, "out": "o", "method": method})
        return caught.value.message

    assert refusal(f"{__name__}:NO_METHOD").endswith("NO_METHOD is no method, but a int")
    assert "has no NOTHING" in refusal(f"{__name__}:NOTHING")
    assert "there is no module nowhere_at_all" in refusal("nowhere_at_all:X")
    assert "Did you mean 'fixmatch'?" in refusal("fixmach")


def test_the_command_line_takes_an_installed_method(kd: Callable[..., Shell], tmp_path: Path) -> None:
    """As a stranger's package on the path, registered by an entry point."""
    package = tmp_path / "site"
    (package / "half-1.0.dist-info").mkdir(parents=True)
    (package / "half-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: half\nVersion: 1.0\n"
    )
    (package / "half-1.0.dist-info" / "entry_points.txt").write_text("[kd.methods]\nhalf = half:HALF\n")
    (package / "half.py").write_text(
        "from kdcli.methods.base import Method, Needs\n"
        "from kdcli.methods.options import MethodOptions, method_option\n"
        "from kdcli.methods.weighted import LabelsOnly, OURS\n"
        "class Options(MethodOptions):\n"
        "    half_share: float = method_option(0.5, 'Share.', gt=0)\n"
        "class Half(Method):\n"
        "    def build(self, setup):\n"
        "        return LabelsOnly(setup.settings.label_smoothing)\n"
        "HALF = Half(name='half', paper='none', equation='Eq. 1', summary='Half.', Options=Options,\n"
        "            needs=Needs(labels=True), defaults=OURS)\n"
    )
    arguments = [
        "train-student",
        "d",
        "--student",
        STUDENT,
        "--method",
        "half",
        "--out",
        "o",
        "--print-config",
    ]
    paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    shell = kd(*arguments, "--set", "half_share=0.25", env={"PYTHONPATH": paths})
    assert shell.code == 0, shell.err
    assert "half_share: 0.25" in shell.out


# --- weights ------------------------------------------------------------------------------------

SILENT: dict[str, dict[str, Any]] = {
    **{name: {"kl_weight": 0.0} for name in ("xe-kl", "kl-ls", "mcl", "kd", "dp", "cd")},
    "dkd": {"dkd_alpha": 0.0, "dkd_beta": 0.0}, "dist": {"dist_beta": 0.0, "dist_gamma": 0.0},
    "sp": {"relation_weight": 0.0}, "pkt": {"relation_weight": 0.0},
    "rkd": {"distance_weight": 0.0, "angle_weight": 0.0},
    **{name: {"level_weight": (0.0,)} for name in ("at", "vid", "hint", "feature")},
    "srrl": {"feature_weight": 0.0, "logit_weight": 0.0}, "crd": {"crd_weight": 0.0},
    "mlfd": {"distill_weight": 0.0, "level_weight": (0.0, 0.0)}, "fixmatch": {"unlabelled_weight": 0.0},
    **{name: {"label_weight": 1.0} for name in ("distill-nearest", "distill-weighted", "distill-equal")},
}  # fmt: skip
"""Of each method the weights that leave it nothing to learn but labels."""


@pytest.mark.parametrize("name", SILENT)
def test_weights_that_leave_only_labels_are_refused(name: str) -> None:
    kind, silent = find_method(name).Options, SILENT[name]
    with pytest.raises(ValidationError, match="nothing but labels is left to learn from") as caught:
        kind(**silent)
    assert all(f"--{each.replace('_', '-')} " in str(caught.value) for each in silent)
    for spared in silent:
        if len(silent) > 1:
            kind(**{each: value for each, value in silent.items() if each != spared})


def test_no_other_method_has_weights_that_leave_only_labels() -> None:
    """Of nkd the right class always counts, of crd beside KD that one; others have no such weight."""
    marked = {name for name in METHODS if find_method(name).Options().taught()}
    assert marked == set(SILENT)
