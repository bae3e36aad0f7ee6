"""``kd cache-teachers --engine``: one cache filled by supervised workers, each running today's step."""

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from kdcli.cache.claims import Claims
from kdcli.cache.commits import read_commits
from kdcli.cache.layout import SAMPLES, Layout, Manifest, load_manifest
from kdcli.cache.owned import require_outside_caches
from kdcli.engines.base import Outcome
from kdcli.engines.config import alone
from kdcli.engines.supervisor import Task, cpus, supervise
from kdcli.errors import UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.result import CacheResult, TeacherProgress
from kdcli.extract.teachers import name_teachers
from kdcli.options.resolving import command_line
from kdcli.runtime import Shard, parse_shard

Place = tuple[int, int]
"""Block and group of views."""


def cache_with_workers(config: CacheConfig) -> CacheResult:
    """Fill a cache by the workers of an engine.

    Raises:
        UsageError: an option is of one process alone.
        KdError: see :func:`~kdcli.engines.supervisor.supervise`.
    """
    if not config.wait:
        raise UsageError(
            "--no-wait is of one process: workers of an engine wait for each other", "Leave one of them out."
        )
    if not isinstance(config.cache, Path):
        raise UsageError(
            f"--engine fills a cache in a folder, and {config.cache} is a bucket",
            "Start the workers by a scheduler of yours: N times the same command without --engine.",
        )
    logs = config.logs or Path(f"{config.cache}.logs")
    require_outside_caches(logs)
    task, began = CacheTask(config), time.monotonic()
    before = task.missing() or {}
    outcomes = supervise(task, config, logs)
    return task.result(outcomes, before, time.monotonic() - began)


@final
class CacheTask(Task):
    """A cache that workers fill; how far it is, from the names of its commit records.

    Args:
        config: with an engine.
    """

    title = "cache"

    def __init__(self, config: CacheConfig) -> None:
        self.grace, self._layout = config.grace, Layout(Path(config.cache))
        self._shard: Shard | None = parse_shard(config.shard)
        shard = None if self._shard is None else str(self._shard)
        workers = max(0, cpus(config) - 1) if config.workers is None else config.workers
        self._words = shlex.split(
            command_line(config.model_copy(update=alone(shard=shard, workers=workers)))
        )[1:]
        self._kept = {name: config.outputs for name in name_teachers(config.teacher)}
        self._claims = Claims(self._layout)
        self._joined: dict[str, tuple[int, frozenset[Place]]] = {}
        self._first: int | None = None
        self.unit = "images" if config.views in (None, "eval") else "views"

    def arguments(self, number: int) -> Sequence[str]:
        """See :class:`~kdcli.engines.supervisor.Task`: all are the same."""
        return self._words

    def progress(self) -> tuple[int, int] | None:
        """See :class:`~kdcli.engines.supervisor.Task`: images times views that were missing when it began."""
        missing = self.missing()
        if missing is None:
            self._first = -1  # a new cache: all of it
            return None
        manifest = load_manifest(self._layout.root)
        left = _images(manifest, {place for places in missing.values() for place in places})
        if self._first is None or self._first < 0:
            self._first = left if self._first is None else _images(manifest, self._wanted(manifest, None))
        return self._first - left, self._first

    def bury(self, worker: str) -> None:
        """See :class:`~kdcli.engines.supervisor.Task`."""
        if self._layout.claims.is_dir():
            self._claims.bury(worker)

    def missing(self) -> dict[str, set[Place]] | None:
        """Tasks that are not done, by teacher and for the samples; None while there is no cache."""
        if not self._layout.manifest.is_file():
            return None
        manifest = load_manifest(self._layout.root)
        found = {SAMPLES: self._wanted(manifest, None) - self._done(SAMPLES)}
        for name, outputs in self._kept.items():
            found[name] = set()
            for output in outputs:
                views = 1 if output.eval_only else None
                found[name] |= self._wanted(manifest, views) - self._done(f"{name}/{output.name}")
        return found

    def _wanted(self, manifest: Manifest, views: int | None) -> set[Place]:
        """All tasks of an output that keeps the first so many views."""
        blocks = [b for b in range(manifest.blocks) if self._shard is None or self._shard.owns(b)]
        return {
            (block, group) for block in blocks for group in range(manifest.groups_of(views or manifest.views))
        }

    def _done(self, part: str) -> set[Place]:
        folder, joined = self._layout.commits / part, self._layout.compacted(part)
        single = [path.stem.split("-") for path in folder.glob("[0-9]*.json")] if folder.is_dir() else []
        found = {(int(block), int(group)) for block, group in single}
        if joined.is_file():  # read after what vanishes into it was listed
            stamp = joined.stat().st_mtime_ns
            if self._joined.get(part, (0, None))[0] != stamp:
                self._joined[part] = stamp, frozenset(read_commits(self._layout, part))
            found |= self._joined[part][1]
        return found

    def result(
        self, outcomes: Sequence[Outcome], before: Mapping[str, set[Place]], seconds: float
    ) -> CacheResult:
        """What a worker says of the complete cache, with what all of them did since they began."""
        told: dict[str, Any] = outcomes[0].answer
        manifest, after = load_manifest(self._layout.root), self.missing() or {}
        every = self._wanted(manifest, None)
        new = {name: before.get(name, every) - after[name] for name in after}
        teachers = {
            name: TeacherProgress(
                one["id"], one["arrays"], one["tasks"]["total"], one["tasks"]["done"], len(new[name])
            )
            for name, one in told["teachers"].items()
        }
        images = _images(manifest, {place for places in new.values() for place in places})
        rate = round(images / seconds, 2) if images else None
        return CacheResult(told["cache_id"], told["rows"], told["views"], teachers, rate, told["bytes"])


def _images(manifest: Manifest, places: set[Place]) -> int:
    """Images times views of some tasks."""
    return sum(len(manifest.rows_of(block)) * len(manifest.views_of(group)) for block, group in places)
