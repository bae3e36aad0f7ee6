"""``kd cache-teachers``: images in, cached teacher outputs out."""

from kdcli.caching.step import CacheResult, TeacherProgress, cache_teachers

__all__ = ["CacheResult", "TeacherProgress", "cache_teachers"]
