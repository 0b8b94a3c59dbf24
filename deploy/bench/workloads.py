"""What `fovea bench serving` asks: pictures, text and answer lengths, drawn from a seed.

`production` has the marginal distributions that ServeGen published for 35 Qwen-VL clients (alibaba/ServeGen,
mm-image); they are drawn independently of each other.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

PIXELS_PER_TOKEN = 28 * 28  # of Qwen2-VL and Qwen2.5-VL
PRODUCTION_CV = 2.2  # of the time between two requests; a Poisson process has 1

_WORDS = (
    "red",
    "blue",
    "the",
    "is",
    "left",
    "of",
    "and",
    "two",
    "big",
    "on",
    "a",
    "square",
    "circle",
    "it",
    "why",
    "how",
)
_IMAGES = {1: 0.80, 2: 0.07, 3: 0.05, 4: 0.04, 6: 0.02, 9: 0.02}
# quantile -> value, between which the logarithm is linear; the ends are not published but the largest picture
_IMAGE_TOKENS = {0: 64, 0.25: 234, 0.5: 540, 0.75: 1196, 0.9: 1224, 1: 1280}
_TEXT_TOKENS = {0: 8, 0.5: 106, 0.75: 1032, 0.95: 2346, 1: 4096}
_OUTPUT_TOKENS = {0: 4, 0.5: 100, 0.75: 185, 0.9: 264, 0.99: 587, 1: 1024}


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: JPEG pictures, the text after them, and how long the answer may be."""

    images: tuple[bytes, ...]
    text: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of all workloads but `production`, of which `scale` multiplies the lengths of text and answers."""

    width: int
    height: int
    text_tokens: int
    output_tokens: int
    questions_per_image: int
    scale: float


Workload = Callable[[Generator, int, Shape], list[Sample]]


def repeated(random: Generator, count: int, shape: Shape) -> list[Sample]:
    """Several questions about each picture, in an order that is shuffled."""
    num_pictures = -(-count // shape.questions_per_image)
    pictures = [picture(random, shape.width, shape.height) for _ in range(num_pictures)]
    order = random.permutation(num_pictures * shape.questions_per_image)[:count] % num_pictures
    return [Sample((pictures[index],), text(random, shape.text_tokens), shape.output_tokens) for index in order]


def new(random: Generator, count: int, shape: Shape) -> list[Sample]:
    """One question about each picture, so that every one is encoded."""
    return [
        Sample((picture(random, shape.width, shape.height),), text(random, shape.text_tokens), shape.output_tokens)
        for _ in range(count)
    ]


def text_only(random: Generator, count: int, shape: Shape) -> list[Sample]:
    """No pictures."""
    return [Sample((), text(random, shape.text_tokens), shape.output_tokens) for _ in range(count)]


def production(random: Generator, count: int, shape: Shape) -> list[Sample]:
    """Numbers and sizes of pictures, lengths of text and answers as measured at Qwen-VL's clients."""
    return [_production(random, shape.scale) for _ in range(count)]


WORKLOADS: dict[str, Workload] = {"repeated": repeated, "new": new, "production": production, "text": text_only}


def probe(random: Generator) -> Sample:
    """The smallest request: a few words in, one token out."""
    return Sample((), text(random, 8), 1)


def picture(random: Generator, width: int, height: int) -> bytes:
    """A smooth JPEG that no other one equals; noise would compress as no photograph does."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def text(random: Generator, num_tokens: int) -> str:
    """Short common words, each about one token in most vocabularies; what it really was is in `usage`."""
    return " ".join(random.choice(_WORDS, num_tokens))


def _production(random: Generator, scale: float) -> Sample:
    num_images = random.choice(list(_IMAGES), p=list(_IMAGES.values()))
    sides = [round((_at_quantile(random, _IMAGE_TOKENS) * PIXELS_PER_TOKEN) ** 0.5) for _ in range(num_images)]
    text_tokens = max(1, round(scale * _at_quantile(random, _TEXT_TOKENS)))
    output_tokens = max(1, round(scale * _at_quantile(random, _OUTPUT_TOKENS)))
    return Sample(tuple(picture(random, side, side) for side in sides), text(random, text_tokens), output_tokens)


def _at_quantile(random: Generator, quantiles: dict[float, int]) -> float:
    return float(np.exp(np.interp(random.random(), list(quantiles), np.log(list(quantiles.values())))))


def arrival_times(random: Generator, count: int, rate: float, cv: float) -> Sequence[float]:
    """Seconds from the start: gaps of a Gamma distribution with this mean rate and coefficient of variation."""
    shape = 1 / cv**2
    gaps = random.gamma(shape, 1 / (rate * shape), count)
    gaps[0] = 0
    return [float(at) for at in np.cumsum(gaps)]
