"""Every verb that writes, killed or short of disk, and asked for again: it ends as if nothing had been.

Small here; ``python benchmarks/soak.py --verbs 300`` goes on for longer.
"""

import errno
import random
from collections.abc import Iterator

import pytest
from verb_schedules import VERBS, Counts, Site, site

QUICK = ("repair", "merge", "pack-over", "rm-teacher", "train-student", "fuse-teachers", "soup")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("schedules")) as made:
        yield made


def hold(here: Site, verb: str, seed: int) -> None:
    """One schedule of kills, and one of a disk that is full or read-only from some step on."""
    counts, draw = Counts(), random.Random(f"{verb} {seed}")
    here.killed(verb, draw, counts)
    step = draw.randrange(1, here.steps[verb] + 1)
    here.short_of_disk(verb, step, counts, draw.choice((errno.ENOSPC, errno.EROFS, errno.EACCES)))
    assert counts == Counts(kills=counts.kills)


@pytest.mark.parametrize("verb", QUICK)
def test_killed_or_short_of_disk(here: Site, verb: str) -> None:
    hold(here, verb, 0)


@pytest.mark.parametrize("verb", VERBS)
def test_all_verbs_killed_or_short_of_disk(here: Site, verb: str) -> None:
    hold(here, verb, 1)


def test_what_a_schedule_would_find(here: Site) -> None:
    """A verb that forgets a file, or leaves one, is found out."""
    here.whole("gc")
    here.restore()
    (here.place / "gen" / "result.json").unlink()
    (here.place / ".x.json.tmp").touch()
    (here.place.parent / "escaped").touch()
    counts = Counts()
    here.compare("gc", counts)
    (here.place.parent / "escaped").unlink()
    assert counts.bytes_lost
    assert (counts.litter, counts.files_outside) == (2, 1), "and what gc would have removed"
