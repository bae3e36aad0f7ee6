"""Every document that kd reads and every option that it takes, changed at random: only documented exit codes.

Small here; ``python benchmarks/soak.py --fuzz 2000`` runs the same attacks for longer.
"""

from collections.abc import Iterator

import pytest
from fuzzing import MEMORY, NAMES, RUN, SECONDS, TARGETS, Arena, Attack, digest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ATTACKS = st.builds(Attack, st.sampled_from(NAMES), st.integers(0, 2**10), st.integers(0, 2**31 - 1))


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with Arena(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


def hold(arena: Arena, attack: Attack) -> None:
    verdict = arena.run(attack)
    assert not verdict.problem, f"{verdict.problem}: {verdict.way}; kd {verdict.line}\n{verdict.err}"


@pytest.mark.parametrize("target", [*TARGETS, "options"])
def test_each_kind_of_document(arena: Arena, target: str) -> None:
    """Three known attacks on each, so that every run of the tests has been everywhere."""
    for seed in range(3):
        hold(arena, Attack(target, 7 * seed + len(target), seed))


WRONG = {
    "tar/wrong/cut.tar": (12, "is cut off", "Fetch or write it again"),
    "tar/wrong/upwards.tar": (12, "leads out of the archive", "tar -C FOLDER"),
    "tar/wrong/[ot]*.tar": (12, "is in one.tar and in two.tar", "repeats=allowed"),
    "parquet/rows@image=img": (2, "no column 'img'", "image"),
    "parquet/rows@label=labl": (2, "no column 'labl'", "Did you mean 'label'"),
    "parquet/rows@key=keey": (2, "no column 'keey'", "Did you mean 'key'"),
    "parquet/rows@split-column=prt": (2, "no column 'prt'", "Did you mean 'part'"),
}
"""Data that is wrong: exit code, what is wrong, what to do."""


@pytest.mark.parametrize("data", WRONG)
def test_sources_that_are_wrong(arena: Arena, data: str) -> None:
    code, *words = WRONG[data]
    before = digest(arena.origin, arena.origin / ".cache")
    arena._driver.place = arena.origin
    line = f"cache-teachers {data} --cache n.kd --teacher a=local-dir:gen/export {RUN}"
    answer = arena._driver.run(*line.split(), seconds=SECONDS, memory=MEMORY)
    said = " ".join(answer.err.split())
    assert answer.code == code, said
    assert all(word in said for word in words), said
    assert [each[:5] for each in answer.err.splitlines() if each.startswith(("error", "hint"))] == [
        "error",
        "hint:",
    ]
    assert digest(arena.origin, arena.origin / ".cache") == before


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(ATTACKS)
def test_only_documented_exit_codes(arena: Arena, attack: Attack) -> None:
    """No traceback, no exit 1, no hang, nothing raw on a terminal, and nothing outside the folder touched."""
    hold(arena, attack)
