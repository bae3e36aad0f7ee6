"""Rankings, run.json and result.json, changed at random: each reader returns what its type promises, or refuses.

test_fuzz.py does so through whole commands; here it is the readers themselves, thousands of times.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_mutations import json_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_place import make_place

from kdcli.comparing.runs import find_runs
from kdcli.errors import KdError
from kdcli.ranking.documents import parse_ranking, ranking_document, table_of
from kdcli.ranking.students import read_students
from kdcli.reading import parse_json
from kdcli.reporting.inputs import read_inputs
from kdcli.training.result import TrainResult
from kdcli.training.rundir import finished_result, identity_of, read_pins, require_same_identity
from kdcli.training.train import train_student
from kdcli.types import RankedSource, Ranking

RANKING = Ranking(
    "c" * 32, "parc", "features", {"size": 4, "seed": 0, "images": "DeH0pq7k"},
    (RankedSource("a", "1" * 64, 0.5, 0.75), RankedSource("b", "2" * 64, 0.25, 0.25)),
    {"scheme": "weighted", "power": 2.0},
)  # fmt: skip
REFUSED = {10, 11, 12, 22, 24}
SEEDS = st.integers(0, 2**32 - 1)
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a test and a history."""
    place = make_place(tmp_path_factory.mktemp("mutated"))
    config = place.config("run", "distill-equal", epochs=1, test=place.test)
    train_student(config)
    return config.out


def attempt(read: Callable[[], Any], name: str) -> Any:
    """What a reader gives; None where it refuses, in words that name the file."""
    try:
        return read()
    except KdError as refusal:
        error = refusal
    assert error.exit_code in REFUSED, error.message
    assert name in error.message, error.message
    assert error.hint
    return None


@MANY
@given(SEEDS)
def test_rankings(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    victim = tmp_path_factory.getbasetemp()
    text = json_text(json.dumps(ranking_document(RANKING)), random.Random(seed), victim)
    found = attempt(lambda: parse_ranking(text, "r.json"), "r.json")
    if found is not None:
        weights = [source.weight for source in found.sources]
        assert all(type(weight) is float and math.isfinite(weight) and weight >= 0 for weight in weights)
        assert math.fsum(weights) == pytest.approx(1)
        assert all(type(source.name) is str and source.name for source in found.sources)
        assert parse_ranking(json.dumps(ranking_document(found)), "again") == found
        attempt(lambda: table_of(parse_json(text, "r.json"), "r.json"), "r.json")


def changed(run: Path, name: str, seed: int) -> Path:
    folder = run.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    text = json_text((run / name).read_text(), random.Random(seed), run.parent)
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    return folder


@MANY
@given(SEEDS)
def test_records_of_runs(run: Path, seed: int) -> None:
    folder = changed(run, "run.json", seed)
    found = attempt(lambda: read_pins(folder), "run.json")
    if found is not None:
        assert found.train_views is None or type(found.train_views) is int
        assert isinstance(identity_of(folder), dict)
        attempt(lambda: require_same_identity(folder, identity_of(run)), str(folder))
    attempt(lambda: read_inputs([folder]), str(folder))


@MANY
@given(SEEDS)
def test_results_of_runs(run: Path, seed: int) -> None:
    folder = changed(run, "result.json", seed)
    stored = attempt(lambda: finished_result(folder), "result.json")
    if stored is not None:
        again = attempt(lambda: TrainResult.from_document(stored), "result.json")
        if again is not None:
            assert type(again.epochs) is int
            assert again.test is None or all(type(value) is float for value in again.test.values())
    attempt(lambda: read_inputs([folder]), str(folder))
    attempt(lambda: find_runs(folder), str(folder))
    attempt(lambda: read_students([str(folder)]), "result")
