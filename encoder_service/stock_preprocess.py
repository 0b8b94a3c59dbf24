"""Image bytes to pixel values by transformers' own PIL image processor, for families whose pixels we do not make."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from common.checkpoint import load_image_processor
from common.config import ImageLimits
from common.device import to_device
from common.embedding import Grid
from common.errors import InvalidRequestError
from common.families import family_of
from common.geometry import ImageGeometry
from common.identity import framed_digest
from common.media import MediaParams
from encoder_service.preprocess import decode

# what get_image_features takes of what an image processor gives
_MODEL_INPUTS = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images")


@dataclass(frozen=True, slots=True)
class PixelInputs:
    """One image as `get_image_features` takes it; `num_patches` of the vision tower."""

    tensors: Mapping[str, Tensor]
    grid_thw: Grid
    num_patches: int


class StockPreprocessor:
    """Decodes and orients as for any other family; the rest is the image processor's. Thread-safe."""

    can_batch = False

    def __init__(self, directory: Path, config: Any, geometry: ImageGeometry, limits: ImageLimits) -> None:
        family = family_of(config)
        self.geometry = geometry
        self.limits = limits
        self._processor = load_image_processor(directory)
        self._options = dict(family.processor_options)
        patch_size = config.vision_config.patch_size
        height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self._values_per_patch = 3 * height * width
        self._instructions = InstructionTokenizer(directory, config) if family.needs_instruction else None

    def __call__(self, data: bytes, params: MediaParams) -> PixelInputs:
        """Raises InvalidRequestError for bytes that are not a whole image within the limits."""
        image = decode(data, self.limits)
        grid = params.grid(self.geometry, image.height, image.width)
        # A list in a list is one prompt with several images, of which the first is ours.
        images = [image] if params.alone else [[image, image]]
        try:
            # Said, because it is guessed from sizes otherwise, and wrongly for images of one or three rows.
            processed = self._processor(images, return_tensors="pt", input_data_format="channels_last", **self._options)
        except (ValueError, ZeroDivisionError) as exc:
            raise InvalidRequestError(
                f"the model's image processor cannot take an image of {image.width} x {image.height} pixels",
                code="invalid_image",
            ) from exc
        tensors = {name: processed[name] for name in _MODEL_INPUTS if name in processed}
        if not params.alone:
            tensors |= {name: tensors[name][:1] for name in ("pixel_values", "image_sizes")}
        if self._instructions is not None:
            tensors |= self._instructions(params.instruction)
        return PixelInputs(tensors, grid, -(-tensors["pixel_values"].numel() // self._values_per_patch))

    def model_inputs(self, images: Sequence[PixelInputs], device: torch.device) -> dict[str, Tensor]:
        (image,) = images
        return {name: to_device(device, tensor) for name, tensor in image.tensors.items()}

    def fingerprint(self) -> str:
        """Everything here that pixel values depend on besides the image and its params, for the namespace."""
        instructions = "" if self._instructions is None else self._instructions.fingerprint()
        settings = [self._processor.to_json_string(), json.dumps(self._options), instructions]
        return json.dumps([type(self._processor).__name__, transformers.__version__, framed_digest(*settings)])


class InstructionTokenizer:
    """The Q-Former's own tokenizer, for families whose features depend on the text of the prompt."""

    def __init__(self, directory: Path, config: Any) -> None:
        # The tokenizer inside, because transformers' own changes settings with every call, and threads share it.
        self._tokenizer = AutoTokenizer.from_pretrained(directory / "qformer_tokenizer").backend_tokenizer
        self._max_tokens: int = config.qformer_config.max_position_embeddings

    def __call__(self, instruction: str) -> dict[str, Tensor]:
        token_ids = torch.tensor([self._tokenizer.encode(instruction).ids])
        num_tokens = token_ids.shape[1]
        if num_tokens > self._max_tokens:
            raise InvalidRequestError(
                f"the text of the prompt has {num_tokens} tokens of the Q-Former, which takes {self._max_tokens}",
                param="messages",
            )
        return {"qformer_input_ids": token_ids, "qformer_attention_mask": torch.ones_like(token_ids)}

    def fingerprint(self) -> str:
        text: str = self._tokenizer.to_str()
        return text
