"""`make quick` leaves out what was measured to be slow, and nothing that is not there."""

from pathlib import Path

from slow import LIST, slow_of


def test_the_quickest_stay_as_many_as_fit_and_cases_count_together() -> None:
    durations = """
    4.00s call     tests/test_a.py::test_long
    0.50s setup    tests/test_a.py::test_short
    0.25s call     tests/test_a.py::test_short
    2.00s call     tests/test_b.py::test_cases[one]
    2.50s call     tests/test_b.py::test_cases[two]
    """
    assert slow_of(durations, 5.0) == ["test_b.py::test_cases"]
    assert slow_of(durations, 1.0) == ["test_a.py::test_long", "test_b.py::test_cases"]


def test_every_name_in_the_list_is_a_test_or_a_file_of_tests() -> None:
    for name in LIST.read_text(encoding="utf-8").split():
        file, _, test = name.partition("::")
        text = Path(__file__).with_name(file).read_text(encoding="utf-8")
        assert f"def {test}" in text, name
