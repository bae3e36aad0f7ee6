"""``kd cache-teachers --engine``: one cache filled by supervised workers, each running today's step."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from kdcli.cache.layout import SAMPLES, Manifest, Unit
from kdcli.cache.owned import require_outside_caches
from kdcli.engines.base import Outcome
from kdcli.engines.config import alone
from kdcli.engines.supervisor import Task, cpus, supervise
from kdcli.errors import CacheMissingError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.overseen import Look, Overseen, OverseenBucket, OverseenFolder
from kdcli.extract.places import open_bucket
from kdcli.extract.result import CacheResult, TeacherProgress
from kdcli.extract.teachers import name_teachers
from kdcli.options.resolving import command_line
from kdcli.runtime import Shard, parse_shard

Place = tuple[int, int]
"""Block and group of views."""


def cache_with_workers(config: CacheConfig) -> CacheResult:
    """Fill a cache by the workers of an engine.

    Raises:
        UsageError: an option is of one process alone, or the cache is in no folder and no bucket.
        KdError: see :func:`~kdcli.engines.supervisor.supervise`.
    """
    if not config.wait:
        raise UsageError(
            "--no-wait is of one process: workers of an engine wait for each other", "Leave one of them out."
        )
    cache: Overseen
    if isinstance(config.cache, Path):
        cache, beside = OverseenFolder(config.cache), str(config.cache)
    else:
        place = open_bucket(config.cache)
        cache, beside = OverseenBucket(place), place.name.rpartition("/")[2]
    logs = config.logs or Path(f"{beside}.logs")
    require_outside_caches(logs)
    task, began = CacheTask(config, cache), time.monotonic()
    before = task.look()
    outcomes = supervise(task, config, logs)
    return task.result(outcomes, before, time.monotonic() - began)


@final
class CacheTask(Task):
    """A cache that workers fill; how far it is, from the names of its commit records.

    Args:
        config: with an engine.
        cache: where it is.
    """

    title = "cache"

    def __init__(self, config: CacheConfig, cache: Overseen) -> None:
        self._root, self._cache, self.grace, self.pause = config.cache, cache, config.grace, cache.pause
        self._shard: Shard | None = parse_shard(config.shard)
        shard = None if self._shard is None else str(self._shard)
        workers = max(0, cpus(config) - 1) if config.workers is None else config.workers
        self._words = shlex.split(
            command_line(config.model_copy(update=alone(shard=shard, workers=workers)))
        )[1:]
        # What tokens are called is known to who opens the teacher; with all else of a task they come and go.
        kept = [output for output in config.outputs if output.kind != "maps" or output.tap]
        self._kept = {name: kept for name in name_teachers(config.teacher)}
        self._first: int | None = None
        self.unit = "images" if config.views in (None, "eval") else "views"

    def arguments(self, number: int) -> Sequence[str]:
        """See :class:`~kdcli.engines.supervisor.Task`: all are the same."""
        return self._words

    def progress(self) -> tuple[int, int] | None:
        """See :class:`~kdcli.engines.supervisor.Task`: images times views that were missing when it began."""
        look = self.look()
        if look is None:
            self._first = -1  # a new cache: all of it
            return None
        left = _images(look.manifest, set().union(*self._missing(look).values()))
        if self._first is None or self._first < 0:
            every = self._wanted(look.manifest, None)
            self._first = left if self._first is None else _images(look.manifest, every)
        return self._first - left, self._first

    def bury(self, *workers: str) -> None:
        """See :class:`~kdcli.engines.supervisor.Task`."""
        self._cache.bury(*workers)

    def look(self) -> Look | None:
        """The cache as it is now; None while there is none."""
        outputs = (f"{name}/{output.name}" for name, kept in self._kept.items() for output in kept)
        return self._cache.look([SAMPLES, *outputs])

    def _missing(self, look: Look) -> dict[str, set[Place]]:
        """Tasks that are not done, by teacher and for the samples."""

        def missing(part: str, views: int | None) -> set[Place]:
            wanted = self._wanted(look.manifest, views)
            return {place for place in wanted if not look.has(Unit(part, *place))}

        found = {SAMPLES: missing(SAMPLES, None)}
        for name, outputs in self._kept.items():
            found[name] = set()
            for output in outputs:
                found[name] |= missing(f"{name}/{output.name}", 1 if output.eval_only else None)
        return found

    def _wanted(self, manifest: Manifest, views: int | None) -> set[Place]:
        """All tasks of an output that keeps the first so many views."""
        blocks = [b for b in range(manifest.blocks) if self._shard is None or self._shard.owns(b)]
        return {
            (block, group) for block in blocks for group in range(manifest.groups_of(views or manifest.views))
        }

    def result(self, outcomes: Sequence[Outcome], before: Look | None, seconds: float) -> CacheResult:
        """What a worker says of the complete cache, with what all of them did since they began."""
        told: dict[str, Any] = outcomes[0].answer
        look = self.look()
        if look is None:
            raise CacheMissingError(f"{self._root} was removed meanwhile", "Run the same command again.")
        manifest, after = look.manifest, self._missing(look)
        earlier = self._missing(before or Look(manifest, dict.fromkeys(look.done, ())))
        new = {name: earlier[name] - after[name] for name in after}
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
