"""The embedded model: its generator, its training layout against transformers' own forward, and the checkpoint itself."""

from random import Random

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from common.families import Grid
from deploy.shapes.batches import MIXTURE, Layout, sample_batch
from deploy.shapes.drawing import patchify
from deploy.shapes.model import new_model
from deploy.shapes.scenes import PATCH_SIZE, Form, grid_of
from deploy.shapes.tokenizer import TOKEN_IDS
from deploy.shapes.train import answer_logits, pixels_of

VISION_PADS = (TOKEN_IDS["<|image_pad|>"], TOKEN_IDS["<|video_pad|>"])


@pytest.fixture(scope="module")
def random_model() -> Qwen2VLForConditionalGeneration:
    model = new_model(0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)  # the small initial weights would hide a wrong position or mask
    return model


@pytest.mark.parametrize(("form", "layout"), MIXTURE)
@torch.no_grad()
def test_training_layout_equals_single_chats(
    random_model: Qwen2VLForConditionalGeneration, form: Form, layout: Layout
) -> None:
    """The masked blocks give the logits of transformers' own forward on each chat alone, features and positions too."""
    batch = sample_batch(Random("layout"), form, layout, max_rows=1).to(torch.device("cpu"))
    logits = answer_logits(random_model, batch, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    row = 3
    patches, grids = [], []
    for group in batch.groups:
        frames = pixels_of(group, generator)
        frames = frames.view(len(batch.token_ids), -1, group.frames, *frames.shape[1:])[row]
        patches.append(patchify(frames.expand(-1, 2, -1, -1, -1)).flatten(0, 1))
        grids += [grid_of(group.height, group.width)] * len(frames)
    if form == "video":
        grids = [(len(grids), *grids[0][1:])]
    blocks = batch.block_ids[row]
    of_row = batch.predicting_index // batch.token_ids.shape[1] == row
    for block in range(1, int(blocks.max()) + 1) or [0]:
        kept = (blocks == 0) | (blocks == block)
        chat = batch.token_ids[row][kept][None]
        reference, positions = single_chat(random_model, chat, torch.cat(patches), grids, form)
        torch.testing.assert_close(batch.position_ids[:, row][:, kept], positions)
        places = batch.predicting_index[of_row] % batch.token_ids.shape[1]
        mine = kept[places]
        expected = reference[(kept.cumsum(0) - 1)[places[mine]]]
        torch.testing.assert_close(logits[of_row][mine], expected, rtol=1e-3, atol=1e-3)


def single_chat(
    model: Qwen2VLForConditionalGeneration, chat: torch.Tensor, patches: torch.Tensor, grids: list[Grid], form: Form
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own logits [tokens, vocab] and position ids [3, tokens]."""
    image_pad, video_pad = VISION_PADS
    types = (chat == image_pad).int() + 2 * (chat == video_pad).int()
    kind = "video" if form == "video" else "image"
    grid_thw = {f"{kind}_grid_thw": torch.tensor(grids)}
    positions, _ = model.model.get_rope_index(chat, types, **grid_thw)
    pixels = {"pixel_values_videos" if form == "video" else "pixel_values": patches}
    output = model(input_ids=chat, mm_token_type_ids=types, **pixels, **grid_thw)
    return output.logits[0], positions[:, 0]
