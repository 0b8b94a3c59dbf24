"""The vision half on its device: preprocessed images in, embeddings out. The only code here that runs a model."""

import time

import torch

from common.checkpoint import LoadedHalf, device_capability
from common.embedding import VisionEmbedding, deepstack_names
from common.identity import EmbeddingNamespace
from encoder_service.preprocess import ImagePreprocessor, PreprocessedImage, decoder_version, pixel_values


class VisionEncoder:
    """Encodes a batch of images. In `exact` numerics each has a forward of its own, so company changes no bit."""

    def __init__(self, half: LoadedHalf, preprocessor: ImagePreprocessor, numerics: str) -> None:
        self.half = half
        self.numerics = numerics
        self.temporal_patch_size = half.config.vision_config.temporal_patch_size
        self.table = preprocessor.normalization_table().to(half.device)
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

    def encode(self, images: list[PreprocessedImage]) -> list[VisionEmbedding]:
        """One embedding for each image, on the CPU, in order."""
        groups = [[image] for image in images] if self.numerics == "exact" else [images]
        return [embedding for group in groups for embedding in self._forward(group)]

    @torch.inference_mode()
    def _forward(self, images: list[PreprocessedImage]) -> list[VisionEmbedding]:
        started = time.perf_counter()
        patches = torch.cat([image.patches for image in images]).to(self.half.device)
        values = pixel_values(patches, self.table, self.temporal_patch_size).to(self.half.dtype)
        grids = torch.tensor([image.grid_thw for image in images], device=self.half.device)
        output = self.half.model.get_image_features(values, grids, return_dict=True)
        deepstack = output.get("deepstack_features") or []
        sets = {"features": output.pooler_output, **dict(zip(deepstack_names(len(deepstack)), deepstack, strict=True))}
        tensors_of_images = [{name: rows[index].cpu() for name, rows in sets.items()} for index in range(len(images))]
        ms_per_patch = (time.perf_counter() - started) * 1000 / len(patches)
        return [
            VisionEmbedding(tensors, image.grid_thw, encode_ms=ms_per_patch * image.num_patches)
            for image, tensors in zip(images, tensors_of_images, strict=True)
        ]
