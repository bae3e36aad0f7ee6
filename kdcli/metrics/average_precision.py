"""Average precision: how well scores rank the images that have a label before those that have not."""

import numpy as np
from jaxtyping import Bool, Float, Float64


def average_precisions(
    labels: Bool[np.ndarray, "m l"], scores: Float[np.ndarray, "m l"]
) -> Float64[np.ndarray, " l"]:
    """Average precision of each label; NaN where no image, or every one, has it: it ranks nothing."""
    from sklearn.metrics import average_precision_score

    some = np.asarray(labels.any(axis=0) & ~labels.all(axis=0))
    return np.array(
        [
            average_precision_score(labels[:, label], scores[:, label]) if some[label] else np.nan
            for label in range(labels.shape[1])
        ]
    )
