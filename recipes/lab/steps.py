"""A recipe as steps: each is one kd command that leaves one JSON document."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from kdcli.errors import BadDataError, CacheMissingError
from kdcli.files import storage_errors
from kdcli.reading import parse_json
from lab.places import Places
from lab.settings import Settings


@final
@dataclass(frozen=True, slots=True)
class StandIn:
    """What a cache is planned with before its teacher is there.

    Attributes:
        architecture: of timm, or torchvision/NAME.
        classes: of its logits; None for the architecture's own.
    """

    architecture: str
    classes: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One kd command.

    Attributes:
        name: also of its document, ``OUT/documents/NAME.json``: what the command prints with ``--json``.
        words: of the command, without ``kd``, and without what the runner adds (``--json``, ``--engine``, ...).
        needs: names of the steps whose outcome it reads.
        files: small files that it reads, and their text.
        data: names of the data sets that it reads.
        kind: row of the table of ``--cost``, by which it is counted with:
        images: how many it decodes in all.
        gmacs: 10^9 multiply-adds of all its forward and backward passes.
        stand_ins: of a cache-teachers: what its cache is planned with while its teachers are not there.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    files: Mapping[Path, str] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    kind: str = ""
    images: float = 0
    gmacs: float = 0
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The command as one types it."""
        return shlex.join(("kd", *self.words))


@final
@dataclass(frozen=True, slots=True)
class Lab:
    """What a paper's module makes its steps of.

    Attributes:
        settings: the numbers.
        places: data sets and models.
        out: absolute folder of all that is made.
    """

    settings: Settings
    places: Places
    out: Path

    def document_path(self, step: str) -> Path:
        """Where a step leaves its document."""
        return self.out / "documents" / f"{step}.json"

    def document(self, step: str) -> Any:
        """What a step printed.

        Raises:
            CacheMissingError: it has not run.
            BadDataError: it is not what kd prints.
        """
        path = self.document_path(step)
        if not path.exists():
            raise CacheMissingError(
                f"step '{step}' has not run: {path} is not there", "Run the recipe first."
            )
        with storage_errors(path):
            text = path.read_bytes()
        return parse_json(text, path, hint="Remove it: the same run makes it again.")

    def has(self, step: str) -> bool:
        """Whether a step has left its document."""
        return self.document_path(step).exists()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Refuse what is read in here and is JSON, but not what its step prints.

        Raises:
            BadDataError: of a document that lacks what is asked of it.
        """
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise BadDataError(
                f"a document in {self.out / 'documents'} is not what its step prints: {error!r}",
                "Remove it: the same run makes it again.",
            ) from error

    def sweep(self, name: str, students: Mapping[str, Mapping[str, Any]]) -> tuple[Path, dict[Path, str]]:
        """The file of a sweep's students, and what it holds."""
        path = self.out / "sweeps" / f"{name}.yaml"
        return path, {path: json.dumps({"students": students}, indent=1) + "\n"}  # JSON is YAML


def words(*arguments: object, **options: Any) -> tuple[str, ...]:
    """Words of a command: arguments, then options by name; a list is repeated, True is a flag, None is left out."""
    found = [str(argument) for argument in arguments]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if each is True:
                found.append(flag)
            elif each is not None and each is not False:
                found += [flag, str(each)]
    return tuple(found)
