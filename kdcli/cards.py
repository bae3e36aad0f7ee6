"""Cards of what goes to the hub: README.md with a front matter, where names of users are text and no markup."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

import yaml

from kdcli.console import console, shown
from kdcli.errors import UsageError, nearest

CARD: Final = "README.md"
LICENCES: Final = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "gemma",
        "unknown",
    ]
)
"""By the hub's names (its page "Licenses"); any other one is ``other:NAME``."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
_MARKUP: Final = re.compile(
    r"[\\`*{}\[\]()#+!|<>~&$\"']|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.|@"
)
_SEAL: Final = "<!-- written by kd, which replaces it until somebody changes it: %s -->\n"


@final
@dataclass(frozen=True, slots=True)
class Licence:
    """A licence as the hub calls it; ``name`` is that of an ``other`` one."""

    id: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """A value of ``--licence``.

        Raises:
            UsageError: it is none.
        """
        kind, colon, name = text.partition(":")
        if kind == "other" and colon and _NAME.fullmatch(name):
            return cls(kind, name)
        if text in LICENCES:
            return cls(text)
        raise UsageError(
            f"--licence {text} is none that the hub knows.{nearest(text, LICENCES)}",
            "Give the hub's identifier, such as cc-by-4.0, or other:NAME for a licence of another name.",
        )

    def front(self) -> dict[str, str]:
        """As in a front matter."""
        return {"license": self.id, **({"license_name": self.name} if self.name else {})}

    def __str__(self) -> str:
        return self.name or self.id


def plain(text: object) -> str:
    """Text of a user as markdown that shows it, and does nothing else, in a line that does not begin with it."""
    return _MARKUP.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), shown(text))


def block(text: str) -> str:
    """Lines to be copied, whatever is in them."""
    lines = shown(text, keep="\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", lines))])
    return f"{fence}\n{lines}\n{fence}\n"


def listed(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def shortened(text: str) -> str:
    """A spec or a command without the folders that lead to what it names: they are nobody else's business."""
    bare = re.sub(r"\bfolder/(?=/)", "", text)
    return re.sub(r"(?:(?<![\w./])|(?<=\w/))/(?:[^/\s'\"=@,]+/)+", ".../", bare)


def card(front: Mapping[str, Any], body: str) -> bytes:
    """A card, and a mark in its last line by which :func:`is_own` knows it."""
    matter = yaml.safe_dump(dict(front), sort_keys=False)
    text = f"---\n{matter}---\n\n{body.rstrip()}\n\n"
    return (text + _SEAL % hashlib.sha256(text.encode()).hexdigest()[:16]).encode()


def is_own(data: bytes) -> bool:
    """Whether a card is one of :func:`card` that nobody has changed."""
    text, _, _ = data.rpartition(b"<!--")
    return data == text + (_SEAL % hashlib.sha256(text).hexdigest()[:16]).encode()


def is_ours(read: Callable[[str], bytes], where: str) -> bool:
    """Whether a card may be written: there is none, or kd's own. Else it is said that somebody's is kept.

    Args:
        read: a file of the repository, or FileNotFoundError.
        where: the repository, for people.
    """
    try:
        ours = is_own(read(CARD))
    except FileNotFoundError:
        return True
    if not ours:
        console.note(f"{where}/{CARD} is not as kd wrote it, and is left as it is")
    return ours
