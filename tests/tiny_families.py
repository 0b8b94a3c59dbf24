"""Tiny random checkpoints of every family in the layout of the hub, and transformers' own processor for each."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Blip2Processor,
    GenerationConfig,
    Idefics2Processor,
    Idefics3Processor,
    InstructBlipProcessor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    ProcessorMixin,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests.conftest import CORPUS

HIDDEN = 64
ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row, column in itertools.product(range(1, 7), repeat=2)]
SPECIALS = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>",
    "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROWS_AND_COLUMNS,
]  # fmt: skip

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ 'MARKER\n' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() }}"
    "{{ ':' if message.content[0].type == 'image' else ': ' }}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14, "initializer_range": 0.2,
}  # fmt: skip
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
DINO = {**VISION, "model_type": "dinov2", "mlp_ratio": 2, "image_size": 84}  # another size than its images have
LLAMA = {"model_type": "llama"}
MISTRAL = {"model_type": "mistral", "sliding_window": 2048}
QWEN2 = {"model_type": "qwen2"}
OPT = {
    "model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 1024, "init_std": 0.3,
}  # fmt: skip
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SQUARE = {"height": 56, "width": 56}
CROPPED = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """`config` beside the text model's usual sizes, `image_processor` as its file says, and `processor` of the rest."""

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any]
    processor: type[ProcessorMixin]
    processor_fields: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    marker: str = "<image>"
    adds_bos: bool = True
    max_images: int = 3


def without_video(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Video processors need torchvision."""
    attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
    return type(processor.__name__, (processor,), {"get_attributes": attributes})


def qformer(**fields: int) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "encoder_hidden_size": 32, "initializer_range": 0.2, "vocab_size": 512, **fields}


_LLAVA = {"model_type": "llava", "text": LLAMA, "processor": LlavaProcessor, "chat_template": LLAVA_TEMPLATE}
_PATCHES = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_FULL = {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
_SPLIT = {
    "vision": VISION, "text": LLAMA, "config": {"scale_factor": 2}, "processor": Idefics3Processor,
    "processor_fields": {"image_seq_len": 4}, "chat_template": "{{ bos_token }}" + IDEFICS_TEMPLATE,
}  # fmt: skip
_SPLIT_SIZES = {"size": {"longest_edge": 168}, "max_image_size": {"longest_edge": 56}}
_BLIP = {
    "vision": VISION, "text": OPT, "max_images": 1, "processor_fields": {"num_query_tokens": 8},
    "image_processor": {"image_processor_type": "BlipImageProcessor", "size": SQUARE},
}  # fmt: skip

TINY_FAMILIES: dict[str, TinyFamily] = {
    "llava": TinyFamily(
        **_LLAVA, vision=CLIP, processor_fields=_PATCHES,
        image_processor={"image_processor_type": "CLIPImageProcessor", **CROPPED},
    ),
    "llava-siglip": TinyFamily(
        **{**_LLAVA, "text": MISTRAL}, vision=SIGLIP, config={"vision_feature_select_strategy": "full"},
        processor_fields=_FULL, image_processor={"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    ),
    "llava-dinov2": TinyFamily(
        **_LLAVA, vision=DINO, processor_fields=_PATCHES,
        image_processor={"image_processor_type": "BitImageProcessor", **CROPPED},
    ),
    "llava_next": TinyFamily(
        model_type="llava_next", text=MISTRAL, vision=CLIP, config={"image_grid_pinpoints": PINPOINTS},
        processor=LlavaNextProcessor, processor_fields=_PATCHES, chat_template=LLAVA_TEMPLATE,
        image_processor={
            "image_processor_type": "LlavaNextImageProcessor", **CROPPED, "image_grid_pinpoints": PINPOINTS
        },
    ),
    "llava_onevision": TinyFamily(
        model_type="llava_onevision", text=QWEN2, vision=SIGLIP, adds_bos=False,
        config={"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": "anyres_max_2"},
        processor=without_video(LlavaOnevisionProcessor), chat_template=QWEN_TEMPLATE,
        processor_fields={
            "num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"
        },
        image_processor={
            "image_processor_type": "LlavaOnevisionImageProcessor", "size": SQUARE, "image_grid_pinpoints": PINPOINTS
        },
    ),
    "internvl": TinyFamily(
        model_type="internvl", text=QWEN2, adds_bos=False, marker="<IMG_CONTEXT>", chat_template=QWEN_TEMPLATE,
        vision={**VISION, "image_size": [56, 56], "patch_size": [14, 14]}, config={"image_seq_length": 4},
        processor=without_video(InternVLProcessor), processor_fields={"image_seq_length": 4},
        image_processor={"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, "max_patches": 6},
    ),
    "idefics2": TinyFamily(
        model_type="idefics2", text=MISTRAL, vision=VISION, chat_template=IDEFICS_TEMPLATE,
        config={
            "perceiver_config": {
                "hidden_size": HIDDEN, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 2,
                "resampler_head_dim": 16, "num_key_value_heads": 1, "initializer_range": 0.3,
            }
        },
        processor=Idefics2Processor, processor_fields={"image_seq_len": 6},
        image_processor={
            "image_processor_type": "Idefics2ImageProcessor", "do_image_splitting": True,
            "size": {"shortest_edge": 28, "longest_edge": 56},
        },
    ),
    "idefics3": TinyFamily(
        model_type="idefics3", image_processor={"image_processor_type": "Idefics3ImageProcessor", **_SPLIT_SIZES},
        **_SPLIT,
    ),
    "smolvlm": TinyFamily(  # its own processor needs a package for videos; of images it makes the same
        model_type="smolvlm", image_processor={"image_processor_type": "SmolVLMImageProcessor", **_SPLIT_SIZES},
        **_SPLIT,
    ),
    "blip-2": TinyFamily(
        model_type="blip-2", config={"num_query_tokens": 8, "qformer_config": qformer()}, processor=Blip2Processor,
        **_BLIP,
    ),
    "instructblip": TinyFamily(
        model_type="instructblip", config={"num_query_tokens": 8, "qformer_config": qformer()},
        processor=InstructBlipProcessor, **_BLIP,
    ),
}  # fmt: skip


def write_tiny_family(name: str, directory: Path, *, hidden: int = HIDDEN) -> Path:
    """`hidden` is the width of the text model."""
    family = TINY_FAMILIES[name]
    tokenizer = train_tokenizer(family.adds_bos)
    write_tokenizer(tokenizer, directory, family)
    if name == "instructblip":
        write_tokenizer(train_tokenizer(adds_bos=True), directory / "qformer_tokenizer", family)
    (directory / "preprocessor_config.json").write_text(json.dumps(family.image_processor))
    ids = {text: tokenizer.token_to_id(text) for text in SPECIALS}
    ends = [ids["</s>"], ids["<|im_end|>"], ids["<end_of_utterance>"]]
    text = {
        "hidden_size": hidden, "intermediate_size": hidden * 3 // 2, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 2.4 / hidden**0.5,
    }  # fmt: skip
    if family.text is OPT:
        text = {**OPT, "hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": hidden * 3 // 2}
    else:
        text |= family.text
    text |= {"vocab_size": tokenizer.get_vocab_size() + 13, "bos_token_id": ids["<s>"], "pad_token_id": ids["<pad>"]}
    name_of_id = "image_token_index" if family.model_type in ("llava_next", "llava") else "image_token_id"
    config = AutoConfig.for_model(
        family.model_type,
        text_config={**text, "eos_token_id": ids["</s>"]},
        vision_config=family.vision,
        tie_word_embeddings=False,
        **{name_of_id: ids[family.marker]},
        **family.config,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=ids["<pad>"], eos_token_id=ends)
    model.save_pretrained(directory, max_shard_size="200KB")
    return directory


def train_tokenizer(adds_bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated", False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(SPECIALS)
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path, family: TinyFamily) -> None:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = {"chat_template": family.chat_template.replace("MARKER", family.marker)} if family.chat_template else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **template}))


class Reference:
    """transformers' one-piece model, its own processor and `generate()`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.family = TINY_FAMILIES[name]
        self.model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        parts = [self.image_processor, AutoTokenizer.from_pretrained(directory)]
        if name == "instructblip":
            parts.append(AutoTokenizer.from_pretrained(directory / "qformer_tokenizer"))
        self.processor = self.family.processor(*parts, **self.family.processor_fields)

    def inputs(self, text: str, images: Sequence[Any]) -> dict[str, Any]:
        """What the processor makes of images before a text in a message of the user."""
        prompt = text
        if self.family.chat_template is not None:
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
            prompt = self.processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        nested = [list(images)] if images else None
        adds_bos = not prompt.startswith("<s>")
        inputs = self.processor(text=[prompt], images=nested, return_tensors="pt", add_special_tokens=adds_bos)
        return dict(inputs)

    @torch.inference_mode()
    def tokens(self, text: str, images: Sequence[Any], max_tokens: int) -> list[int]:
        inputs = self.inputs(text, images)
        prompt: list[int] = inputs["input_ids"][0].tolist()
        # Without an image the whole of these models cannot be called.
        is_text_of_blip = self.family.text is OPT and not images
        model = self.model.language_model if is_text_of_blip else self.model
        inputs = {name: value for name, value in inputs.items() if not (is_text_of_blip and "qformer" in name)}
        end = self.model.generation_config.eos_token_id
        generated = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, eos_token_id=end)
        tokens: list[int] = generated[0].tolist()
        return tokens[len(prompt) :] if tokens[: len(prompt)] == prompt else tokens
