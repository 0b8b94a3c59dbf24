"""How long the images that a replica holds will keep it busy, predicted from what the last ones took."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

_MEMORY = 0.95  # what is left of an observation when the next one comes


class ImageCost:
    """Seconds of an image by its tokens, of which the last few dozen images are remembered.

    Full attention makes a token cost more the more there are of it: seconds per token are `a + b * tokens`, the line of
    least squares through the observations.
    """

    def __init__(self) -> None:
        self._moments = np.zeros(5)  # of weight, tokens, seconds per token, tokens squared, and tokens times seconds

    def note(self, num_tokens: int, seconds: float) -> None:
        per_token = seconds / num_tokens
        observed = np.array([1.0, num_tokens, per_token, num_tokens**2, num_tokens * per_token])
        self._moments = _MEMORY * self._moments + observed

    def predict(self, num_tokens: int) -> float:
        """0 until something was observed."""
        if not self._moments[0]:
            return 0.0
        tokens, per_token, squared, product = self._moments[1:] / self._moments[0]
        variance = squared - tokens**2
        slope = (product - tokens * per_token) / variance if variance > 1e-6 * squared else 0.0
        slope = min(max(slope, 0.0), per_token / tokens)  # neither part of the cost is below 0
        return float(num_tokens * (per_token + slope * (num_tokens - tokens)))


class Stage:
    """One part of the way of an image, with as many `workers`: what waits for it or is in it."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._cost = ImageCost()
        self._images: Counter[int] = Counter()  # by their tokens

    @property
    def num_images(self) -> int:
        return self._images.total()

    @property
    def seconds(self) -> float:
        """Until all of it is done."""
        predicted = (count * self._cost.predict(num_tokens) for num_tokens, count in self._images.items())
        return sum(predicted) / self._workers

    @contextlib.contextmanager
    def holding(self, num_tokens: int) -> Iterator[None]:
        """An image from when it is accepted until it is done or its callers have left."""
        self._images[num_tokens] += 1
        try:
            yield
        finally:
            self._images[num_tokens] -= 1
            if not self._images[num_tokens]:
                del self._images[num_tokens]

    def note(self, num_tokens: int, seconds: float) -> None:
        """What one image has taken."""
        self._cost.note(num_tokens, seconds)
