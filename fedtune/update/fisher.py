"""An update and how much each of its values matters, as two halves of which sums can be taken.

Fisher merging (Matena and Raffel 2022, arXiv 2111.09832, equation 4; for federations FedNano, arXiv
2506.14824) is θ = Σ F_k θ_k / Σ F_k, value by value, F_k being the diagonal of client k's Fisher
information. A client sends F_k·Δ_k and behind it F_k; of both the server needs only the sum.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import TrainingError
from fedtune.types import Float32Vector

CAP = 100.0  # times the mean
# Both halves together must not be longer than one clip, see `fedtune.round.terms.fisher_scale`.
_HALVES = math.sqrt(2)


def weigh(
    update: Float32Vector, fisher: Float32Vector, damping: float, scale: float
) -> Float32Vector:
    """[w·`update`; `scale`·w], float32 `[2n]`, w being `weights` / √2.

    `update` and `fisher` are float32 `[n]`. Raises `TrainingError` if `fisher` is not finite.
    """
    found = weights(fisher, damping) / _HALVES
    return np.concatenate([found * update, scale * found]).astype(np.float32)


def weights(fisher: Float32Vector, damping: float) -> NDArray[np.float64]:
    """What a client's values weigh, float64 `[n]`: of no unit, and of mean square 1 at most.

    Each of `fisher` (float32 `[n]`), `CAP` means at most and by its root mean square r, is drawn
    towards 1: (1 - `damping`)·F/r + `damping`. Where it is 0 so is the weight. Raises
    `TrainingError` if `fisher` is not finite.
    """
    if not np.isfinite(fisher).all():
        raise TrainingError("the Fisher information has values that are not finite; lower train.lr")
    # A gradient that is exactly 0 in every step is of a value that this client's rows do not
    # touch, as an image adapter's where all rows are texts. It has no opinion there, and does
    # not hold back those who have. Means are over the others, so that the number of values it
    # does not touch makes no difference to what it says of those it does.
    touched = fisher > 0
    found = np.zeros(fisher.shape)
    if not touched.any():
        return found
    # By its own size: gradients grow with the loss, and whose loss is high is not more right.
    relative = fisher[touched].astype(np.float64)
    # Half of all values have less than a tenth of the mean, and single ones a thousand times as
    # much, which alone would decide r, and so how much this client says of all the others.
    relative = np.minimum(relative / relative.mean(), CAP)
    relative /= math.sqrt(float(np.mean(relative**2)))
    # As r is at least the mean, the mean square of this is at most 1.
    found[touched] = (1 - damping) * relative + damping
    return found
