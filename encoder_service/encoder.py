"""The vision half on its device: preprocessed images in, embeddings out. The only code here that runs a model."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.checkpoint import LoadedHalf, base_of, device_capability, load_geometry, load_preprocessor_config
from common.config import ImageBackend, ImageLimits
from common.embedding import Grid, VisionEmbedding, deepstack_names
from common.geometry import PatchGeometry
from common.identity import EmbeddingNamespace
from common.media import MediaParams
from encoder_service.preprocess import ImagePreprocessor, decoder_version
from encoder_service.stock_preprocess import StockPreprocessor

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    from encoder_service.vision_tower import VisionTower


class Preprocessed(Protocol):
    """An image that is ready for the device."""

    @property
    def grid_thw(self) -> Grid: ...

    @property
    def num_patches(self) -> int: ...


class Preprocessor(Protocol):
    """How a family's images become what its vision tower takes. `can_batch`: several in one forward."""

    @property
    def can_batch(self) -> bool: ...

    def __call__(self, data: bytes, params: MediaParams) -> Any: ...

    def model_inputs(self, images: Sequence[Any], device: torch.device) -> dict[str, Tensor]: ...

    def fingerprint(self) -> str: ...


def load_preprocessor(
    directory: Path, config: Any, limits: ImageLimits, image_backend: ImageBackend = "pil"
) -> Preprocessor:
    """Raises ValueError for an image backend that the family does not have."""
    geometry = load_geometry(directory, config)
    if isinstance(geometry, PatchGeometry):
        frames = config.vision_config.temporal_patch_size
        return ImagePreprocessor(geometry, load_preprocessor_config(directory), limits, frames, image_backend)
    if image_backend != "pil":
        raise ValueError(
            f"model.image_backend is {image_backend!r}, but models of type {config.model_type!r} take their pixels "
            "from transformers' own PIL processor: leave it at 'pil'"
        )
    return StockPreprocessor(directory, config, geometry, limits)


class VisionEncoder:
    """Encodes a batch of images. In `exact` numerics each has a forward of its own, so company changes no bit."""

    def __init__(self, half: LoadedHalf, preprocessor: Preprocessor, numerics: str) -> None:
        self.half = half
        self.preprocessor = preprocessor
        self.is_batched = numerics == "fast" and preprocessor.can_batch
        self.namespace = EmbeddingNamespace(
            weights=half.digest,
            model_class=type(half.model).__name__,
            dtype=str(half.dtype).removeprefix("torch."),
            numerics=numerics,
            device=device_capability(half.device),
            torch_version=torch.__version__,
            attn_implementation=str(half.config.vision_config._attn_implementation),
            preprocessing=preprocessor.fingerprint(),
            image_decoder=decoder_version(),
        )

    def speed_up(self) -> None:
        """Puts our tower for GPUs into the model in place of transformers', which it changes. Nothing on a CPU."""
        if self.preprocessor.can_batch and self.half.device.type == "cuda" and self.half.dtype.itemsize == 2:
            base: Any = base_of(self.half.model)
            base.visual = VisionTower(base.visual, exact=not self.is_batched)
            base.visual.warm_up()

    def encode(self, images: Sequence[Preprocessed]) -> list[VisionEmbedding]:
        """One embedding for each image, on the CPU, in order."""
        groups = [images] if self.is_batched else [[image] for image in images]
        return [embedding for group in groups for embedding in self._forward(group)]

    @torch.inference_mode()
    def _forward(self, images: Sequence[Preprocessed]) -> list[VisionEmbedding]:
        started = time.perf_counter()
        inputs = self.preprocessor.model_inputs(images, self.half.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.half.dtype)
        output = self.half.model.get_image_features(**inputs, return_dict=True)
        deepstack = output.get("deepstack_features") or []
        sets = {"features": output.pooler_output, **dict(zip(deepstack_names(len(deepstack)), deepstack, strict=True))}
        rows_of_sets = {name: rows_of_images(rows) for name, rows in sets.items()}
        tensors = [{name: rows[index].cpu() for name, rows in rows_of_sets.items()} for index in range(len(images))]
        ms_per_patch = (time.perf_counter() - started) * 1000 / sum(image.num_patches for image in images)
        return [
            VisionEmbedding(of_image, image.grid_thw, encode_ms=ms_per_patch * image.num_patches)
            for image, of_image in zip(images, tensors, strict=True)
        ]


def rows_of_images(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """`[N, hidden]` for each image. A tensor has the tiles or queries of one image as its first dimension."""
    return [features.flatten(0, -2)] if isinstance(features, Tensor) else list(features)
