"""``kd train-student --sweep FILE --engine``: the students of a sweep, spread over supervised workers.

Each worker trains its students as a sweep of its own, from a file that is written for it beside its log; what is done
is told by the results in the folders of the students.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, final

from kdcli.engines.config import EngineOptions
from kdcli.engines.supervisor import Task, cpus, supervise
from kdcli.errors import UsageError
from kdcli.files import write_json
from kdcli.options.resolving import to_yaml
from kdcli.reading_yaml import parse_yaml
from kdcli.training.config import StudentConfig


def train_with_workers(out: Path, configs: Mapping[str, StudentConfig], engine: EngineOptions) -> None:
    """Train the students that are not finished; those that diverge end alone.

    Args:
        out: the folder of the sweep.
        configs: of the students, by name.
        engine: who trains them.

    Raises:
        UsageError: a ranking is to come from standard input.
        KdError: see :func:`~kdcli.engines.supervisor.supervise`.
    """
    if any(config.ranking == "-" for config in configs.values()):
        raise UsageError("--ranking - is read by one process: workers have no standard input", "Give a file.")
    parts = shared_out(list(configs), engine.num_workers)
    logs = engine.logs or out / "logs"
    task = _SweepTask(out, configs, parts, logs, engine)
    supervise(task, engine.model_copy(update={"num_workers": len(parts)}), logs)


def shared_out(names: Sequence[str], workers: int) -> list[list[str]]:
    """Which students each worker trains: neighbours stay together, and share the decoding of their images.

    Args:
        names: in the order of the sweep.
        workers: how many there may be.

    Returns:
        As many lists, or fewer where there are fewer students; none is empty, and lengths differ by one at most.
    """
    parts = min(workers, len(names))
    cuts = [len(names) * part // parts for part in range(parts + 1)]
    return [list(names[start:stop]) for start, stop in pairwise(cuts)]


@final
class _SweepTask(Task):
    """A sweep that workers train; a student is done when its result is there, or when it diverged."""

    title, unit = "sweep", "students"
    ends = frozenset((0, 40))

    def __init__(
        self,
        out: Path,
        configs: Mapping[str, StudentConfig],
        parts: Sequence[Sequence[str]],
        logs: Path,
        engine: EngineOptions,
    ) -> None:
        self._out, self._configs = out, configs
        self._files = [logs.absolute() / f"part-{number}.yaml" for number in range(len(parts))]
        workers = max(0, cpus(engine) - 1)
        for file, names in zip(self._files, parts, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"students": {name: _options(configs[name], workers) for name in names}})

    def arguments(self, number: int) -> Sequence[str]:
        """See :class:`~kdcli.engines.supervisor.Task`."""
        return ["train-student", "--sweep", str(self._files[number]), "--out", str(self._out)]

    def progress(self) -> tuple[int, int]:
        """See :class:`~kdcli.engines.supervisor.Task`."""
        return sum((each.out / "result.json").is_file() for each in self._configs.values()), len(
            self._configs
        )

    def bury(self, *workers: str) -> None:
        """See :class:`~kdcli.engines.supervisor.Task`: a run's folder is free when its process is gone."""


def _options(config: StudentConfig, workers: int) -> dict[str, Any]:
    """What a sweep file says of a student: all that differs from the defaults."""
    given = config.workers is not None
    document = parse_yaml(
        to_yaml(config if given else config.model_copy(update={"workers": workers}), every=False), ""
    )
    return {name: value for name, value in document.items() if name != "out"}
