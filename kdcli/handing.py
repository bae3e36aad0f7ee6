"""Errors of decode processes, handed over whole."""

from typing import Any, TypeVar, final

from torch.utils.data import Dataset

from kdcli.errors import KdError

Item = TypeVar("Item")


@final
class Handing(Dataset[Item | KdError]):
    """A data set whose errors are items: torch makes one text of what a worker raises, without its hint and code.

    Args:
        items: the data set; it needs a length only where its loader draws an order.
    """

    def __init__(self, items: Dataset[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Item | KdError:
        try:
            return self._items[index]
        except KdError as error:
            return error
