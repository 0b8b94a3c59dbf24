"""Tiny real models, pictures, and the stand-ins for the seams between the services."""

import contextlib
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when torch brings Triton in

import httpx2
import numpy as np
import openai
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.types import ASGIApp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import logging as transformers_logging

from common.cache import LocalTier, TieredCache
from llm_service.api.app import create_app
from tests.services import Services

transformers_logging.disable_progress_bar()

# Qwen2-VL's special tokens, in the order of the hub
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for item in message.content %}"
    "{% if item.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif item.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = ["What colour is the circle?", "How many shapes are there?", "Describe the picture from left to right."] * 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", help="where the tests of the page keep its pictures")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Features depend on the number of threads, and the service uses one.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL of about a megabyte in the layout of the hub, tokenizer included."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def one_piece(tiny_checkpoint: Path) -> PreTrainedModel:
    """The whole model of `tiny_checkpoint`, as transformers loads it."""
    return Qwen2VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def memory_cache() -> Iterator[TieredCache]:
    yield TieredCache(LocalTier(64 * 1024**2), None)


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The URL of an app that is served on a socket of this process, without Ray."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=5)
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
        thread.start()
        while not http.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        http.should_exit = True
        thread.join()


def picture(height: int = 56, width: int = 84, seed: int = 0, format: str = "PNG") -> bytes:
    """A smooth random picture: noise would exaggerate differences between decoders."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_tiny_checkpoint(
    directory: Path, model_type: str = "qwen2_vl", *, hidden: int = 64, layers: int = 3, seed: int = 0
) -> Path:
    tokenizer = _train_tokenizer()
    token = {text[2:-2]: tokenizer.token_to_id(text) for text in SPECIALS}
    vision_config, text_extra, rope_extra = _tiny_qwen(model_type, hidden)
    text_config = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # with the usual 0.02, greedy output degenerates and equality proves nothing
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], **rope_extra},
        "bos_token_id": token["endoftext"],
        "eos_token_id": token["im_end"],
        **text_extra,
    }
    config = AutoConfig.for_model(
        model_type,
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=True,
        image_token_id=token["image_pad"],
        video_token_id=token["video_pad"],
        vision_start_token_id=token["vision_start"],
        vision_end_token_id=token["vision_end"],
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=token["endoftext"], eos_token_id=[token["im_end"], token["endoftext"]]
    )
    model.save_pretrained(directory, max_shard_size="200KB")
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(tokenizer))
    preprocessor = {"min_pixels": 56 * 56, "max_pixels": 224 * 224, "patch_size": config.vision_config.patch_size}
    _write_json(directory / "preprocessor_config.json", preprocessor)
    return directory


def _tiny_qwen(model_type: str, hidden: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The vision tower of a family, and what its text model and its rotary embedding have besides."""
    tower = {"hidden_size": 32, "out_hidden_size": hidden, "intermediate_size": 64, "num_heads": 2}
    tower["initializer_range"] = 0.2
    match model_type:
        case "qwen2_vl":
            return (
                {"depth": 2, "embed_dim": 32, "hidden_size": hidden, "num_heads": 2, "initializer_range": 0.2},
                {},
                {},
            )
        case "qwen2_5_vl":
            return {**tower, "depth": 3, "window_size": 56, "fullatt_block_indexes": [1]}, {}, {}
        case "qwen3_vl":
            deepstack = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            return {**tower, **deepstack}, {"head_dim": hidden // 4}, {"mrope_interleaved": True}
    raise KeyError(model_type)


def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated", False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": SPECIALS[1:],
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(tokenizer.token_to_id(text)): {"content": text, **plain} for text in SPECIALS},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


@pytest.fixture
async def services(tiny_checkpoint: Path) -> AsyncIterator[Services]:
    found = Services(tiny_checkpoint)
    yield found
    found.llm.engine.shutdown()


@pytest.fixture
async def http(services: Services) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(create_app(services.llm))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def sdk(http: httpx2.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http, max_retries=0)
