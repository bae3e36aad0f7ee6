"""What several caches hold together: teachers, class names and labels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from kdcli.cache.matching import class_numbers
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader


def joint_teachers(members: Sequence[CacheReader]) -> dict[str, TeacherRecord]:
    """Every teacher of any member; of one that several hold, the kinds that all of them keep."""
    found: dict[str, TeacherRecord] = {}
    for member in members:
        for name, record in member.teachers.items():
            known = found.get(name)
            if known is not None:
                both = {
                    kind: output
                    for kind, output in known.beside(record).outputs.items()
                    if kind in record.outputs
                }
                record = known.model_copy(update={"outputs": both})
            found[name] = record
    return found


def joint_names(members: Sequence[CacheReader]) -> tuple[str, ...] | None:
    """All class names, each once; None without labels."""
    names: dict[str, None] = {}
    for member in members:
        names.update(dict.fromkeys(member.manifest.data.class_names or ()))
    return tuple(names) or None


def joint_labels(member: CacheReader, names: tuple[str, ...] | None) -> Int64[np.ndarray, " n"]:
    """The labels of one cache as numbers of the joint class names; -1 without."""
    own = member.manifest.data.class_names
    if own is None or names is None:
        return np.full(member.manifest.rows, -1, np.int64)
    if own == names:
        return member.labels
    mapped: Int64[np.ndarray, " n"] = class_numbers(own, names)[member.labels]
    return mapped
