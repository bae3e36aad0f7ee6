"""Drawing views of a data set's images, the partner of a mixed view included."""

from collections.abc import Sequence
from typing import final

import numpy as np
from jaxtyping import Int64
from PIL import Image

from kdcli.data.joined import Images
from kdcli.data.mixing import NO_PARTNER, Pixels
from kdcli.data.views import Params, Render, ViewSet
from kdcli.errors import BadDataError

Partner = tuple[Image.Image, Params]
"""The image that a view is mixed with, and the parameters of that image's own view of the same number."""

Drawn = dict[Render, Pixels]
"""One view at every size and interpolation."""


@final
class Drawer:
    """Draws views at the input sizes of several models. Picklable.

    Args:
        data: the images.
        views: what their views are.
        renders: sizes and interpolations to draw.
        pool: rows that partners may come from.
        places: position in ``data`` of each row, -1 where it is not there; None: rows are positions.
    """

    def __init__(
        self,
        data: Images,
        views: ViewSet,
        renders: Sequence[Render],
        pool: range,
        places: Int64[np.ndarray, " n"] | None = None,
    ) -> None:
        self._data, self._views, self._renders = data, views, tuple(renders)
        self._pool, self._places = pool, places

    def params(self, position: int, image: Image.Image, view: int) -> Params:
        """Parameters of one view of the image at a position, without drawing it."""
        return self._views.params(self._data.keys[position], view, *image.size, self._pool)

    def draw(self, position: int, image: Image.Image, view: int) -> tuple[Params, Drawn]:
        """One view of the image at a position; a partner is decoded as well.

        Args:
            position: in the data.
            image: its upright RGB image.
            view: 0 or a training view.

        Returns:
            The parameters to record, and the pixels per size and interpolation.

        Raises:
            BadDataError: the partner cannot be decoded, or is not in the data.
        """
        params = self.params(position, image, view)
        row = int(self._views.partners(params))
        partner = None if row == NO_PARTNER else self._partner(position, row, view)
        return params, self.replay(image, params, partner)

    def replay(self, image: Image.Image, params: Params, partner: Partner | None) -> Drawn:
        """The view that ``params`` describe; ``partner`` where :meth:`ViewSet.partners` names one."""
        return {
            (size, interpolation): self._views.draw(image, params, size, interpolation, partner)
            for size, interpolation in self._renders
        }

    def _partner(self, position: int, row: int, view: int) -> Partner:
        place = row if self._places is None else int(self._places[row])
        if place < 0:
            raise BadDataError(
                f"{self._data.path(position)} is mixed with row {row}, which is not in the data",
                "Use the whole data set that partners come from, or a recipe that does not mix.",
            )
        try:
            image = self._data.image(place)
        except BadDataError as error:
            raise BadDataError(
                f"{self._data.path(position)} is mixed with a bad image: {error.message}", error.hint
            ) from error
        return image, self.params(place, image, view)
