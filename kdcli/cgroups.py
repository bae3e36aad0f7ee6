"""How much processor time a container or a job step may take: less, often, than the processors that it sees."""

import math
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def processor_quota(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Processors that the quota of this process's control groups amounts to, rounded up; None without one.

    ``docker run --cpus 2`` on a machine of 64 processors leaves all 64 in the affinity mask, and stops whoever uses
    more than two.

    Args:
        root: where control groups are mounted.
        own: which ones are this process's.
    """
    shares = [*_of_version_2(root, _path(own, "")), *_of_version_1(root, _path(own, "cpu"))]
    return min((max(1, math.ceil(share)) for share in shares), default=None)


def _path(own: Path, controller: str) -> Path:
    """Path of this process's group, below the root; a container sees its own as the root."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return Path()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(path.lstrip("/"))
    return Path()


def _groups(mount: Path, path: Path) -> list[Path]:
    """A group and those that it is in."""
    return [mount / part for part in (path, *path.parents)]


def _of_version_2(root: Path, path: Path) -> list[float]:
    words = [_words(group / "cpu.max") for group in _groups(root, path)]
    return [int(own[0]) / int(own[1]) for own in words if len(own) == 2 and own[0].isdecimal()]


def _of_version_1(root: Path, path: Path) -> list[float]:
    found = []
    for group in _groups(root / "cpu", path):
        quota, period = (_words(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period and quota[0].isdecimal():  # -1: none
            found.append(int(quota[0]) / int(period[0]))
    return found


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:  # no such controller here
        return []
