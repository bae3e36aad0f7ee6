"""``kd cache-teachers``: images in, cached teacher outputs out."""

from kdcli.caching.result import CacheResult, TeacherProgress
from kdcli.caching.step import cache_teachers

__all__ = ["CacheResult", "TeacherProgress", "cache_teachers"]
