"""The URL of a place: a bucket and a path. Credentials come from the environment, and are in no URL and no message."""

import re
from pathlib import Path
from typing import Final

from kdcli.cache.owned import require_outside_caches
from kdcli.cache.stores.folders import FolderPlace
from kdcli.cache.stores.places import Place
from kdcli.errors import UsageError

_URL: Final = re.compile(r"(s3|gs|az|file|hf)://([^/]*)(?:/(.*))?", re.DOTALL)
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FORMS: Final = (
    "Give s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, file:///PATH or hf://datasets/ORG/NAME."
)


def open_place(url: str, private: bool | None = None) -> Place:
    """The place that a URL names; nothing is asked of it yet.

    Args:
        url: of a bucket, a folder, or a data set of the hub.
        private: of the hub: None to read, else whether only its owners see a data set that has to be made.

    Raises:
        UsageError: it is none, or holds more than a bucket and a path: what may be a password is not repeated.
        MissingExtraError: the package for such places is not installed.
        StorageError: the hub is to be written, and no token is set.
    """
    found = _URL.fullmatch(url)
    if found is None:
        scheme, colon, _ = url.partition("://")
        raise UsageError(f"{scheme}{colon and '://...'} is no place that kd reads or writes", _FORMS)
    if found[1] == "hf":
        from kdcli.cache.stores.hub import HubPlace

        return HubPlace(url, private)
    scheme, bucket, path = found[1], found[2], (found[3] or "").strip("/")
    odd = bool(re.search(r"[?#\\\x00-\x1f\x7f]", path)) or not {"", ".", ".."}.isdisjoint(path.split("/")[1:])
    if odd or path.startswith("../") or path in (".", "..") or (scheme == "file") != (not bucket):
        raise UsageError(f"this {scheme}:// address is not one of a bucket and a path alone", _FORMS)
    if scheme == "file":
        if not path:
            raise UsageError("file:/// names no folder", _FORMS)
        require_outside_caches(Path("/", path))
        return FolderPlace(f"file:///{path}", Path("/", path))
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"this {scheme}:// address holds more than a bucket and a path",
            "Leave credentials out of it: they come from the environment (such as AWS_ACCESS_KEY_ID).",
        )
    from kdcli.cache.stores.objects import ObjectPlace

    return ObjectPlace(scheme, bucket, path)
