"""The tokenizer of the embedded model, as the files that Qwen2-VL's checkpoints have.

A byte-level BPE whose merges come from the list of words that questions and answers use, each seen alone: a word is one
or two tokens, any other text falls back to bytes and still round-trips.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from deploy.shapes.questions import CATEGORIES, CHINESE, ENGLISH, FORM_CATEGORIES, ask
from deploy.shapes.scenes import Form, Scene, sample_clip, sample_scene

VOCAB_SIZE = 896
MODEL_MAX_LENGTH = 4096

# The order of Qwen2-VL's vocabulary; their ids follow the ordinary tokens.
SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
)
FIRST_SPECIAL_ID = VOCAB_SIZE - len(SPECIAL_TOKENS)
TOKEN_IDS: dict[str, int] = {text: FIRST_SPECIAL_ID + index for index, text in enumerate(SPECIAL_TOKENS)}

DEFAULT_SYSTEM = "You are a helpful assistant."
SYSTEM_MESSAGES = (
    DEFAULT_SYSTEM,
    "Answer briefly.",
    "You answer questions about pictures.",
    "Answer with one word.",
    "请简短回答。",
    "你是一个有用的助手。",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}"
    "{{ message.content }}"
    "{% else %}"
    "{% for item in message.content %}"
    "{% if item.type in ('image', 'image_url') %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif item.type == 'video' %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}"
    "{{ item.text }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)

# Chinese is not spaced, so its words are listed.
CHINESE_TEXT = """
？ 。 ， 什么 什么颜色 什么形状 颜色 形状 图形 的图形 图片 图中 图片里 哪个 哪张 哪张图 哪一边 哪边 哪里 多少
几个 一共 请问 描述 从左到右 左边还是右边 上面还是下面 大 小 更大 更小 更多 更少 最多 最少 出现 最后 移动 在移动
方向 位置 看到 两张 三张 这张 这两张 这些 它们 一样吗 有没有 是不是 简短 回答 助手 有用 你 你是 是 的 在 和 比 往
向 它 了 吗 有
"""


def chinese_words() -> list[str]:
    named = [*CHINESE.colours.values(), *CHINESE.kinds.values(), *CHINESE.numbers, *CHINESE.ordinals]
    return list(dict.fromkeys([*named, *CHINESE.answers.values(), *CHINESE_TEXT.split()]))


def english_words() -> list[str]:
    """Every word of sampled questions and answers as the pre-tokenizer cuts it, with and without a leading space."""
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated", False)
    rng = Random("words")
    texts = [
        *SYSTEM_MESSAGES,
        "system\n",
        "user\n",
        "assistant\n",
        *ENGLISH.plurals.values(),
        *ENGLISH.answers.values(),
    ]
    shown: dict[Form, tuple[Scene, ...]] = {}
    for _ in range(300):
        shown["image"] = (sample_scene(rng, 224, 224),)
        shown["images"] = tuple(sample_scene(rng, 224, 224) for _ in range(3))
        shown["video"] = sample_clip(rng, 224, 224, 4)
        for form, pictures in shown.items():
            for category in FORM_CATEGORIES[form]:
                for variant in CATEGORIES[category]:
                    question = ask(rng, pictures, category, "en", variant=variant)
                    texts.extend((question.text, question.answer) if question else ())
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text) if word.isascii()}
    return sorted(words | {f" {word}" for word in words if word.isalpha()})


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE(unk_token=None))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated", False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=FIRST_SPECIAL_ID, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*english_words(), *chinese_words()], trainer)
    if tokenizer.get_vocab_size() != FIRST_SPECIAL_ID:
        raise ValueError(f"the words give {tokenizer.get_vocab_size()} tokens, not {FIRST_SPECIAL_ID}")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """tokenizer.json, vocab.json, merges.txt, tokenizer_config.json and chat_template.json, as on the hub."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    write_json(path / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "model_max_length": MODEL_MAX_LENGTH,
            "padding_side": "left",
            "split_special_tokens": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": None,
            "unk_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "chat_template": CHAT_TEMPLATE,
            "added_tokens_decoder": {str(index): {"content": text, **flags} for text, index in TOKEN_IDS.items()},
        },
    )
    write_json(path / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
