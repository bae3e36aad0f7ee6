"""Every document that kd reads and every option that it takes, changed at random: only documented exit codes.

Small here; ``python benchmarks/soak.py --fuzz 2000`` runs the same attacks for longer.
"""

from collections.abc import Iterator

import pytest
from fuzzing import NAMES, TARGETS, Arena, Attack
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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(ATTACKS)
def test_only_documented_exit_codes(arena: Arena, attack: Attack) -> None:
    """No traceback, no exit 1, no hang, nothing raw on a terminal, and nothing outside the folder touched."""
    hold(arena, attack)
