"""The vision half on its device: preprocessed images in, embeddings out. The only code here that runs a model."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
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


class _Stopwatch:
    """The time that a device takes for what is launched until `stop`, and not for what it had to do before."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._begin = self._now()

    def stop(self) -> None:
        self._end = self._now()

    def wait_ms(self) -> float:
        """Returns when the device is so far."""
        if not self._is_gpu:
            return float(self._end - self._begin) * 1000
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True, slots=True)
class _Forward:
    """What a GPU may still be working on. `tensors` has those of each image."""

    images: Sequence[Preprocessed]
    tensors: list[dict[str, Tensor]]
    stopwatch: _Stopwatch

    def embeddings(self) -> list[VisionEmbedding]:
        ms_per_patch = self.stopwatch.wait_ms() / sum(image.num_patches for image in self.images)
        return [
            VisionEmbedding(of_image, image.grid_thw, encode_ms=ms_per_patch * image.num_patches)
            for image, of_image in zip(self.images, self.tensors, strict=True)
        ]


class VisionEncoder:
    """Encodes a batch of images. In `exact` numerics each has a forward of its own, so company changes no bit.

    Thread-safe: on a GPU one thread's batch is launched while another one's runs.
    """

    def __init__(self, half: LoadedHalf, preprocessor: Preprocessor, numerics: str) -> None:
        self.half = half
        self.preprocessor = preprocessor
        self.is_batched = numerics == "fast" and preprocessor.can_batch
        self.num_at_once = 2 if half.device.type == "cuda" else 1
        self._launching = threading.Lock()
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

    def _has_own_tower(self) -> bool:
        return torch.cuda.is_available() and isinstance(getattr(base_of(self.half.model), "visual", None), VisionTower)

    def encode(self, images: Sequence[Preprocessed]) -> list[VisionEmbedding]:
        """One embedding for each image, on the CPU, in order."""
        groups = [images] if self.is_batched else [[image] for image in images]
        with self._launching:
            forwards = [self._launch(group) for group in groups]
        return [embedding for forward in forwards for embedding in forward.embeddings()]

    @torch.inference_mode()
    def _launch(self, images: Sequence[Preprocessed]) -> _Forward:
        stopwatch = _Stopwatch(self.half.device)
        inputs = self.preprocessor.model_inputs(images, self.half.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.half.dtype)
        if self._has_own_tower():  # which reads the grids, and would wait for all that the device has to do
            inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        output = self.half.model.get_image_features(**inputs, return_dict=True)
        deepstack = output.get("deepstack_features") or []
        sets = {"features": output.pooler_output, **dict(zip(deepstack_names(len(deepstack)), deepstack, strict=True))}
        rows_of_sets = {name: rows_of_images(rows) for name, rows in sets.items()}
        tensors = [
            {name: rows[index].to("cpu", non_blocking=True) for name, rows in rows_of_sets.items()}
            for index in range(len(images))
        ]
        stopwatch.stop()
        return _Forward(images, tensors, stopwatch)


def rows_of_images(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """`[N, hidden]` for each image. A tensor has the tiles or queries of one image as its first dimension."""
    return [features.flatten(0, -2)] if isinstance(features, Tensor) else list(features)
