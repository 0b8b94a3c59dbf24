"""The image backend `torchvision`: pixels are those of transformers' torchvision processor, by committed digests."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.cache import LocalTier, TieredCache
from common.config import ImageLimits, ModelConfig
from common.geometry import PatchGeometry
from common.media import MediaParams
from encoder_service.config import EncoderConfig
from encoder_service.preprocess import ImagePreprocessor, pixel_values
from encoder_service.server import EncoderServer
from tests.encoder_service.torchvision_digests import CASES, DIGESTS, SETTINGS, case_name, digest, drawn
from tests.tiny_families import write_tiny_family


def preprocessor(image_backend: Any, settings: dict[str, Any] | None = None) -> ImagePreprocessor:
    settings = settings or {}
    geometry = PatchGeometry(patch_size=settings.get("patch_size", 14), merge_size=2, hidden_size=64)
    return ImagePreprocessor(geometry, settings, ImageLimits(), image_backend=image_backend)


def server(checkpoint: Path, image_backend: Any) -> EncoderServer:
    model = ModelConfig(path=str(checkpoint), image_backend=image_backend)
    return EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**20), None))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


@pytest.mark.parametrize("settings", SETTINGS, ids=["qwen2_vl", "qwen3_vl"])
def test_pixels_are_those_of_the_torchvision_processor(settings: dict[str, Any]) -> None:
    digests = json.loads(DIGESTS.read_text())
    preprocess = preprocessor("torchvision", settings)
    for case in CASES:
        height, width, min_pixels, max_pixels = case
        ours = preprocess(png(drawn(height, width)), MediaParams(min_pixels=min_pixels, max_pixels=max_pixels))
        values = pixel_values(ours.patches, preprocess.normalization_table(), temporal_patch_size=2)
        assert digest(values, ours.grid_thw) == digests[case_name(settings, case)], case


def test_the_backends_differ_in_pixels_and_in_the_namespace() -> None:
    data, params = png(drawn(375, 500)), MediaParams(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    pil, torchvision = preprocessor("pil"), preprocessor("torchvision")
    assert not torch.equal(pil(data, params).patches, torchvision(data, params).patches)
    assert pil.fingerprint() != torchvision.fingerprint()


def test_the_backends_agree_where_nothing_is_resized_after_rounding_to_bfloat16() -> None:
    data, params = png(drawn(448, 448)), MediaParams(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    patches = [preprocessor(backend)(data, params).patches for backend in ("pil", "torchvision")]
    assert torch.equal(*patches)
    tables = [preprocessor(backend).normalization_table() for backend in ("pil", "torchvision")]
    assert not torch.equal(*tables)
    assert torch.equal(tables[0].bfloat16(), tables[1].bfloat16())


async def test_the_backend_is_chosen_by_the_configuration(tiny_checkpoint: Path) -> None:
    for backend in ("pil", "torchvision"):
        namespace = await server(tiny_checkpoint, backend).describe()
        assert json.loads(namespace.preprocessing)[0] == backend


def test_a_family_without_the_backend_is_refused_at_start(tmp_path: Path) -> None:
    checkpoint = write_tiny_family("llava", tmp_path)
    with pytest.raises(ValueError, match=r"model.image_backend is 'torchvision', but models of type 'llava'"):
        server(checkpoint, "torchvision")
