"""MODEL words become models by name, and links: which of them was distilled from which."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.comparing.config import CompareConfig
from kdcli.comparing.runs import CONFIG, EXPORT, RESULT, Run, find_runs, name_of
from kdcli.console import console
from kdcli.errors import NotFoundError, UsageError, nearest
from kdcli.models.grammar import ModelSpec

_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/-]*)=(.+)", re.DOTALL)
_AFTER = re.compile(r"([^,=]+),([^,=]+),([^,=]+)=(.+)", re.DOTALL)
_OWN = ("local-dir", "file")
"""Kinds of models that are added to a comparison because a run started from one: a library's may have other classes."""
SEVERAL = "+"
"""Between the names of teachers that taught one student together."""


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to compare: a cached teacher, or one that is run over the images.

    Attributes:
        name: what the comparison calls it.
        spec: canonical model string; of a cached teacher where it was found.
        record: what the cache knows of it; None for a model that is run.
    """

    name: str
    spec: str
    record: TeacherRecord | None = None


@final
@dataclass(frozen=True, slots=True)
class Link:
    """A student after it was distilled.

    Attributes:
        method: that distilled it; ``labels-only`` is continued training without a teacher.
        teachers: names; none where it had no teacher.
        student: name of what it was before.
        after: name of what it is now.
    """

    method: str
    teachers: tuple[str, ...]
    student: str
    after: str


@final
@dataclass(slots=True)
class Field:
    """All that is compared.

    Attributes:
        candidates: every model, by name, in the order in which they were named.
        links: which of them were distilled from which.
    """

    candidates: dict[str, Candidate] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)

    @property
    def bases(self) -> tuple[str, ...]:
        """Models that are not what another one became."""
        later = {link.after for link in self.links}
        return tuple(name for name in self.candidates if name not in later)

    def add(self, candidate: Candidate) -> None:
        """Add a model; another one of its name is refused."""
        known = self.candidates.setdefault(candidate.name, candidate)
        if known != candidate:
            raise UsageError(
                f"two models are called '{candidate.name}': {known.spec} and {candidate.spec}",
                "Name them: NAME=MODEL",
            )


def read_field(config: CompareConfig, caches: CacheSet | None) -> Field:
    """Resolve all MODEL words.

    Raises:
        UsageError: a name twice, or fewer than two models.
        NotFoundError: a word that is no model, or a run whose teacher or start is not there.
        BadDataError: a damaged result.
    """
    cached = {} if caches is None else {name: caches.teacher(name) for name in caches.teachers}
    found, runs = Field(), dict[str, Run]()
    words = [*config.models, *(name for name in (*config.teacher, *config.student) if name in cached)]
    if not words and not config.after:
        words = list(cached)
    for word in words:
        _read_word(word, cached, found, runs)
    for word in config.after:
        found.links.append(_read_after(word, cached, found))
    _link(runs, cached, found)
    _order_links(found)
    if len(found.candidates) < 2:
        only = next(iter(found.candidates), None)
        raise UsageError(
            "there is no model to compare" if only is None else f"'{only}' is the only model",
            "A comparison takes two: kd compare A B --test DATA, or --cache CACHE with two teachers.",
        )
    return found


def _read_word(
    word: str, cached: Mapping[str, TeacherRecord], found: Field, runs: dict[str, Run]
) -> Candidate | None:
    """Add what a word names. Returns the model, None for a folder of several."""
    named = None if Path(word).exists() else _NAME.fullmatch(word)
    name, text = (named[1], named[2]) if named else (None, word)
    if text in cached:
        candidate = Candidate(name or text, cached[text].spec, cached[text])
        found.add(candidate)
        return candidate
    path = Path(text).expanduser() if not re.match(r"[a-z][a-z-]+:", text) else None
    if path is not None and path.name == RESULT and path.is_file():
        path = path.parent
    if path is not None and path.is_dir() and not (path / CONFIG).is_file():
        return _read_folder(path, name, found, runs)
    spec = ModelSpec("local-dir", "", path.absolute()) if path is not None and path.is_dir() else None
    candidate = _open_word(name, text, spec, cached)
    found.add(candidate)
    return candidate


def _open_word(
    name: str | None, text: str, spec: ModelSpec | None, cached: Mapping[str, TeacherRecord]
) -> Candidate:
    try:
        spec = spec or ModelSpec.parse(text)
    except NotFoundError as error:
        if re.search(r"[:/@]", text) or "." in text:
            raise
        near = nearest(text, cached) or ("" if cached else nearest(text, _architectures()))
        raise NotFoundError(
            f"'{text}' is no cached teacher, no run and no model.{near}",
            f"Cached teachers: {', '.join(cached) or 'none (no --cache is given)'}. {error.hint}",
        ) from error
    return Candidate(name or _slug(str(spec)), str(spec))


def _architectures() -> list[str]:
    from timm import list_models

    return list(list_models())


def _slug(spec: str) -> str:
    """The name of a model that was given none; an export is called as the run's folder."""
    parts = [part for part in re.split(r"[/:@]", spec.rstrip("/")) if part]
    last = parts[-2] if parts[-1] == EXPORT and len(parts) > 1 else parts[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"\.(safetensors|onnx)$", "", last)).strip("-.") or "model"


def _read_folder(path: Path, name: str | None, found: Field, runs: dict[str, Run]) -> Candidate | None:
    below = find_runs(path)
    if not below:
        raise NotFoundError(
            f"{path} holds neither a finished run nor an export",
            "Name a folder that kd train-student wrote, its export, or a folder of such folders.",
        )
    if name is not None and len(below) > 1:
        raise UsageError(
            f"{name}={path}: one name for {len(below)} runs", f"Name each of them, or give {path}."
        )
    candidate = None
    for run in below:
        base = path if run.folder != path else None
        candidate = Candidate(name or name_of(run.folder, base), run.spec)
        taken = found.candidates.get(candidate.name, candidate)
        if taken != candidate and name is None:  # runs/a/kl and runs/b/kl
            candidate = Candidate(name_of(run.folder, Path()), run.spec)
        found.add(candidate)
        runs[candidate.name] = run
    return candidate if len(below) == 1 else None


def _read_after(word: str, cached: Mapping[str, TeacherRecord], found: Field) -> Link:
    parts = _AFTER.fullmatch(word)
    if parts is None:
        raise UsageError(
            f"--after {word} is not METHOD,TEACHER,STUDENT=MODEL",
            "For example --after dp,big,small=runs/dp; runs of kd train-student record it: kd compare runs/dp",
        )
    method, teachers, student, text = parts.groups()
    for each in (*teachers.split(SEVERAL), student):
        if each in found.candidates:
            continue
        if each not in cached:
            known = (*found.candidates, *cached)
            raise NotFoundError(
                f"--after {word}: no model is called '{each}'.{nearest(each, known)}",
                f"Models: {', '.join(known) or 'none'}. Give it a name: {each}=MODEL",
            )
        found.add(Candidate(each, cached[each].spec, cached[each]))
    name = f"{method}-{teachers.replace(SEVERAL, '-')}-{student}"
    candidate = _read_word(f"{name}={text}", cached, found, {})
    assert candidate is not None  # a name stands for one model, or is refused
    return Link(method, tuple(teachers.split(SEVERAL)), student, name)


# --- what runs record -------------------------------------------------------------------------


def _link(runs: Mapping[str, Run], cached: Mapping[str, TeacherRecord], found: Field) -> None:
    """Find the start and the teachers of runs among the models; what only the runs name is added."""
    explicit = {link.after for link in found.links}
    for name, run in runs.items():
        if name in explicit or run.origin is None:
            continue
        student = _origin_of(run, cached, found)
        if student is None:
            continue
        teachers = tuple(dict.fromkeys(_teacher_of(run, each, cached, found) for each in run.teachers))
        if len(teachers) > 1:  # a frozen student that was cached is no teacher beside others
            teachers = tuple(each for each in teachers if each != student) or teachers
        found.links.append(Link(run.method, teachers, student, name))


def _origin_of(run: Run, cached: Mapping[str, TeacherRecord], found: Field) -> str | None:
    """Name of the model that a run started from; None where the run is not compared with its start."""
    for candidate in found.candidates.values():
        if candidate.spec == run.origin:
            return candidate.name
    for name, record in cached.items():
        if record.spec == run.origin and name not in found.candidates:
            found.add(Candidate(name, record.spec, record))
            return name
    if not run.teachers or run.origin is None or ModelSpec.parse(run.origin).kind not in _OWN:
        return None  # trained on labels, or from a library's weights, that are no part of this comparison
    candidate = Candidate(_slug(run.origin), run.origin)
    if candidate.name in found.candidates:
        candidate = Candidate(f"start-of-{candidate.name}", run.origin)
    found.add(candidate)
    return candidate.name


def _teacher_of(run: Run, name: str, cached: Mapping[str, TeacherRecord], found: Field) -> str:
    """Name of the model that a run calls its teacher: by identity in the cache, else by name."""
    by_id = next((each for each, record in cached.items() if record.id == run.teachers[name]), None)
    if by_id is not None:
        return _as_candidate(Candidate(by_id, cached[by_id].spec, cached[by_id]), found)
    if name in found.candidates:
        return name
    if name in cached:
        console.warn(
            f"{run.folder} was taught by a '{name}' that is cached here with other settings or weights; "
            "taking them for the same"
        )
        return _as_candidate(Candidate(name, cached[name].spec, cached[name]), found)
    known = (*found.candidates, *cached)
    raise NotFoundError(
        f"the teacher '{name}' of {run.folder} is not among the models.{nearest(name, known)}",
        f"Name it: kd compare {name}=MODEL ..., or cache it on these images and give --cache.",
    )


def _as_candidate(candidate: Candidate, found: Field) -> str:
    """The name under which a cached teacher is compared already, else its own, and it is added."""
    for known in found.candidates.values():
        same = (
            known.record is not None
            and candidate.record is not None
            and known.record.id == candidate.record.id
        )
        if same or known.spec == candidate.spec:
            return known.name
    if candidate.name in found.candidates:
        return candidate.name
    found.add(candidate)
    return candidate.name


def _order_links(found: Field) -> None:
    """Stages of a sequence in their order: a student comes after the transfer that made it."""
    done: list[Link] = []
    waiting = list(found.links)
    while waiting:
        later = {link.after for link in waiting}
        ready = [link for link in waiting if link.student not in later]
        if not ready:
            circle = ", ".join(link.after for link in waiting)
            raise UsageError(f"each of {circle} is the start of another one", "Check --after.")
        done += ready
        waiting = [link for link in waiting if link not in ready]
    found.links[:] = done


def chosen(names: Sequence[str], given: Sequence[str], option: str) -> tuple[str, ...]:
    """The models that an option names, all where it names none.

    Raises:
        NotFoundError: it names one that is not there.
    """
    for name in given:
        if name not in names:
            raise NotFoundError(
                f"{option} {name}: no model is called that.{nearest(name, names)}",
                f"Models: {', '.join(names)}.",
            )
    return tuple(given) or tuple(names)
