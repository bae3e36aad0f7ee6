"""``train_student``: one student, a sequence or a grid of them, or with ``sweep`` several.

Torch is imported when rankings have been read: one that is missing is told before.
"""

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kdcli.console import console
from kdcli.options.fields import as_typed
from kdcli.reading import DOCUMENT_BYTES, read_json
from kdcli.training.config import StudentConfig
from kdcli.training.sweep_file import Sweep, resolve_sweep
from kdcli.training.sweep_option import engine_of
from kdcli.types import Ranking

if TYPE_CHECKING:
    from kdcli.ranking.answer import RankAnswer
    from kdcli.training.result import TrainResult
    from kdcli.training.sweep import SweepResult

WORD_SECONDS: Final = 10.0
"""Standard input may be silent for so long before the user is told what is waited for."""


def train_student(
    config: StudentConfig, *, ranking: "Ranking | RankAnswer | str | Path | None" = None
) -> "TrainResult":
    """Train a student on labels and cached teachers, or go on with it, or give the result of the finished run.

    Args:
        config: what to train; a method's own options are options of it, see ``kd methods NAME``.
        ranking: what ``rank_sources`` gave, or a file of it.

    Raises:
        KdError: see :func:`kdcli.training.train.train_student`.
    """
    if isinstance(ranking, str | Path):
        config, ranking = config.model_copy(update={"ranking": str(ranking)}), None
    chosen = _read_ranking(config) if ranking is None else ranking
    from kdcli.ranking.answer import RankAnswer
    from kdcli.training.lr_grid import train_grid
    from kdcli.training.sequential import train_sequence
    from kdcli.training.train import train_student as lone_run

    step = train_sequence if config.sequential else train_grid if config.lr_grid else lone_run
    return step(config, ranking=chosen.ranking if isinstance(chosen, RankAnswer) else chosen)


def train_sweep(sweep: Sweep | str | Path, **options: Any) -> "SweepResult":
    """Train several students over one stream of images; those that diverged are in the result.

    Args:
        sweep: the file that ``kd train-student --sweep`` takes.
        options: of all students, ``out``, their common folder, and those of an engine.

    Raises:
        KdError: see :func:`kdcli.training.sweep.train_sweep`.
    """
    if not isinstance(sweep, Sweep):
        engine = engine_of(options)
        sweep = Sweep(*resolve_sweep(as_typed(StudentConfig, options), (), None, Path(sweep)), engine)
    students = sweep.students
    if sweep.engine is not None:
        from kdcli.training.sweep_workers import train_with_workers

        train_with_workers(sweep.out, students, sweep.engine)
        students = {name: one.model_copy(update={"overwrite": False}) for name, one in students.items()}
    rankings = _read_rankings(students)
    from kdcli.training.sweep import train_sweep as step

    return step(sweep.out, students, rankings)


def _read_rankings(configs: Mapping[str, StudentConfig]) -> dict[str, Ranking | None]:
    """The ranking of each student, read once however many name it: standard input can be read only once."""
    known: dict[str | None, Ranking | None] = {None: None}
    for config in configs.values():
        if config.ranking not in known:
            known[config.ranking] = _read_ranking(config)
    return {name: known[config.ranking] for name, config in configs.items()}


def _standard_input(most: int) -> bytes:
    """What comes on standard input until it ends, as Unix filters read; a long wait is told once."""
    if sys.stdin is None or sys.stdin.closed:
        return b""
    said = "waiting for a ranking on standard input: 'kd rank-sources ... --json | kd train-student ... --ranking -' "
    said += "gives one, --ranking FILE reads a file, ^D ends the input, ^C this run"
    word = threading.Timer(WORD_SECONDS, console.warn, [said])
    word.daemon = True
    word.start()
    try:
        return sys.stdin.buffer.read(most)
    finally:
        word.cancel()


def _read_ranking(config: StudentConfig) -> Ranking | None:
    """The ranking in a file or, for ``-``, on standard input."""
    source = config.ranking
    if source is None:
        return None
    from kdcli.ranking.documents import parse_ranking, ranking_of, require_ranking

    if source == "-":
        return parse_ranking(
            _standard_input(DOCUMENT_BYTES + 1)[:DOCUMENT_BYTES], "the ranking on standard input"
        )
    require_ranking(source, config.cache or ("CACHE",), config.first_data)
    return ranking_of(read_json(Path(source)), Path(source))
