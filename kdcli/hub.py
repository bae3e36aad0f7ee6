"""Repositories of the Hugging Face hub: read at one commit, written by commits of many files, by its own client."""

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any, Final, Literal, Self, final

from kdcli._version import __version__
from kdcli.errors import CorruptError, KdError, MissingExtraError, StorageError, UsageError
from kdcli.reading import DOCUMENT_BYTES

_ADDRESS: Final = re.compile(
    r"hf://(datasets/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.%-]+))?((?:/[^/@?#\\\x00-\x1f\x7f]+)*)/?",
    re.ASCII,
)
_FORMS: Final = {
    "dataset": "Give hf://datasets/ORG/NAME, hf://datasets/ORG/NAME@REVISION or hf://datasets/ORG/NAME/PATH.",
    "model": "Give hf://ORG/NAME.",
}
_STREAMS: Final = 16
"""Files that are sent at a time."""
_HELD_BYTES: Final = 2**28
"""Bytes that wait in memory until they are sent together."""
_COMMIT_FILES: Final = 500
"""Files of a commit: the hub takes 128 commits an hour of a user."""
_ATTEMPTS: Final = 4
_SECONDS: Final = 60.0
"""Silence after which a request is given up."""
_AGAIN: Final = "Check the network and HF_ENDPOINT, then run the same command again: it goes on where it was."
_UPDATE: Final = "Update it: pip install --upgrade huggingface_hub; if it stays, report it as a bug of kd."
_LOGIN: Final = "Log in with: hf auth login, or set HF_TOKEN"


@final
@dataclass(frozen=True, slots=True)
class Address:
    """What ``hf://`` names.

    Attributes:
        kind: of repository.
        name: ``ORG/NAME``.
        revision: branch, tag or commit; None: the main branch.
        path: a folder in it; empty: all of it.
    """

    kind: Literal["dataset", "model"]
    name: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, url: str, kind: Literal["dataset", "model"]) -> Self:
        """The address in a URL.

        Raises:
            UsageError: it is none, or of another kind; what may be a password is not repeated.
        """
        found = _ADDRESS.fullmatch(url)
        steps = found[4].strip("/").split("/") if found else []
        if found is None or bool(found[1]) != (kind == "dataset") or not {".", ".."}.isdisjoint(steps):
            what = "data set" if kind == "dataset" else "model"
            raise UsageError(f"this hf:// address is not one of a {what} of the hub", _FORMS[kind])
        revision = found[3] and found[3].replace("%2F", "/")
        return cls(kind, found[2], revision, "/".join(steps))

    def __str__(self) -> str:
        at = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        where = f"/{self.path}" if self.path else ""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.name}{at}{where}"


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit: its size, and its SHA-256 (of a large file) or git's SHA-1."""

    size: int
    digest: str


@final
class Repository:
    """Files of a repository, below the path of its address, as they were when they were first looked at.

    What is written waits for :meth:`commit`, which is called whenever much waits; many threads may write. A commit
    names the one that it follows, so nothing that somebody else writes meanwhile is lost.

    Args:
        address: where.
        private: None: it is to be read, and must be there; else whether only its owners see it, if it has to be made.

    Raises:
        MissingExtraError: the client is not installed.
        StorageError: it is to be written, and no token is set.
    """

    def __init__(self, address: Address, private: bool | None = None) -> None:
        try:
            hub: Any = import_module("huggingface_hub")
        except ImportError as error:
            raise MissingExtraError(
                "hf:// needs a package that is not installed", "pip install 'kdcli[hub]'"
            ) from error
        hub.logging.set_verbosity_error()  # its warnings may hold signed addresses
        hub.utils.disable_progress_bars()
        self.address, self._private, self._hub = address, private, hub
        self._api = hub.HfApi(library_name="kdcli", library_version=__version__)
        self._common: dict[str, Any] = {"repo_id": address.name, "repo_type": address.kind}
        self._head: str | None = None
        self._held: dict[str, Any] = {}
        self._bytes = 0
        self._lock = RLock()
        if private is not None:
            if address.revision is not None:
                raise UsageError(f"{address}: a push goes to the main branch", "Leave @REVISION out.")
            if hub.get_token() is None:
                raise StorageError(
                    f"{address}: no token is set", f"{_LOGIN} to a token that may write there."
                )

    # --- reading ----------------------------------------------------------------------------------

    @cached_property
    def files(self) -> dict[str, Entry]:
        """What is there, by path below the address."""
        with self._lock, self._refusals():
            return self._look()

    def read(self, path: str, most: int = DOCUMENT_BYTES, span: tuple[int, int] | None = None) -> bytes:
        """A file, or the bytes of a span of it.

        Raises:
            FileNotFoundError: there is none.
            CorruptError: it has more than ``most`` bytes.
            StorageError: the hub refuses, or does not answer.
        """
        if self._full(path) in self._held:
            self.commit()
        if (entry := self.files.get(path)) is None:
            raise FileNotFoundError(f"{self.address}/{path}")
        if entry.size > most:
            raise CorruptError(
                f"{self.address}/{path} has {entry.size} bytes, at most {most} are read", "Push it again."
            )
        utils = self._hub.utils
        url = self._hub.hf_hub_url(**self._common, filename=self._full(path), revision=self._head)
        with self._refusals():
            headers = utils.build_hf_headers(library_name="kdcli", library_version=__version__)
            if span is not None:
                headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
            answer = utils.http_backoff("GET", url, headers=headers, timeout=_SECONDS)
            utils.hf_raise_for_status(answer)
            data = bytes(answer.content)
        return data if span is None or answer.status_code == 206 else data[slice(*span)]

    def _look(self) -> dict[str, Entry]:
        """Find the newest commit; its files."""
        errors = self._hub.errors
        asked = {**self._common, "revision": self.address.revision, "expand": ["sha"], "timeout": _SECONDS}
        for attempt in range(_ATTEMPTS):
            try:
                self._head = self._api.repo_info(**asked).sha
                break
            except errors.RepositoryNotFoundError:
                if self._private is None:
                    raise
                return {}
            except errors.HTTPError as error:
                if attempt == _ATTEMPTS - 1 or not _may_pass(error):
                    raise
                time.sleep(2**attempt / 2)
        where = {**self._common, "revision": self._head, "path_in_repo": self.address.path or None}
        try:
            found = list(self._api.list_repo_tree(**where, recursive=True))
        except errors.EntryNotFoundError:
            return {}
        return {
            self._below(each.path): Entry(each.size, each.lfs.sha256 if each.lfs else each.blob_id)
            for each in found
            if hasattr(each, "size")  # else it is a folder
        }

    # --- writing ----------------------------------------------------------------------------------

    def write(self, path: str, data: bytes | Path, replace: bool = True) -> bool:
        """Make or replace a file, with the next commit.

        Args:
            path: its name.
            data: its content, or the file that has it until the commit.
            replace: one that is there.

        Returns:
            False, and nothing is written, where there is one and it is not to be replaced.
        """
        with self._lock:
            full, there = self._full(path), self.files.get(path)
            if not replace and (there is not None or full in self._held):
                return False
            addition = self._hub.CommitOperationAdd(full, data)
            if there is not None and there.digest in _digests(addition):
                return True
            self._held[full] = addition
            self._bytes += addition.upload_info.size if isinstance(data, bytes) else 0
            if self._bytes >= _HELD_BYTES:
                self._send()
            if len(self._held) >= _COMMIT_FILES:
                self.commit()
        return True

    def commit(self) -> None:
        """Make everything that was written visible, at once."""
        with self._lock, self._refusals():
            if self._held:
                self._send()
            for attempt in range(_ATTEMPTS):
                if not self._held:
                    return
                try:
                    self._publish()
                except self._hub.errors.HTTPError as error:
                    if attempt == _ATTEMPTS - 1 or not _may_pass(error):
                        raise
                    time.sleep(2**attempt / 2)
                    self._go_on()

    def _send(self) -> None:
        """Send what is large; it is seen after the commit only. What the hub has is not sent again."""
        with self._refusals():
            _ = self.files
            if self._head is None:
                self._api.create_repo(**self._common, private=self._private or None, exist_ok=True)
                self.files = self._look()
            additions, kind = list(self._held.values()), self.address.kind
            self._api.preupload_lfs_files(self.address.name, additions, repo_type=kind, num_threads=_STREAMS)
            self._bytes = 0

    def _publish(self) -> None:
        made = self._api.create_commit(
            **self._common,
            operations=list(self._held.values()),
            commit_message=f"kd {__version__}",
            parent_commit=self._head,
            num_threads=_STREAMS,
        )
        self._head = made.oid
        for full, each in self._held.items():
            self.files[self._below(full)] = Entry(each.upload_info.size, each.upload_info.sha256.hex())
        self._held.clear()

    def _go_on(self) -> None:
        """After a commit that was not answered, or that another one was faster than: see what is there now."""
        before, self.files = self.files, self._look()
        for full, each in list(self._held.items()):
            path = self._below(full)
            if self.files.get(path) == before.get(path):
                continue
            if path not in self.files or self.files[path].digest not in _digests(each):
                raise StorageError(
                    f"{self.address}/{path} was changed by somebody else meanwhile",
                    "Run the same command again.",
                )
            del self._held[full]  # the answer was lost, not the commit

    # --- both -------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self.address.path}/{path}" if self.address.path else path

    def _below(self, full: str) -> str:
        return full.removeprefix(f"{self.address.path}/") if self.address.path else full

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn what the client raises into errors of ours; its texts, which may hold signed addresses, are left out."""
        errors = self._hub.errors
        try:
            yield
        except KdError:
            raise
        except (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError, ValueError) as error:
            cause: BaseException = error
            while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
                cause = cause.__cause__  # of a thread that sent a file
            raise self._refused(cause) from None

    def _refused(self, error: BaseException) -> StorageError:
        errors, status, address = self._hub.errors, _status(error), self.address
        what = "data set" if address.kind == "dataset" else "model"
        said = _said(error)
        if isinstance(error, errors.HFValidationError):
            return StorageError(f"the hub has no names such as '{address.name}'", _FORMS[address.kind])
        if isinstance(error, errors.GatedRepoError):
            hint = f"Ask for access on its page of the hub, then {_LOGIN[0].lower()}{_LOGIN[1:]}."
            return StorageError(f"{address}: it is gated, and you were not let in yet", hint)
        if isinstance(error, errors.RevisionNotFoundError):
            return StorageError(
                f"{address}: there is no such revision", "Leave @REVISION out for the main branch."
            )
        unseen = status == 401 and self._hub.get_token() is None
        if unseen or isinstance(error, errors.RepositoryNotFoundError):
            return StorageError(
                f"the hub has no {what} {address.name} that you may read",
                f"Check the name; for a private one {_LOGIN[0].lower()}{_LOGIN[1:]}.",
            )
        if isinstance(error, errors.OfflineModeIsEnabled):
            return StorageError(
                f"{address}: the hub is switched off (HF_HUB_OFFLINE)", "Unset HF_HUB_OFFLINE."
            )
        if status == 401:
            return StorageError(f"{address}: the hub does not know this token", f"{_LOGIN}.")
        if status == 403:
            return StorageError(
                f"{address}: the token does not permit it{said}",
                f"{_LOGIN} to a token that may write to {address.name.partition('/')[0]}.",
            )
        if status == 429:
            return StorageError(
                f"{address}: too many requests{said}",
                "Wait, then run the same command again: it goes on where it was.",
            )
        if status is not None and status < 500:
            return StorageError(f"{address}: the hub refuses it: {status}{said}", _AGAIN)
        if isinstance(error, ValueError):
            return StorageError(f"{address}: the hub's client refuses it: {type(error).__name__}", _UPDATE)
        reason = f"the hub answers {status}" if status else f"no answer of the hub ({type(error).__name__})"
        return StorageError(f"{address}: {reason}", _AGAIN)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: BaseException) -> bool:
    """Whether it may go well when it is tried again: no answer, a failure of the hub, another commit."""
    status = _status(error)
    return status is None or status >= 500 or status in (408, 412)


def _said(error: BaseException) -> str:
    """What the hub itself says of its refusal, without addresses."""
    text = " ".join(str(getattr(error, "server_message", None) or "").split())
    text = re.sub(r"https?://\S+|\bhf_\w+", "...", text)[:200]
    return f": {text}" if text else ""


def _digests(addition: Any) -> set[str]:
    """By which the hub may call a file that was sent."""
    info, content = addition.upload_info, addition.path_or_fileobj  # empty where it was sent as a large file
    if isinstance(content, str):
        return {info.sha256.hex()}
    return {info.sha256.hex(), hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()}
