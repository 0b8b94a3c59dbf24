"""Questions about pictures with their answers, in English and Chinese.

A variant is one way to ask within a category: it looks at the pictures and drafts a question that has one right answer,
or none if the pictures allow none. The phrasings of a draft are templates of its language. Near ties (two shapes almost
level, almost equally big) are not asked about.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

from deploy.shapes.scenes import COLOURS, KINDS, MAX_SHAPES, Form, Scene, Shape, resize_scale

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

SIZE_RATIO = 1.5  # between the radii of two shapes whose sizes are compared
MAX_DESCRIBED = 4


@dataclass(frozen=True, slots=True)
class Question:
    """`candidates` are the answers that the words of the question allow; empty if there are too many to list."""

    category: str
    variant: str
    language: Language
    text: str
    answer: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a variant decided: the words for the gaps of its templates, the answer and what else it could have been.

    `phrasing` names the templates where they are not those of the variant.
    """

    words: Mapping[str, str]
    answer: str
    candidates: tuple[str, ...]
    phrasing: str | None = None


@dataclass(frozen=True)
class Lexicon:
    """The words of one language. `templates` and `answers` are keyed by variant, respectively by meaning."""

    colours: Mapping[str, str]
    kinds: Mapping[str, str]
    plurals: Mapping[str, str]
    numbers: tuple[str, ...]
    ordinals: tuple[str, ...]
    anything: str
    any_shape: str  # with a gap for a colour
    any_shapes: str
    named: str  # with gaps for colour and kind
    one_of: str
    separator: str
    answers: Mapping[str, str]
    templates: Mapping[str, tuple[str, ...]]

    def name(self, name: tuple[str, str]) -> str:
        colour, kind = name
        return self.named.format(colour=self.colours[colour], kind=self.kinds[kind])

    def article(self, noun: str) -> str:
        """The noun as "a ..." (English), or as it is (Chinese counts it only in descriptions)."""
        if self is not LEXICONS["en"]:
            return noun
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

    def all_names(self) -> tuple[str, ...]:
        return tuple(self.name((colour, kind)) for colour in COLOURS for kind in KINDS)


ENGLISH = Lexicon(
    colours={colour: colour for colour in COLOURS},
    kinds={kind: kind for kind in KINDS},
    plurals={
        "circle": "circles",
        "square": "squares",
        "triangle": "triangles",
        "diamond": "diamonds",
        "cross": "crosses",
    },
    numbers=("zero", "one", "two", "three", "four", "five", "six"),
    ordinals=("first", "second", "third"),
    anything="shapes",
    any_shape="{colour} shape",
    any_shapes="{colour} shapes",
    named="{colour} {kind}",
    one_of="{name}",
    separator=", ",
    answers={
        **{word: word for word in ("yes", "no", "left", "right", "above", "below", "top", "bottom", "up", "down")},
        **{word: word for word in ("top left", "top right", "bottom left", "bottom right")},
        "is": "yes",
        "is not": "no",
        "same": "yes",
        "different": "no",
        **{f"{ordinal} image": f"the {ordinal}" for ordinal in ("first", "second", "third")},
        **{f"move {way}": way for way in ("left", "right", "up", "down")},
    },
    templates={
        "colour": (
            "What colour is the {kind}?",
            "What color is the {kind}?",
            "Which colour is the {kind}?",
            "Which color is the {kind}?",
            "What is the colour of the {kind}?",
            "What is the color of the {kind}?",
            "What colour does the {kind} have?",
        ),
        "shape": (
            "What shape is {colour}?",
            "What is the shape of the {colour} object?",
            "Which shape is {colour}?",
            "What shape is the {colour} object?",
            "What is the {colour} shape?",
            "What shape is the {colour} one?",
        ),
        "count": (
            "How many {nouns} are there?",
            "How many {nouns} do you see?",
            "How many {nouns} are in the picture?",
            "How many {nouns} are there in the image?",
            "How many {nouns} are in this image?",
            "Count the {nouns}.",
        ),
        "exists": (
            "Is there {a_noun}?",
            "Is there {a_noun} in the picture?",
            "Is there {a_noun} in the image?",
            "Do you see {a_noun}?",
            "Does the picture have {a_noun}?",
            "Can you see {a_noun}?",
        ),
        "where_horizontal": (
            "Is the {a} to the left or to the right of the {b}?",
            "Is the {a} left or right of the {b}?",
            "Is the {a} on the left or the right of the {b}?",
            "Which side of the {b} is the {a} on, left or right?",
        ),
        "where_vertical": (
            "Is the {a} above or below the {b}?",
            "Is the {a} below or above the {b}?",
            "Is the {a} higher or lower than the {b}, above or below?",
        ),
        "where_half_horizontal": (
            "Is the {a} on the left or on the right?",
            "Is the {a} on the left or the right side of the picture?",
            "Is the {a} in the left half or the right half?",
            "Is the {a} on the left or on the right of the image?",
        ),
        "where_half_vertical": (
            "Is the {a} at the top or at the bottom?",
            "Is the {a} at the top or the bottom of the picture?",
            "Is the {a} in the top half or the bottom half?",
            "Is the {a} at the top or at the bottom of the image?",
        ),
        "where_corner": (
            "Where is the {a}?",
            "Where in the picture is the {a}?",
            "Where is the {a} in the image?",
            "Where do you see the {a}?",
        ),
        "size_bigger": (
            "Which is bigger, the {a} or the {b}?",
            "Which is larger, the {a} or the {b}?",
            "Which one is bigger, the {a} or the {b}?",
            "What is bigger, the {a} or the {b}?",
        ),
        "size_smaller": (
            "Which is smaller, the {a} or the {b}?",
            "Which one is smaller, the {a} or the {b}?",
            "What is smaller, the {a} or the {b}?",
        ),
        "size_is_bigger": (
            "Is the {a} bigger than the {b}?",
            "Is the {a} larger than the {b}?",
        ),
        "size_is_smaller": ("Is the {a} smaller than the {b}?",),
        "describe": (
            "Describe the picture.",
            "Describe the picture from left to right.",
            "Describe the image.",
            "Describe this image.",
            "What is in the picture?",
            "What is in the image?",
            "What is in this image?",
            "What do you see?",
            "List the shapes from left to right.",
        ),
        "compare_more": (
            "Which image has more {nouns}?",
            "Which picture has more {nouns}?",
            "Which image has the most {nouns}?",
            "Which image contains more {nouns}?",
        ),
        "compare_fewer": (
            "Which image has fewer {nouns}?",
            "Which picture has fewer {nouns}?",
            "Which image has the fewest {nouns}?",
        ),
        "compare_has": (
            "Which image has {a_noun}?",
            "Which picture has {a_noun}?",
            "Which image shows {a_noun}?",
            "Which image contains {a_noun}?",
        ),
        "same": (
            "Are the images the same?",
            "Are they the same?",
            "Are the pictures the same?",
            "Are these images identical?",
            "Do the images show the same?",
        ),
        "same_two": ("Are the two images the same?", "Are the two pictures the same?", "Are both images the same?"),
        "same_three": ("Are the three images the same?", "Are all the images the same?"),
        "indexed_colour": (
            "What colour is the {kind} in the {ordinal} image?",
            "What color is the {kind} in the {ordinal} image?",
            "In the {ordinal} image, what colour is the {kind}?",
        ),
        "indexed_shape": (
            "What shape is {colour} in the {ordinal} image?",
            "What shape is the {colour} object in the {ordinal} image?",
            "In the {ordinal} image, what shape is {colour}?",
        ),
        "indexed_count": (
            "How many {nouns} are there in the {ordinal} image?",
            "How many {nouns} are in the {ordinal} image?",
            "In the {ordinal} image, how many {nouns} are there?",
        ),
        "indexed_exists": (
            "Is there {a_noun} in the {ordinal} image?",
            "Does the {ordinal} image have {a_noun}?",
            "In the {ordinal} image, is there {a_noun}?",
        ),
        "appeared": (
            "What appeared last?",
            "Which shape appeared last?",
            "What appears last?",
            "What shape appears last?",
            "What came last?",
        ),
        "motion_way": (
            "Which way does the {a} move?",
            "In which direction does the {a} move?",
            "Where does the {a} move?",
            "In what direction is the {a} moving?",
        ),
        "motion_it": (
            "Which way does it move?",
            "In which direction does it move?",
            "Which way does the shape move?",
            "In what direction is it moving?",
        ),
        "motion_what": ("What moves?", "Which shape moves?", "What is moving?", "Which shape is moving?"),
    },
)

CHINESE = Lexicon(
    colours=dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "黑色", "白色"), strict=True)),
    kinds=dict(zip(KINDS, ("圆形", "正方形", "三角形", "菱形", "十字形"), strict=True)),
    plurals=dict(zip(KINDS, ("圆形", "正方形", "三角形", "菱形", "十字形"), strict=True)),
    numbers=("零个", "一个", "两个", "三个", "四个", "五个", "六个"),
    ordinals=("第一张", "第二张", "第三张"),
    anything="图形",
    any_shape="{colour}的图形",
    any_shapes="{colour}的图形",
    named="{colour}{kind}",
    one_of="一个{name}",
    separator="，",
    answers={
        "yes": "有",
        "no": "没有",
        "is": "是",
        "is not": "不是",
        "same": "一样",
        "different": "不一样",
        "left": "左边",
        "right": "右边",
        "above": "上面",
        "below": "下面",
        "top": "上面",
        "bottom": "下面",
        "top left": "左上",
        "top right": "右上",
        "bottom left": "左下",
        "bottom right": "右下",
        "first image": "第一张",
        "second image": "第二张",
        "third image": "第三张",
        "move left": "向左",
        "move right": "向右",
        "move up": "向上",
        "move down": "向下",
    },
    templates={
        "colour": (
            "{kind}是什么颜色？",
            "{kind}是什么颜色的？",
            "图中的{kind}是什么颜色？",
            "图片里的{kind}是什么颜色？",
            "请问{kind}是什么颜色？",
            "{kind}的颜色是什么？",
        ),
        "shape": (
            "{colour}的图形是什么形状？",
            "{colour}的是什么形状？",
            "图中{colour}的是什么形状？",
            "图片里{colour}的图形是什么形状？",
            "什么形状是{colour}的？",
        ),
        "count": (
            "有几个{nouns}？",
            "一共有几个{nouns}？",
            "图中有几个{nouns}？",
            "图片里有几个{nouns}？",
            "有多少个{nouns}？",
            "图中有多少个{nouns}？",
        ),
        "exists": (
            "有{a_noun}吗？",
            "图中有{a_noun}吗？",
            "图片里有{a_noun}吗？",
            "有没有{a_noun}？",
            "图中有没有{a_noun}？",
        ),
        "where_horizontal": (
            "{a}在{b}的左边还是右边？",
            "{a}是在{b}的左边还是右边？",
            "{a}在{b}的哪一边，左边还是右边？",
        ),
        "where_vertical": ("{a}在{b}的上面还是下面？", "{a}是在{b}的上面还是下面？"),
        "where_half_horizontal": (
            "{a}在图片的左边还是右边？",
            "{a}在左边还是右边？",
            "图中的{a}在左边还是右边？",
        ),
        "where_half_vertical": (
            "{a}在图片的上面还是下面？",
            "{a}在上面还是下面？",
            "图中的{a}在上面还是下面？",
        ),
        "where_corner": ("{a}在哪里？", "{a}在图片的哪里？", "{a}在什么位置？", "图中的{a}在哪里？"),
        "size_bigger": ("{a}和{b}哪个大？", "{a}和{b}哪个更大？", "{a}和{b}，哪个更大？"),
        "size_smaller": ("{a}和{b}哪个小？", "{a}和{b}哪个更小？"),
        "size_is_bigger": ("{a}比{b}大吗？", "{a}是不是比{b}大？"),
        "size_is_smaller": ("{a}比{b}小吗？", "{a}是不是比{b}小？"),
        "describe": (
            "描述这张图片。",
            "描述图片。",
            "请描述这张图片。",
            "从左到右描述图片。",
            "图片里有什么？",
            "图中有什么？",
            "你看到了什么？",
        ),
        "compare_more": ("哪张图片的{nouns}更多？", "哪张图的{nouns}更多？", "哪张图片的{nouns}最多？"),
        "compare_fewer": ("哪张图片的{nouns}更少？", "哪张图的{nouns}更少？", "哪张图片的{nouns}最少？"),
        "compare_has": ("哪张图片有{a_noun}？", "哪张图里有{a_noun}？", "哪张图中有{a_noun}？"),
        "same": ("图片一样吗？", "它们一样吗？", "这些图片一样吗？", "图片是不是一样？"),
        "same_two": ("两张图片一样吗？", "这两张图片一样吗？"),
        "same_three": ("三张图片一样吗？", "这三张图片一样吗？"),
        "indexed_colour": ("{ordinal}图片里的{kind}是什么颜色？", "{ordinal}图中的{kind}是什么颜色？"),
        "indexed_shape": ("{ordinal}图片里{colour}的图形是什么形状？", "{ordinal}图中{colour}的是什么形状？"),
        "indexed_count": ("{ordinal}图片里有几个{nouns}？", "{ordinal}图中有多少个{nouns}？"),
        "indexed_exists": ("{ordinal}图片里有{a_noun}吗？", "{ordinal}图中有没有{a_noun}？"),
        "appeared": ("最后出现的是什么？", "最后出现了什么？", "什么最后出现？", "最后出现的是什么图形？"),
        "motion_way": ("{a}往哪边移动？", "{a}向哪个方向移动？", "{a}在往哪边移动？"),
        "motion_it": ("它往哪边移动？", "它向哪个方向移动？", "图形往哪边移动？"),
        "motion_what": ("什么在移动？", "哪个图形在移动？", "移动的是什么？"),
    },
)

LEXICONS: Mapping[Language, Lexicon] = {"en": ENGLISH, "zh": CHINESE}
Pictures = Sequence[Scene]
Variant = Callable[[Random, Pictures, Lexicon], Draft | None]


# Helpers that several variants share


def unique_names(scene: Scene) -> list[Shape]:
    """The shapes that colour and kind together single out."""
    times = Counter(shape.name for shape in scene.shapes)
    return [shape for shape in scene.shapes if times[shape.name] == 1]


def reference(rng: Random, scene: Scene, shape: Shape, words: Lexicon) -> str:
    """Words that single out a shape with a unique name: mostly the name, the kind or the colour where they suffice."""
    choice = rng.random()
    if choice < 0.25 and sum(other.kind == shape.kind for other in scene.shapes) == 1:
        return words.kinds[shape.kind]
    if choice > 0.9 and sum(other.colour == shape.colour for other in scene.shapes) == 1:
        return words.any_shape.format(colour=words.colours[shape.colour])
    return words.name(shape.name)


def margins(scene: Scene) -> tuple[float, float]:
    """How far two places must be apart to be told apart, (x, y) in pixels of the picture."""
    visible = 14.0 / resize_scale(scene.height, scene.width)
    return max(visible, 0.1 * scene.width), max(visible, 0.1 * scene.height)


def choose_by_number(rng: Random, counts: Mapping[str, int]) -> str:
    """A key whose number is chosen evenly among the numbers that occur."""
    number = rng.choice(sorted(set(counts.values())))
    return rng.choice([key for key, count in counts.items() if count == number])


def count_kinds(scene: Scene) -> dict[str, int]:
    return {kind: sum(shape.kind == kind for shape in scene.shapes) for kind in KINDS}


def count_colours(scene: Scene) -> dict[str, int]:
    return {colour: sum(shape.colour == colour for shape in scene.shapes) for colour in COLOURS}


def answers(words: Lexicon, *meanings: str) -> tuple[str, ...]:
    return tuple(words.answers[meaning] for meaning in meanings)


def draft_choice(
    words: Lexicon, gaps: Mapping[str, str], meanings: tuple[str, ...], index: int, phrasing: str | None = None
) -> Draft:
    """A draft whose answer is one of a few fixed meanings."""
    return Draft(gaps, words.answers[meanings[index]], answers(words, *meanings), phrasing)


# One picture


def ask_colour(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    times = count_kinds(pictures[0])
    single = [shape for shape in pictures[0].shapes if times[shape.kind] == 1]
    if not single:
        return None
    shape = rng.choice(single)
    return Draft({"kind": words.kinds[shape.kind]}, words.colours[shape.colour], tuple(words.colours.values()))


def ask_shape(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    times = count_colours(pictures[0])
    single = [shape for shape in pictures[0].shapes if times[shape.colour] == 1]
    if not single:
        return None
    shape = rng.choice(single)
    return Draft({"colour": words.colours[shape.colour]}, words.kinds[shape.kind], tuple(words.kinds.values()))


def ask_count_all(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    number = len(pictures[0].shapes)
    return Draft({"nouns": words.anything}, words.numbers[number], words.numbers[1 : MAX_SHAPES + 1], "count")


def ask_count_kind(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    counts = count_kinds(pictures[0])
    kind = choose_by_number(rng, counts)
    return Draft({"nouns": words.plurals[kind]}, words.numbers[counts[kind]], words.numbers[: MAX_SHAPES + 1], "count")


def ask_count_colour(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    counts = count_colours(pictures[0])
    colour = choose_by_number(rng, counts)
    nouns = words.any_shapes.format(colour=words.colours[colour])
    return Draft({"nouns": nouns}, words.numbers[counts[colour]], words.numbers[: MAX_SHAPES + 1], "count")


def ask_exists_name(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    """Half of the shapes asked for are there; most of the others share colour or kind with one that is."""
    present = {shape.name for shape in pictures[0].shapes}
    colour, kind = rng.choice(sorted(present))
    if rng.random() < 0.5:
        change = rng.random()
        if change < 0.7:
            colour = rng.choice(list(COLOURS))
        if change > 0.4:
            kind = rng.choice(KINDS)
        if (colour, kind) in present:
            return None
    a_noun = words.article(words.name((colour, kind)))
    return draft_choice(words, {"a_noun": a_noun}, ("yes", "no"), int((colour, kind) not in present), "exists")


def ask_exists_kind(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    counts = count_kinds(pictures[0])
    wanted = rng.random() < 0.5
    kinds = [kind for kind, count in counts.items() if (count > 0) == wanted]
    if not kinds:
        return None
    a_noun = words.article(words.kinds[rng.choice(kinds)])
    return draft_choice(words, {"a_noun": a_noun}, ("yes", "no"), int(not wanted), "exists")


def ask_exists_colour(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    counts = count_colours(pictures[0])
    wanted = rng.random() < 0.5
    colours = [colour for colour, count in counts.items() if (count > 0) == wanted]
    a_noun = words.article(words.any_shape.format(colour=words.colours[rng.choice(colours)]))
    return draft_choice(words, {"a_noun": a_noun}, ("yes", "no"), int(not wanted), "exists")


def two_named(rng: Random, scene: Scene) -> tuple[Shape, Shape] | None:
    named = unique_names(scene)
    if len(named) < 2:
        return None
    first, second = rng.sample(named, 2)
    return first, second


def ask_where_horizontal(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    pair = two_named(rng, pictures[0])
    if pair is None or abs(pair[0].x - pair[1].x) < margins(pictures[0])[0]:
        return None
    gaps = {gap: reference(rng, pictures[0], shape, words) for gap, shape in zip("ab", pair, strict=True)}
    return draft_choice(words, gaps, ("left", "right"), int(pair[0].x > pair[1].x))


def ask_where_vertical(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    pair = two_named(rng, pictures[0])
    if pair is None or abs(pair[0].y - pair[1].y) < margins(pictures[0])[1]:
        return None
    gaps = {gap: reference(rng, pictures[0], shape, words) for gap, shape in zip("ab", pair, strict=True)}
    return draft_choice(words, gaps, ("above", "below"), int(pair[0].y > pair[1].y))


def off_centre(rng: Random, scene: Scene, *, in_x: bool, in_y: bool) -> Shape | None:
    """A shape with a unique name that is clearly in one half of the picture along the axes asked for."""
    margin_x, margin_y = margins(scene)
    shapes = [
        shape
        for shape in unique_names(scene)
        if (not in_x or abs(shape.x - scene.width / 2) > margin_x)
        and (not in_y or abs(shape.y - scene.height / 2) > margin_y)
    ]
    return rng.choice(shapes) if shapes else None


def ask_where_half_horizontal(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    shape = off_centre(rng, pictures[0], in_x=True, in_y=False)
    if shape is None:
        return None
    gaps = {"a": reference(rng, pictures[0], shape, words)}
    return draft_choice(words, gaps, ("left", "right"), int(shape.x > pictures[0].width / 2))


def ask_where_half_vertical(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    shape = off_centre(rng, pictures[0], in_x=False, in_y=True)
    if shape is None:
        return None
    gaps = {"a": reference(rng, pictures[0], shape, words)}
    return draft_choice(words, gaps, ("top", "bottom"), int(shape.y > pictures[0].height / 2))


def ask_where_corner(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    shape = off_centre(rng, pictures[0], in_x=True, in_y=True)
    if shape is None:
        return None
    gaps = {"a": reference(rng, pictures[0], shape, words)}
    corner = 2 * int(shape.y > pictures[0].height / 2) + int(shape.x > pictures[0].width / 2)
    return draft_choice(words, gaps, ("top left", "top right", "bottom left", "bottom right"), corner)


def two_sizes(rng: Random, scene: Scene) -> tuple[Shape, Shape] | None:
    pair = two_named(rng, scene)
    if pair is None or max(pair[0].radius, pair[1].radius) < SIZE_RATIO * min(pair[0].radius, pair[1].radius):
        return None
    return pair


def ask_size_bigger(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    return draft_size(rng, pictures[0], words, index_of_answer=lambda a, b: int(a.radius < b.radius))


def ask_size_smaller(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    return draft_size(rng, pictures[0], words, index_of_answer=lambda a, b: int(a.radius > b.radius))


def draft_size(
    rng: Random, scene: Scene, words: Lexicon, index_of_answer: Callable[[Shape, Shape], int]
) -> Draft | None:
    pair = two_sizes(rng, scene)
    if pair is None:
        return None
    names = tuple(words.name(shape.name) for shape in pair)
    return Draft({"a": names[0], "b": names[1]}, names[index_of_answer(*pair)], names)


def ask_size_is_bigger(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    pair = two_sizes(rng, pictures[0])
    if pair is None:
        return None
    gaps = {"a": words.name(pair[0].name), "b": words.name(pair[1].name)}
    return draft_choice(words, gaps, ("is", "is not"), int(pair[0].radius < pair[1].radius))


def ask_size_is_smaller(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    pair = two_sizes(rng, pictures[0])
    if pair is None:
        return None
    gaps = {"a": words.name(pair[0].name), "b": words.name(pair[1].name)}
    return draft_choice(words, gaps, ("is", "is not"), int(pair[0].radius > pair[1].radius))


def ask_describe(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    shapes = sorted(pictures[0].shapes, key=lambda shape: shape.x)
    margin = margins(pictures[0])[0]
    if len(shapes) > MAX_DESCRIBED or any(right.x - left.x < margin for left, right in pairwise(shapes)):
        return None
    items = (words.one_of.format(name=words.article(words.name(shape.name))) for shape in shapes)
    return Draft({}, words.separator.join(items), ())


# Several pictures


def ordinal_meanings(pictures: Pictures) -> tuple[str, ...]:
    return ("first image", "second image", "third image")[: len(pictures)]


def compare_numbers(rng: Random, pictures: Pictures, words: Lexicon, *, most: bool) -> Draft | None:
    pick = max if most else min
    choice = rng.random()
    if choice < 0.3:
        nouns, numbers = words.anything, [len(scene.shapes) for scene in pictures]
    elif choice < 0.65:
        kind = rng.choice(KINDS)
        nouns, numbers = words.plurals[kind], [count_kinds(scene)[kind] for scene in pictures]
    else:
        colour = rng.choice(list(COLOURS))
        nouns = words.any_shapes.format(colour=words.colours[colour])
        numbers = [count_colours(scene)[colour] for scene in pictures]
    best = pick(numbers)
    if numbers.count(best) != 1:
        return None
    return draft_choice(words, {"nouns": nouns}, ordinal_meanings(pictures), numbers.index(best))


def ask_compare_more(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    return compare_numbers(rng, pictures, words, most=True)


def ask_compare_fewer(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    return compare_numbers(rng, pictures, words, most=False)


def ask_compare_has(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    names = [{shape.name for shape in scene.shapes} for scene in pictures]
    times = Counter(name for present in names for name in present)
    single = sorted(name for name, number in times.items() if number == 1)
    if not single:
        return None
    name = rng.choice(single)
    index = next(index for index, present in enumerate(names) if name in present)
    return draft_choice(words, {"a_noun": words.article(words.name(name))}, ordinal_meanings(pictures), index)


def ask_same(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    if len({(scene.width, scene.height) for scene in pictures}) != 1:
        return None  # whether a picture and its enlargement are the same is a matter of taste
    different = len({scene.shapes for scene in pictures}) != 1
    specific = {2: "same_two", 3: "same_three"}.get(len(pictures), "same")
    phrasing = specific if rng.random() < 0.5 else "same"
    return draft_choice(words, {}, ("same", "different"), int(different), phrasing)


def about_one(ask: Variant, phrasing: str) -> Variant:
    """A variant about one of several pictures, named by its ordinal."""

    def ask_indexed(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
        index = rng.randrange(len(pictures))
        draft = ask(rng, [pictures[index]], words)
        if draft is None:
            return None
        return Draft({**draft.words, "ordinal": words.ordinals[index]}, draft.answer, draft.candidates, phrasing)

    return ask_indexed


# Clips


def moving_index(pictures: Pictures) -> int | None:
    """Which shape of the first frame moves, if one does and none appears."""
    first, last = pictures[0].shapes, pictures[-1].shapes
    if len(first) != len(last):
        return None
    moved = [index for index, (a, b) in enumerate(zip(first, last, strict=True)) if (a.x, a.y) != (b.x, b.y)]
    return moved[0] if len(moved) == 1 else None


def ask_appeared(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    before: set[Shape] = set()
    newest: set[Shape] = set(pictures[0].shapes)
    for scene in pictures:
        added = set(scene.shapes) - before
        newest = added or newest
        before |= added
    if moving_index(pictures) is not None or len(newest) != 1:
        return None
    return Draft({}, words.name(newest.pop().name), words.all_names())


def draft_motion(pictures: Pictures, words: Lexicon, gaps: Mapping[str, str]) -> Draft | None:
    index = moving_index(pictures)
    if index is None:
        return None
    start, end = pictures[0].shapes[index], pictures[-1].shapes[index]
    dx, dy = end.x - start.x, end.y - start.y
    way = (int(dx > 0)) if abs(dx) > abs(dy) else 2 + int(dy > 0)
    return draft_choice(words, gaps, ("move left", "move right", "move up", "move down"), way)


def ask_motion_way(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    index = moving_index(pictures)
    if index is None:
        return None
    return draft_motion(pictures, words, {"a": reference(rng, pictures[0], pictures[0].shapes[index], words)})


def ask_motion_it(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    return draft_motion(pictures, words, {})


def ask_motion_what(rng: Random, pictures: Pictures, words: Lexicon) -> Draft | None:
    index = moving_index(pictures)
    if index is None:
        return None
    return Draft({}, words.name(pictures[0].shapes[index].name), words.all_names())


CATEGORIES: Mapping[str, Mapping[str, Variant]] = {
    "colour": {"colour": ask_colour},
    "shape": {"shape": ask_shape},
    "count": {"count_all": ask_count_all, "count_kind": ask_count_kind, "count_colour": ask_count_colour},
    "exists": {"exists_name": ask_exists_name, "exists_kind": ask_exists_kind, "exists_colour": ask_exists_colour},
    "where": {
        "where_horizontal": ask_where_horizontal,
        "where_vertical": ask_where_vertical,
        "where_half_horizontal": ask_where_half_horizontal,
        "where_half_vertical": ask_where_half_vertical,
        "where_corner": ask_where_corner,
    },
    "size": {
        "size_bigger": ask_size_bigger,
        "size_smaller": ask_size_smaller,
        "size_is_bigger": ask_size_is_bigger,
        "size_is_smaller": ask_size_is_smaller,
    },
    "describe": {"describe": ask_describe},
    "compare": {
        "compare_more": ask_compare_more,
        "compare_fewer": ask_compare_fewer,
        "compare_has": ask_compare_has,
    },
    "same": {"same": ask_same},
    "indexed": {
        "indexed_colour": about_one(ask_colour, "indexed_colour"),
        "indexed_shape": about_one(ask_shape, "indexed_shape"),
        "indexed_count_all": about_one(ask_count_all, "indexed_count"),
        "indexed_count_kind": about_one(ask_count_kind, "indexed_count"),
        "indexed_exists": about_one(ask_exists_name, "indexed_exists"),
    },
    "appeared": {"appeared": ask_appeared},
    "motion": {"motion_way": ask_motion_way, "motion_it": ask_motion_it, "motion_what": ask_motion_what},
}

CLIP_CATEGORIES = ("appeared", "motion")
FORM_CATEGORIES: Mapping[Form, tuple[str, ...]] = {
    "image": ("colour", "shape", "count", "exists", "where", "size", "describe"),
    "images": ("compare", "same", "indexed"),
    "frames": CLIP_CATEGORIES,
    "video": CLIP_CATEGORIES,
}


def ask(
    rng: Random,
    pictures: Pictures,
    category: str,
    language: Language,
    *,
    variant: str | None = None,
    canonical: bool = False,
) -> Question | None:
    """A question of a category about the pictures, or None if this variant has no clear answer there.

    `canonical` takes the first template as it stands; otherwise the phrasing, capitals and the question mark vary.
    """
    variants = CATEGORIES[category]
    variant = variant or rng.choice(list(variants))
    words = LEXICONS[language]
    draft = variants[variant](rng, pictures, words)
    if draft is None:
        return None
    templates = words.templates[draft.phrasing or variant]
    template = templates[0] if canonical else rng.choice(templates)
    text = template.format(**draft.words)
    if not canonical:
        text = vary(rng, text, language)
    return Question(category, variant, language, text, draft.answer, draft.candidates)


def vary(rng: Random, text: str, language: Language) -> str:
    """The ways people type: no capital, no final mark, half-width marks in Chinese."""
    if language == "en" and rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    if language == "zh" and rng.random() < 0.25:
        text = text.replace("？", "?").replace("，", ",")
    if rng.random() < 0.2:
        text = text.rstrip("?.？。")
    return text


def questions_of(pictures: Pictures, form: Form, *, seed: int = 0) -> list[Question]:
    """One canonical question of every variant that these pictures allow, in every language."""
    questions = []
    for category in FORM_CATEGORIES[form]:
        for variant in CATEGORIES[category]:
            for language in LANGUAGES:
                rng = Random(f"{seed}-{variant}")  # the same question in every language
                attempts = (ask(rng, pictures, category, language, variant=variant, canonical=True) for _ in range(8))
                questions.extend([question for question in attempts if question is not None][:1])
    return questions


assert len(ENGLISH.numbers) > MAX_SHAPES
