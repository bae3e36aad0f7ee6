"""``kd cache-teachers``: images in, cached teacher outputs out."""

from kdcli.extract.extract import cache_teachers
from kdcli.extract.result import CacheResult, TeacherProgress

__all__ = ["CacheResult", "TeacherProgress", "cache_teachers"]
