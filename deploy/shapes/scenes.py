"""Drawn scenes: coloured shapes on a plain or noisy background, alone, as variations of each other, or as clips.

A scene is a value: everything that can be asked about it follows from its fields, and `render` draws it. Lengths are in
pixels of the picture as drawn, y points down, and the visual extent of every kind stays within 1.15 radii.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import numpy as np
from PIL import Image

from common.embedding import Grid
from common.geometry import smart_resize_grid

Colour = tuple[int, int, int]
Size = tuple[int, int]  # (width, height)
Form = Literal["image", "images", "frames", "video"]  # one picture; several; a clip as pictures; a clip as a video

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (250, 140, 20),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
KINDS: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")

# What the image processor of the checkpoint does with a size: 16 to 64 tokens for a picture.
PATCH_SIZE = 14
MERGE_SIZE = 2
MIN_PIXELS = 112 * 112
MAX_PIXELS = 224 * 224

MIN_SIDE, MAX_SIDE, MAX_ASPECT_RATIO = 56, 672, 3.0
MAX_SHAPES = 5
EXTENT = 1.15  # radii
MIN_RADIUS = 12.0  # pixels after the resize of the image processor
MAX_RADIUS = 0.26  # of the shorter side
MIN_CONTRAST = 85.0  # Euclidean distance in RGB between a shape and its background


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape. `radius` is the circle's; the other kinds are scaled to a similar area."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> tuple[str, str]:
        return self.colour, self.kind


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture. `noise` is the standard deviation of Gaussian noise in grey levels, drawn from `seed`."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    background: Colour = (128, 128, 128)
    noise: float = 0.0
    seed: int = 0


def scene_of(
    *shapes: tuple[str, float, float, float],
    width: int = 224,
    height: int = 224,
    background: Colour = (160, 160, 160),
    noise: float = 0.0,
) -> Scene:
    """A scene built by hand from ("red circle", x, y, radius): x and y as fractions of width and height, the radius
    as a fraction of the shorter side."""
    placed = []
    for name, x, y, radius in shapes:
        colour, kind = name.split()
        if colour not in COLOURS or kind not in KINDS:
            raise ValueError(f"{name!r} is not one of {list(COLOURS)} and one of {list(KINDS)}")
        placed.append(Shape(kind, colour, x * width, y * height, radius * min(width, height)))
    return Scene(width, height, tuple(placed), background, noise)


def grid_of(height: int, width: int) -> Grid:
    """The patch grid the image processor of the checkpoint gives a picture of this size."""
    return smart_resize_grid(
        height, width, patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
    )


def resize_scale(height: int, width: int) -> float:
    """Pixels after the resize for one pixel of the picture, along the side that shrinks more."""
    _, rows, columns = grid_of(height, width)
    return min(rows * PATCH_SIZE / height, columns * PATCH_SIZE / width)


def covers(kind: str, dx: Any, dy: Any) -> Any:
    """Whether a point is inside a shape, from its offset to the centre in radii; for numpy arrays and torch
    tensors alike."""
    if kind == "circle":
        return dx * dx + dy * dy < 1.0
    if kind == "square":
        return (abs(dx) < 0.85) & (abs(dy) < 0.85)
    if kind == "triangle":
        return (dy > -1.0) & (dy < 0.9) & (abs(dx) < 0.6 * (dy + 1.0))
    if kind == "diamond":
        return abs(dx) + abs(dy) < 1.15
    if kind == "cross":
        return ((abs(dx) < 0.4) & (abs(dy) < 1.0)) | ((abs(dy) < 0.4) & (abs(dx) < 1.0))
    raise ValueError(f"no shape of kind {kind!r}; the kinds are {KINDS}")


def render(scene: Scene) -> Image.Image:
    """The picture, RGB. The same scene gives the same pixels."""
    pixels = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    pixels[:] = scene.background
    for shape in scene.shapes:
        y = (np.arange(scene.height, dtype=np.float32)[:, None] + 0.5 - shape.y) / shape.radius
        x = (np.arange(scene.width, dtype=np.float32)[None, :] + 0.5 - shape.x) / shape.radius
        dx, dy = np.broadcast_arrays(x, y)
        pixels[covers(shape.kind, dx, dy)] = COLOURS[shape.colour]
    if scene.noise:
        pixels += np.random.default_rng(scene.seed).normal(0.0, scene.noise, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


# Sampling


def sample_size(rng: Random, max_side: int = MAX_SIDE) -> Size:
    """A size between MIN_SIDE and `max_side`, of any aspect ratio up to MAX_ASPECT_RATIO."""
    longer = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(max_side)))
    aspect = math.exp(rng.uniform(0.0, math.log(min(MAX_ASPECT_RATIO, longer / MIN_SIDE))))
    sides = min(round(longer), max_side), max(round(longer / aspect), MIN_SIDE)
    return sides if rng.random() < 0.5 else (sides[1], sides[0])


def sample_background(rng: Random) -> Colour:
    """A grey, often with a tint: on saturated backgrounds of every hue, kinds are learned many times more slowly."""
    grey = rng.randint(60, 225)
    tint = rng.choice((0, 0, 12, 24))
    red, green, blue = (round(grey + rng.uniform(-tint, tint)) for _ in range(3))
    return red, green, blue


def sample_noise(rng: Random) -> float:
    return 0.0 if rng.random() < 0.4 else rng.uniform(2.0, 15.0)


def visible_colours(background: Colour) -> list[str]:
    """The colours that stand out from this background; at least six of the eight for any background."""
    return [name for name, colour in COLOURS.items() if math.dist(colour, background) >= MIN_CONTRAST]


def sample_scene(
    rng: Random, width: int, height: int, *, num_shapes: int | None = None, max_shapes: int = MAX_SHAPES
) -> Scene:
    """Shapes that do not touch, each at least MIN_RADIUS after the resize and of a colour that stands out.

    A third of the scenes use few kinds and colours, so that high counts occur, and a third use every kind and colour at
    most once, so that many questions have one answer. Fewer than `num_shapes` fit into some narrow pictures.
    """
    background = sample_background(rng)
    colours = visible_colours(background)
    count = rng.randint(1, max_shapes) if num_shapes is None else num_shapes
    style = rng.random()
    if style < 0.33:
        kinds_of = rng.choices(rng.sample(KINDS, rng.choice((1, 2, 2, 3))), k=count)
        colours_of = rng.choices(rng.sample(colours, rng.choice((1, 2, 2, 3))), k=count)
    elif style < 0.66 and count <= len(KINDS):
        kinds_of, colours_of = rng.sample(KINDS, count), rng.sample(colours, count)
    else:
        kinds_of, colours_of = rng.choices(KINDS, k=count), rng.choices(colours, k=count)
    places = sample_places(rng, width, height, count)
    shapes = tuple(
        Shape(kind, colour, *place) for kind, colour, place in zip(kinds_of, colours_of, places, strict=False)
    )
    return Scene(width, height, shapes, background, sample_noise(rng), rng.getrandbits(32))


def radius_limits(width: int, height: int, count: int) -> tuple[float, float]:
    """The smallest and largest radius for one of `count` shapes."""
    smallest = MIN_RADIUS / resize_scale(height, width)
    largest = min(MAX_RADIUS * min(width, height), math.sqrt(0.4 * width * height / (max(count, 1) * math.pi)))
    return smallest, max(smallest, largest)


def sample_places(
    rng: Random, width: int, height: int, count: int, taken: Sequence[tuple[float, float, float]] = ()
) -> list[tuple[float, float, float]]:
    """Up to `count` circles (x, y, radius) inside the picture, apart from each other and from those `taken`."""
    smallest, largest = radius_limits(width, height, count)
    places = list(taken)
    for _ in range(count):
        for attempt in range(40):
            # Later attempts are smaller, so that a crowded picture is filled rather than given up.
            radius = smallest + (largest - smallest) * rng.random() * (1.0 - attempt / 40)
            margin = EXTENT * radius + 1.0
            x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
            if all(math.hypot(x - a, y - b) > 1.2 * (radius + c) for a, b, c in places):
                places.append((x, y, radius))
                break
    return places[len(taken) :]


def sample_variation(rng: Random, scene: Scene) -> Scene:
    """A scene that differs from this one in one shape: its colour, kind, place, or whether it is there at all."""
    shapes = list(scene.shapes)
    index = rng.randrange(len(shapes))
    shape = shapes[index]
    change = rng.choice(("colour", "kind", "place", "number"))
    if change == "colour":
        others = [colour for colour in visible_colours(scene.background) if colour != shape.colour]
        shapes[index] = replace(shape, colour=rng.choice(others))
    elif change == "kind":
        shapes[index] = replace(shape, kind=rng.choice([kind for kind in KINDS if kind != shape.kind]))
    else:
        rest = [(other.x, other.y, other.radius) for other in shapes if other is not shape]
        moved = sample_places(rng, scene.width, scene.height, 1, rest)
        far = 0.25 * min(scene.width, scene.height)
        if change == "number" and len(shapes) > 1 and rng.random() < 0.5:
            del shapes[index]
        elif change == "number" and len(shapes) < MAX_SHAPES:
            added = sample_places(rng, scene.width, scene.height, 1, [*rest, (shape.x, shape.y, shape.radius)])
            colour = rng.choice(visible_colours(scene.background))
            shapes.extend(Shape(rng.choice(KINDS), colour, *place) for place in added)
        elif moved and math.hypot(moved[0][0] - shape.x, moved[0][1] - shape.y) > far:
            shapes[index] = replace(shape, x=moved[0][0], y=moved[0][1])
    if tuple(shapes) == scene.shapes:  # nothing fitted
        return sample_variation(rng, scene)
    return replace(scene, shapes=tuple(shapes))


def sample_images(rng: Random, sizes: Sequence[Size], max_shapes: int = MAX_SHAPES) -> tuple[Scene, ...]:
    """Pictures of these sizes: about half of the time unrelated, else (if the sizes are equal) the same scene, often
    with a variation of it in one place. Noise differs between all of them."""
    if len(set(sizes)) > 1 or rng.random() < 0.5:
        return tuple(sample_scene(rng, *size, max_shapes=max_shapes) for size in sizes)
    scene = sample_scene(rng, *sizes[0], max_shapes=min(max_shapes, MAX_SHAPES - 1))
    pictures = [replace(scene, seed=rng.getrandbits(32)) for _ in sizes]
    if rng.random() < 0.5:
        index = rng.randrange(len(pictures))
        pictures[index] = sample_variation(rng, pictures[index])
    return tuple(pictures)


def sample_clip(rng: Random, width: int, height: int, num_frames: int) -> tuple[Scene, ...]:
    """Frames in which either shapes appear one after the other, or one shape moves. No two shapes share a name.

    The last shape appears at least two frames after the one before it. A moving shape crosses at least 40 % of the
    picture in a straight line.
    """
    background = sample_background(rng)
    noise = sample_noise(rng)
    names = [(colour, kind) for colour in visible_colours(background) for kind in KINDS]
    frames = appearing_shapes if rng.random() < 0.5 else moving_shape
    shapes_at = frames(rng, width, height, num_frames, rng.sample(names, 4))
    return tuple(Scene(width, height, shapes, background, noise, rng.getrandbits(32)) for shapes in shapes_at)


def appearing_shapes(
    rng: Random, width: int, height: int, num_frames: int, names: Sequence[tuple[str, str]]
) -> list[tuple[Shape, ...]]:
    places = sample_places(rng, width, height, rng.randint(2, 4))
    shapes = [Shape(kind, colour, *place) for (colour, kind), place in zip(names, places, strict=False)]
    last = rng.randint(2, num_frames - 1)
    earlier = sorted(rng.randint(0, last - 2) for _ in shapes[1:])
    starts = [0, *earlier[1:], last] if earlier else [last]
    return [
        tuple(shape for shape, start in zip(shapes, starts, strict=True) if start <= frame)
        for frame in range(num_frames)
    ]


def moving_shape(
    rng: Random, width: int, height: int, num_frames: int, names: Sequence[tuple[str, str]]
) -> list[tuple[Shape, ...]]:
    smallest, largest = radius_limits(width, height, 3)
    radius = rng.uniform(smallest, max(smallest, min(largest, 0.2 * min(width, height))))
    margin = EXTENT * radius + 1.0
    horizontal = rng.random() < 0.5
    length, breadth = (width, height) if horizontal else (height, width)
    travel = min(rng.uniform(0.4, 0.75) * length, length - 2 * margin)
    start = rng.uniform(margin, length - margin - travel)
    across = rng.uniform(margin, breadth - margin)
    ends = (start, start + travel) if rng.random() < 0.5 else (start + travel, start)
    path = [ends[0] + (ends[1] - ends[0]) * frame / (num_frames - 1) for frame in range(num_frames)]
    track = [(along, across, radius) if horizontal else (across, along, radius) for along in path]
    (mover_colour, mover_kind), *other_names = names
    places = sample_places(rng, width, height, rng.randint(0, 2), track)
    others = [Shape(kind, colour, *place) for (colour, kind), place in zip(other_names, places, strict=False)]
    return [(Shape(mover_kind, mover_colour, *place), *others) for place in track]
