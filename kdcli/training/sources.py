"""What runs read, opened once for all of them."""

import functools
from pathlib import Path
from typing import final

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.shelf import Stage
from kdcli.data.sources import open_data
from kdcli.training.config import StudentConfig
from kdcli.training.readable import unreadable
from kdcli.training.sets import OpenData


@final
class Sources:
    """Opens data sets and caches, each of them once: several students share what they read.

    Args:
        data: opens a data set instead, for a caller that trains on some of its images.
    """

    def __init__(self, data: OpenData | None = None) -> None:
        self.data: OpenData = data or functools.cache(open_data)
        self._open = functools.cache(CacheSet.open)
        self.unreadable = functools.cache(unreadable)

    def cache(self, paths: tuple[Path | str, ...], config: StudentConfig) -> CacheSet:
        """Caches as one, opened as a student's options say."""
        return self._open(paths, config.verify, Stage.told(config.stage, config.stage_limit))
