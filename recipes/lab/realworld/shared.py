"""What the studies share: images, the generalists, and how every network is shown and trained."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, final

from kdcli.files import atomic_write_text
from lab.realworld.data import Images
from lab.steps import Lab, Step, words


@final
@dataclass(frozen=True, slots=True)
class Room:
    """The lab of one form.

    Attributes:
        lab: settings, and the folder of all that is made.
        images: data strings.
        tiny: whether images are drawn and networks have a few layers.
    """

    lab: Lab
    images: Images
    tiny: bool

    @property
    def settings(self) -> Any:
        """The numbers."""
        return self.lab.settings

    def architecture(self, network: str) -> str:
        """Of timm, by the name in the setting ``networks``."""
        return str(self.settings["networks"][network])

    def start(self, network: str = "lite0") -> str:
        """Model string of a network with its ImageNet weights (``--tiny``: trained for an epoch on drawn images).

        In studies of clips it is shown their frames.
        """
        folder = self.lab.out / "weights" / network
        opened = f"local-dir:{folder / 'export' if self.tiny else folder}"
        if self.images.worlds is None:
            return opened
        side = self.settings["image_size"]
        return f"frames:{opened}[size={self.settings['frames']}x{side}x{side}]"

    def run(self, name: str) -> Path:
        """Folder of a student."""
        return self.lab.out / "runs" / name

    def export(self, name: str) -> str:
        """Model string of a student that a step trains."""
        return f"local-dir:{self.run(name)}/export"

    def cache(self, name: str) -> Path:
        """Folder of a cache."""
        return self.lab.out / "caches" / f"{name}.kd"

    def generalists(self) -> Iterator[Step]:
        """The steps that write ``weights/NETWORK``."""
        side = self.settings["image_size"]
        for network, architecture in self.settings["networks"].items():
            folder = self.lab.out / "weights" / network
            yield Step(
                f"weights/{network}",
                words("train-student", self.images.icons("train"), method="labels-only", student=architecture,
                      init="random", image_size=side, epochs=1, out=folder)
                if self.tiny
                else words("demo", export_weights=folder, image_size=side, network=network),
                data=("icons",) if self.tiny else (),
            )  # fmt: skip

    def union(self, name: str, scripts: Sequence[str], split: str, *more: str) -> str:
        """Letters of several scripts as one data set, ``glyphs-NAME``, each letter a class of its own."""
        folder = self.images.folder
        sources = [folder / f"glyphs-{script}.csv" for script in scripts] if folder is not None else []
        if folder is not None and all(map(Path.exists, sources)):  # else what needs letters is left out
            rows: list[list[str]] = []
            for source in sources:
                with source.open(newline="", encoding="utf-8") as file:
                    head, *own = csv.reader(file)
                rows += own
            text = StringIO()
            csv.writer(text, lineterminator="\n").writerows([head, *rows])
            write_changed(folder / f"glyphs-{name}.csv", text.getvalue())
        return self.images.glyphs(name, split, *more)


def write_changed(path: Path, text: str) -> None:
    """Write a table unless it is there as it is."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        atomic_write_text(path, text)
