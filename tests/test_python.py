"""The commands as functions: keywords, coercions, refusals, and what their results show."""

import contextlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from conftest import Shell
from hypothesis import given
from hypothesis import strategies as st
from training_place import STUDENT, Place, make_place

import kdcli
from kdcli.cli.app import app
from kdcli.errors import ConfigError, KdError, MissingExtraError, UsageError
from kdcli.results import Result, Table, flat
from kdcli.verbs.verb import Verb

mpl.use("Agg")
VERBS = {name: value for name, value in vars(kdcli).items() if isinstance(value, Verb)}
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("python"))


# --- the functions ----------------------------------------------------------------------------------


def test_every_command_is_a_function_with_its_options() -> None:
    def names(group: Any, before: str = "") -> list[str]:
        found = []
        for name, command in group.commands.items():
            inner = "commands" in vars(command)
            found += names(command, f"{name} ") if inner else [f"{before}{name}"]
        return found

    functions = {"data check": "check_data", "demo": "run_demo"}
    beside = {"methods", "doctor"}  # they look at kd itself
    for name in set(names(app)) - beside:
        function = functions.get(name, name.replace(" ", "_").replace("-", "_"))
        verb = VERBS[function]
        options = set(inspect.signature(verb).parameters) - {"given"}
        assert options >= set(verb._kind().model_fields) - {"options", "aside"}
        assert verb._kind().command == name
        assert all(f"    {option}: " in str(verb.__doc__) for option in verb._kind().every_option())


def test_nothing_heavy_is_imported_before_a_command_is_called() -> None:
    code = (
        "import sys, kdcli; kdcli.cache_teachers; repr(kdcli.rank_sources); dir(kdcli); print(*sys.modules)"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "pydantic", "pandas", "matplotlib", "timm"} & set(modules)


def test_a_misspelt_command_is_told_the_right_one() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'rank_sources'"):
        kdcli.rank_source  # noqa: B018


def test_keywords_are_the_configuration(place: Place, kd: Callable[..., Shell]) -> None:
    by_config = kdcli.rank_sources(kdcli.RankConfig(cache=(place.cache,), probe_size=24, metric="all"))
    by_keywords = kdcli.rank_sources(cache=str(place.cache), probe_size=np.int64(24), metric="all")
    assert by_keywords.document() == by_config.document()
    shell = kd("rank-sources", "--cache", place.cache, "--probe-size", 24, "--metric", "all", "--json").json
    assert json.loads(json.dumps(by_keywords.document())) == shell


def test_what_has_no_name_on_the_command_line_needs_none_here(place: Place) -> None:
    assert kdcli.cache_info(place.cache).document() == kdcli.cache_info(cache=place.cache).document()
    assert kdcli.cache_diff(place.cache, str(place.cache)).equal
    with pytest.raises(UsageError, match="cache_diff takes a, b, and 3 values"):
        kdcli.cache_diff(place.cache, place.cache, place.cache)
    with pytest.raises(UsageError, match="cache is given twice"):
        kdcli.cache_info(place.cache, cache=place.cache)
    with pytest.raises(UsageError, match="a RankConfig is given, and metric beside it"):
        kdcli.rank_sources(kdcli.RankConfig(cache="x"), metric="cka")


# --- what is typed ----------------------------------------------------------------------------------


@given(st.sampled_from([str, Path, lambda text: [text], lambda text: (Path(text),)]))
def test_paths_texts_and_lone_values(spelled: Callable[[str], Any]) -> None:
    assert kdcli.RankConfig(cache=spelled("a.kd")).cache == (Path("a.kd"),)


def test_lone_values_mappings_and_commas() -> None:
    config = kdcli.CacheConfig(
        data=Path("photos"), cache="c.kd", teacher={"gen": "resnet18", "own": Path("x") / "y"},
        keep="logits, topk:3", temperatures=2, batch_size=np.int32(3),
    )  # fmt: skip
    assert config.data == "photos"
    assert config.teacher == ("gen=resnet18", "own=x/y")
    assert config.keep == ("logits", "topk:3")
    assert config.temperatures == (2.0,)
    assert config.batch_size == 3
    assert kdcli.CacheConfig(cache="c", teacher="t").teacher == ("t",)
    several = kdcli.StudentConfig(data={"a": "x", "b": "y"}, student="s", method="multi-task", out="o")
    assert several.data == ("a=x", "b=y")
    assert kdcli.StudentConfig(data="x", student="s", method="distill-equal", out="o", cache="c").cache == (
        Path("c"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cahce": "x"}, "cahce: unknown key. Did you mean 'cache'?"),
        ({"cache": "x", "metric": "ckaa"}, "metric ckaa: must be one of .* Did you mean 'cka'?"),
        ({"cache": "x", "probe_size": "100"}, "probe_size: '100' is a text: write the number without quotes"),
        ({"cache": "x", "allow_partial": 1}, "allow_partial: 1 is no switch: write true or false"),
        ({"cache": "x", "seed": -1, "repeats": 0}, "(seed -1.*; repeats 0|repeats 0.*; seed -1)"),
        ({"cache": None}, "cache None: input should be a valid tuple"),
        ({"cache": 3}, "cache 3: "),
    ],
)
def test_what_is_wrong_is_one_line(options: dict[str, Any], message: str) -> None:
    for call in (kdcli.rank_sources, kdcli.RankConfig):
        with pytest.raises(ConfigError, match=message) as refused:
            call(**options)
        assert "--" not in refused.value.message
        out_of_range = "seed" in options
        told = (
            "repeats is a number of at least 1"
            if out_of_range
            else "kd rank-sources --help explains every option."
        )
        assert told in refused.value.hint
        assert "--" not in refused.value.hint.replace("--help", "")
        assert refused.value.__cause__ is None


def test_what_is_missing_is_named_as_a_keyword() -> None:
    with pytest.raises(ConfigError, match=r"^cache is missing; teacher is missing$"):
        kdcli.cache_teachers("photos")
    with pytest.raises(ConfigError, match=r"studnet: unknown key.* Did you mean 'student'"):
        kdcli.train_student("x", studnet="s", method="labels-only", out="o")


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.none() | st.integers() | st.text(max_size=5), max_size=3
    )
)
def test_whatever_is_given_is_refused_as_an_error_of_kd(options: dict[str, Any]) -> None:
    with contextlib.suppress(KdError):
        kdcli.RankConfig(**options)


# --- results ----------------------------------------------------------------------------------------


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def shown(result: Result) -> _Cells:
    found = _Cells()
    found.feed(result._repr_html_())
    return found


def test_names_are_text_in_a_notebook(tmp_path: Path) -> None:
    from conftest import make_folder

    folder = make_folder(tmp_path / "i", per_class=3)
    try:
        (folder / "class0").rename(folder / SCRIPT.replace("/", "_"))
    except OSError:
        pytest.skip("this file system takes no such name")
    (folder / SCRIPT.replace("/", "_") / "000.png").write_bytes(b"bad")
    found = kdcli.check_data(folder)
    cells = shown(found)
    assert cells.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert any(SCRIPT.replace("/", "_") in text for text in cells.text)

    class Named(Result):
        def document(self) -> dict[str, Any]:
            return {SCRIPT: SCRIPT}

        def tables(self) -> list[Table]:
            return [Table((SCRIPT,), [("\x1b[31m&",)], SCRIPT), *super().tables()]

    cells = shown(Named())
    assert "script" not in cells.tags
    assert cells.text == [SCRIPT, SCRIPT, "\\x1b[31m&", "field", "is", SCRIPT, SCRIPT]


def test_a_frame_has_the_numbers_of_the_document(place: Place, tmp_path: Path) -> None:
    ranking = kdcli.rank_sources(cache=place.cache, probe_size=24)
    frame, document = ranking.to_pandas(), ranking.document()
    assert frame.to_dict("records") == list(document["sources"])
    trained = kdcli.train_student(
        place.data, cache=place.cache, student=STUDENT, method="distill-weighted", ranking=ranking,
        out=tmp_path / "run", image_size=32, epochs=2, batch_size=8, workers=0, test=place.test,
        teacher_view="same",
    )  # fmt: skip
    kept = json.loads((tmp_path / "run/result.json").read_text())
    assert trained.to_pandas()["loss"].tolist() == [epoch["loss"] for epoch in kept["history"]]
    assert kept["weights"] == {source["name"]: source["weight"] for source in document["sources"]}
    (tmp_path / "ranking.json").write_text(json.dumps(document))
    again = kdcli.train_student(
        place.data, cache=place.cache, student=STUDENT, method="distill-weighted", ranking=tmp_path / "ranking.json",
        out=tmp_path / "again", image_size=32, epochs=2, batch_size=8, workers=0, test=place.test,
        teacher_view="same",
    )  # fmt: skip
    assert again.details["weights"] == trained.details["weights"]
    assert again.test == trained.test
    probed = kdcli.eval_probe(
        place.data, test=place.test, model={"student": f"local-dir:{tmp_path}/run/export"}, shots=3, draws=2,
        workers=0,
    )  # fmt: skip
    assert probed.to_pandas()["accuracy.mean"].tolist() == [probed.document()["accuracy"]["mean"]]
    assert probed.accuracy.mean == np.mean(probed.results[0].values)
    info = kdcli.cache_info(place.cache)
    sizes = {f"{name}/{kind}": one["bytes"] for name, record in info.document()["teachers"].items()
             for kind, one in record["kinds"].items()}  # fmt: skip
    assert (
        dict(zip(info.to_pandas()["part"], info.to_pandas()["bytes"], strict=True)).items() >= sizes.items()
    )
    for result in (ranking, trained, probed, info):
        assert "table" in shown(result).tags
        figure = result.plot()
        assert figure.axes
    bars = probed.plot().axes[0].patches
    assert [bar.get_width() for bar in bars] == [probed.document()["accuracy"]["mean"]]
    (loss,) = trained.plot().axes[0].lines
    assert loss.get_ydata().tolist() == [epoch["loss"] for epoch in kept["history"]]


def test_a_table_is_what_the_command_prints(place: Place, kd: Callable[..., Shell]) -> None:
    printed = kd("rank-sources", "--cache", place.cache, "--probe-size", 24).out.split()
    (table,) = kdcli.rank_sources(cache=place.cache, probe_size=24).tables()
    assert printed == [str(cell) for row in (table.header, *table.rows) for cell in row]


def test_what_cannot_be_drawn_or_framed_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    same = kdcli.cache_diff(place.cache, place.cache)
    with pytest.raises(UsageError, match="CacheDiff has nothing to draw"):
        same.plot()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="pandas") as refused:
        same.to_pandas()
    assert refused.value.hint == "pip install 'kdcli[notebook]'"
    assert refused.value.exit_code == 13


def test_fields_within_fields_have_names_of_both() -> None:
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}


def test_caches_are_looked_after(place: Place, tmp_path: Path) -> None:
    packed = kdcli.cache_pack(place.cache, to=tmp_path / "c.zarr.zip")
    assert packed.complete
    copy = kdcli.cache_unpack(packed.path, to=tmp_path / "copy.kd").path
    assert kdcli.cache_diff(place.cache, copy).equal
    assert kdcli.cache_verify(copy).document()["ok"]
    chunk = next((copy / "data.zarr/teachers/gen/logits").glob("c.*"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"!")
    found = kdcli.cache_verify(copy)
    assert not found.document()["ok"]
    assert str(found.to_pandas()["file"][0]).endswith(chunk.name)
    assert kdcli.cache_repair(copy, workers=0).document()["ok"]
    assert kdcli.cache_verify(copy).document()["ok"]
    with pytest.raises(UsageError, match="nobody confirms") as refused:
        kdcli.cache_rm(copy)
    assert refused.value.hint == "Add yes=True to remove it."
    assert copy.exists()
    kdcli.cache_rm(copy, yes=True)
    assert not copy.exists()
    assert [Path(one["path"]).name for one in kdcli.cache_ls(place.root).document()["caches"]] == ["c.kd"]


def test_a_sweep_is_a_function_too(place: Place, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("students: {plain: {seed: 1}, other: {seed: 2}}\n")
    swept = kdcli.train_sweep(
        tmp_path / "s.yaml", data=place.data, student=STUDENT, method="labels-only", out=tmp_path / "runs",
        image_size=32, epochs=1, batch_size=8, workers=0, test=place.test,
    )  # fmt: skip
    assert set(swept.students) == {"plain", "other"}
    frame = swept.to_pandas().set_index("name")
    for name in ("plain", "other"):
        kept = json.loads((tmp_path / f"runs/{name}/result.json").read_text())
        assert frame.loc[name, "test.top1"] == kept["test"]["top1"]
    with pytest.raises(UsageError, match="Did you mean 'epochs'"):
        kdcli.train_sweep(tmp_path / "s.yaml", data=place.data, student=STUDENT, method="labels-only",
                          out=tmp_path / "x", epohcs=1)  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_names_what_there_is() -> None:
    page = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        compile(block, "docs/python.md", "exec")
    assert all(hasattr(kdcli, name) for name in re.findall(r"kdcli\.([a-zA-Z]\w*)", page))
    listed = page.partition("| command | function |")[2].partition("\n\n")[0]
    named = {
        name for row in listed.splitlines() for name in re.findall(r"`([a-z_]+)", row.rpartition(" | ")[2])
    }
    assert named <= {*VERBS, "train_sweep"}
    assert named >= {name for name in VERBS if not name.startswith("cache_")}


def test_the_curves_of_a_run_that_is_judged() -> None:
    from kdcli.training.result import TrainResult

    history = tuple({"epoch": n, "loss": 1 / n, "val_top1": n / 4, "val_top5": 1.0} for n in (1, 2, 3))
    loss, judged = TrainResult("m", "o", 3, None, history, None, 1.0).plot().axes
    assert [line.get_ydata().tolist() for line in judged.lines] == [[0.25, 0.5, 0.75]]
    assert len(loss.lines) == 1
