"""Looking at every image of a data set, in decode processes."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, final

from torch.utils.data import DataLoader, Dataset

from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError, KdError
from kdcli.handing import Handing
from kdcli.runtime import worker_count
from kdcli.workers import Watched, worker_setup

Seen = TypeVar("Seen")
Look = Callable[[ImageData, int], Seen]
"""What is made of the image in a row; a module's function, or a partial of one, as it goes to other processes."""
BATCH = 64


def look_at_each(data: ImageData, look: Look[Seen], workers: int | None) -> Iterator[Seen | BadDataError]:
    """What ``look`` makes of every image, in order; for one that cannot be read, why.

    Args:
        data: the images.
        look: may raise BadDataError.
        workers: decode processes; None: one per processor but one.

    Raises:
        KdError: what ``look`` raised otherwise.
    """
    processes = worker_count(workers)
    loader: DataLoader[Seen | KdError] = DataLoader(
        Handing(_Looks(data, look)),
        batch_size=BATCH,
        num_workers=processes,
        worker_init_fn=worker_setup(processes),
        collate_fn=_as_list,
    )
    with console.progress(len(data), "images", str(data.spec)) as bar:
        for batch in Watched(loader):
            for each in batch:
                if isinstance(each, KdError) and not isinstance(each, BadDataError):
                    raise each
                yield each
            bar.advance(len(batch))


@final
class _Looks(Dataset[Seen], Generic[Seen]):
    """By row."""

    def __init__(self, data: ImageData, look: Look[Seen]) -> None:
        self._data, self._look = data, look

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> Seen:
        return self._look(self._data, row)


def _as_list(batch: list[Seen | KdError]) -> list[Seen | KdError]:
    return batch
