"""What a zip may hold that a cache is packed in."""

import stat
import zipfile
from pathlib import Path
from typing import Final

from kdcli.errors import Advice, CorruptError
from kdcli.reading import require_name

PACK_AGAIN = Advice("pack-again")
TEXT_BYTES: Final = 2**30
"""Most bytes of kd's own records in a packed cache, each part's by itself."""


def require_plain(box: zipfile.ZipFile, path: Path) -> None:
    """Refuse a zip with members that kd does not make: names that lead elsewhere, links, what grows when it is read."""
    names: set[str] = set()
    for info in box.infolist():
        for part in info.filename.removesuffix("/").split("/"):
            require_name(part, path, f"member {info.filename!r}", CorruptError)
        if info.filename in names:
            raise CorruptError(f"{path}: two members are called {info.filename}", PACK_AGAIN)
        names.add(info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.compress_type != zipfile.ZIP_STORED or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise CorruptError(f"{path}: {info.filename} is not stored as kd stores it", PACK_AGAIN)
    if sum(info.file_size for info in box.infolist()) > path.stat().st_size:
        raise CorruptError(f"{path}: its members claim more bytes than it has", PACK_AGAIN)
