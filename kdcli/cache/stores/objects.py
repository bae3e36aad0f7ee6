"""Places in object stores (S3 and what speaks like it, Google Cloud Storage, Azure), through obstore."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar, final

from kdcli.cache.stores.places import PIECE, Entry, Place, changed
from kdcli.errors import CorruptError, KdError, MissingExtraError, StorageError
from kdcli.reading import DOCUMENT_BYTES

T = TypeVar("T")
Tag = Mapping[str, str]
"""Tells a version of an object from all others: what a store compares for a condition of a write."""
_ATTEMPTS: Final = 3
"""How often something is asked whose answer is cut off."""
_RETRY: Final[dict[str, Any]] = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
_CLIENT: Final[dict[str, Any]] = {"timeout": "300s", "connect_timeout": "5s"}
"""As settings of the store: obstore's client_options would take the place of those in the environment."""
_AGAIN: Final = (
    "Check the network and the endpoint, then run the same command again: it goes on where it was."
)
_KEYS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL and AWS_REGION where they are needed)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
}
_NO_BUCKET: Final = ("NoSuchBucket", "bucket does not exist", "ContainerNotFound")
_NO_CREDENTIALS: Final = (
    "/latest/api/token",
    "/latest/meta-data",
    "/metadata/identity",
    "metadata.google.internal",
    "must be specified",
)
_FORBIDDEN: Final = ("401 Unauthorized", "403 Forbidden")


@final
class ObjectPlace(Place):
    """A path in a bucket. Who asks, and which endpoint, is in the environment, by obstore's own names."""

    def __init__(self, scheme: str, bucket: str, path: str) -> None:
        try:
            import obstore
            from obstore import store as stores
        except ImportError as error:
            raise MissingExtraError(
                f"{scheme}:// needs a package that is not installed", "pip install 'kdcli[stores]'"
            ) from error
        self.name = f"{scheme}://{bucket}/{path}".rstrip("/")
        self._scheme, self._bucket, self._obstore = scheme, bucket, obstore
        kinds = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
        with self._refusals():
            self._store = kinds[scheme](bucket, prefix=path or None, retry_config=_RETRY, **_CLIENT)

    def read(self, path: str, most: int = DOCUMENT_BYTES) -> bytes:
        """See the base."""
        return self.get(path, most)[0]

    def pieces(self, path: str, entry: Entry) -> Iterator[bytes]:
        """See the base."""
        for start in range(0, entry.size, PIECE):
            data, edition = self._persistently(
                partial(self._piece, path, start, min(start + PIECE, entry.size))
            )
            if edition != entry.edition:
                raise changed(f"{self.name}/{path}")
            yield data

    def _piece(self, path: str, start: int, stop: int) -> tuple[bytes, str]:
        found = self._obstore.get(self._store, path, options={"range": (start, stop)})
        return bytes(found.bytes()), _entry(found.meta).edition

    def entry(self, path: str) -> Entry | None:
        """See the base."""
        with suppress(FileNotFoundError):
            return _entry(self._persistently(partial(self._obstore.head, self._store, path)))
        return None

    def entries(self, below: str = "") -> dict[str, Entry]:
        """See the base."""
        return {name: _entry(meta) for name, meta in self._listed(below).items()}

    def is_empty(self, but: str) -> bool:
        """See the base."""
        with self._refusals():
            found = (each["path"] for batch in self._obstore.list(self._store) for each in batch)
            return all(str(path).startswith(f"{but}/") for path in found)

    def write(self, path: str, data: bytes) -> None:
        """See the base."""
        with self._refusals():
            self._obstore.put(self._store, path, data)

    def create(self, path: str, data: bytes) -> bool:
        """See the base."""
        with self._refusals():
            try:
                self._obstore.put(self._store, path, data, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
        return True

    # --- conditional writes, for writers that share a bucket ----------------------------------------

    def get(self, path: str, most: int = DOCUMENT_BYTES) -> tuple[bytes, Tag, float]:
        """The bytes of an object, its version, and when it was written, in seconds of the store's clock.

        Raises:
            FileNotFoundError: there is none.
            CorruptError: it has more than ``most`` bytes.
        """

        def ask() -> tuple[bytes, Tag, float]:
            found = self._obstore.get(self._store, path)
            self._require_size(path, int(found.meta["size"]), most)
            return bytes(found.bytes()), _tag(found.meta), found.meta["last_modified"].timestamp()

        return self._persistently(ask)

    def versions(self, below: str) -> dict[str, tuple[Tag, float]]:
        """The version of every object below a folder, and when it was written, by name; see :meth:`get`."""
        return {
            name: (_tag(meta), meta["last_modified"].timestamp())
            for name, meta in self._listed(below).items()
        }

    def put(self, path: str, data: bytes, old: Tag | None = None) -> Tag | None:
        """Make an object that is not there, or replace this very version of it.

        Returns:
            The new version; None, and nothing changed, where another one is there. One with these bytes counts as
            made: the answer to the request that made it may have been lost.
        """
        errors = self._obstore.exceptions
        with self._refusals():
            try:
                mode: Any = "create" if old is None else dict(old)
                return _tag(self._obstore.put(self._store, path, data, mode=mode, use_multipart=False))
            except (errors.AlreadyExistsError, errors.PreconditionError):
                pass
        try:
            found, tag, _ = self.get(path, len(data))
        except (FileNotFoundError, CorruptError):
            return None
        return tag if found == data else None

    def remove(self, path: str) -> None:
        """Remove an object, if it is there."""
        with suppress(FileNotFoundError), self._refusals():
            self._obstore.delete(self._store, path)

    def _listed(self, below: str) -> dict[str, Any]:
        return self._persistently(
            lambda: {
                str(each["path"]): each
                for batch in self._obstore.list(self._store, below or None)
                for each in batch
            }
        )

    def _require_size(self, path: str, size: int, most: int) -> None:
        if size > most:
            raise CorruptError(
                f"{self.name}/{path} has {size} bytes, at most {most} are read", "Push it again."
            )

    def _persistently(self, ask: Callable[[], T]) -> T:
        """Ask anew where an answer was cut off; a request without an answer is repeated by obstore."""
        for _ in range(_ATTEMPTS - 1):
            with suppress(StorageError), self._refusals():
                return ask()
        with self._refusals():
            return ask()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn what a store refuses into errors of ours; what there is not, where there is a bucket, stays one."""
        try:
            yield
        except KdError:
            raise
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and not _has(str(error), _NO_BUCKET):
                raise FileNotFoundError(self.name) from None
            raise self._refused(str(error)) from None  # its text may hold a signed address

    def _refused(self, text: str) -> StorageError:
        if _has(text, _NO_BUCKET):
            hint = "Make it, or check its name, the account and the endpoint."
            return StorageError(f"{self.name}: there is no bucket '{self._bucket}'", hint)
        if _has(text, _NO_CREDENTIALS):
            return StorageError(f"{self.name}: no credentials are set", f"Set {_KEYS[self._scheme]}.")
        if _has(text, _FORBIDDEN):
            return StorageError(
                f"{self.name}: the store refuses it: {_code(text)}",
                f"Check {_KEYS[self._scheme]}, and what they permit there: pull reads and lists, push writes, too, "
                "and cache-teachers removes its leases.",
            )
        return StorageError(f"{self.name}: {_reason(text)}", _AGAIN)


def _tag(meta: Mapping[str, Any]) -> Tag:
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _entry(meta: Mapping[str, Any]) -> Entry:
    return Entry(int(meta["size"]), f"{meta['size']} {meta['e_tag'] or meta['last_modified']}")


def _has(text: str, marks: tuple[str, ...]) -> bool:
    return any(mark in text for mark in marks)


def _code(text: str) -> str:
    """What S3 and Azure call a refusal, such as AccessDenied."""
    found = re.search(r"<Code>(\w{1,64})</Code>", text)
    return found[1] if found else "no permission"


def _reason(text: str) -> str:
    """The first line of an error of obstore, without what an address may hold besides host and path."""
    line = text.partition("\n")[0].partition("<")[0].strip(" :-")
    line = re.sub(r" in [\d.]+\w*s(, after .*?(?= - |$))?", "", line)  # how often, and how long, it was tried
    return re.sub(r"\?[^\s)]*", "", re.sub(r"://[^\s/]*@", "://", line))
