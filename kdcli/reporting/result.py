"""What ``kd report`` wrote."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from kdcli.documents import declared
from kdcli.results import Result


@final
@dataclass(frozen=True, slots=True)
class ReportResult(Result):
    """What ``kd report`` wrote.

    Attributes:
        out: the file or folder.
        format: of it.
        files: all of them.
        inputs: how many there were of each kind.
        sections: titles.
    """

    out: Path
    format: str
    files: tuple[Path, ...]
    inputs: Mapping[str, int]
    sections: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        places = replace(self, out=self.out.absolute(), files=tuple(file.absolute() for file in self.files))
        document: dict[str, Any] = declared(places)
        return document
