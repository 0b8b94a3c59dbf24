"""What a picture goes through on its way into the model, in torch and for a whole batch at once.

The same shapes, resize and patches as `scenes.render` and the image processor, so that training sees what serving sees.
Shapes: P pictures of one size H x W, K shapes in each; all pixels are float32 grey levels 0 to 255.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from deploy.shapes.model import IMAGE_MEAN, IMAGE_STD
from deploy.shapes.scenes import COLOURS, KINDS, MERGE_SIZE, PATCH_SIZE, covers

CUBIC_SUPPORT, CUBIC_A = 2.0, -0.5  # Pillow's bicubic
LUMA = (0.299, 0.587, 0.114)


def draw(shapes: Tensor, backgrounds: Tensor, palette: Tensor, height: int, width: int) -> Tensor:
    """Pictures [P, 3, H, W] without noise.

    `shapes` [P, K, 5] holds the index of the kind, the index of the colour, x, y and radius; a radius of 0 marks a
    shape that is not there. `backgrounds` is [P, 3], `palette` the colours as [number of colours, 3].
    """
    device = shapes.device
    y = torch.arange(height, device=device, dtype=torch.float32)[:, None] + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32)[None, :] + 0.5
    pixels = backgrounds[:, :, None, None].expand(-1, -1, height, width)
    for index in range(shapes.shape[1]):
        fill = palette[shapes[:, index, 1].long()][:, :, None, None]
        pixels = torch.where(covered(shapes[:, index], x, y)[:, None], fill, pixels)
    return pixels


def covered(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """bool [P, H, W]: which points of a grid, columns `x` [1, W] and rows `y` [H, 1], `shape` [P, 5] covers."""
    kind, _, centre_x, centre_y, radius = (value[:, None, None] for value in shape.unbind(-1))
    scale = 1.0 / radius.clamp(min=1e-3)
    dx, dy = (x - centre_x) * scale, (y - centre_y) * scale
    inside = torch.zeros_like(dx * dy, dtype=torch.bool)
    for number, name in enumerate(KINDS):
        inside = inside | ((kind == number) & covers(name, dx, dy))
    return inside & (radius > 0)


def palette_on(device: torch.device) -> Tensor:
    return constant(tuple(COLOURS.values()), device)


def add_noise(pixels: Tensor, deviations: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of a standard deviation [P] per picture, rounded to whole grey levels as a file is."""
    noise = torch.randn(pixels.shape, device=pixels.device, generator=generator)
    return (pixels + deviations[:, None, None, None] * noise).clamp(0, 255).round()


def imitate_jpeg(pixels: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """What JPEG does at high quality: colour at half the resolution, and a little error of standard deviation
    `strength` [P] grey levels."""
    height, width = pixels.shape[2:]
    red, green, blue = LUMA
    luma = (red * pixels[:, 0] + green * pixels[:, 1] + blue * pixels[:, 2])[:, None]
    chroma = pixels - luma
    halved = F.avg_pool2d(chroma, 2, ceil_mode=True, count_include_pad=False)
    chroma = F.interpolate(halved, scale_factor=2.0, mode="bilinear", align_corners=False)[:, :, :height, :width]
    return add_noise(luma + chroma, strength, generator)


@lru_cache
def constant(values: tuple[object, ...], device: torch.device) -> Tensor:
    """A tensor of these numbers that is copied to the device once; each copy would make the host wait for it."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=2048)
def resize_weights(size: int, new_size: int, device: torch.device) -> Tensor:
    """Pillow's antialiased bicubic resize of one axis as a matrix [new_size, size]."""
    scale = size / new_size
    centres = (torch.arange(new_size, dtype=torch.float64, device=device)[:, None] + 0.5) * scale
    places = torch.arange(size, dtype=torch.float64, device=device)[None, :] + 0.5
    offset = ((places - centres) / max(scale, 1.0)).abs()
    near = (CUBIC_A + 2.0) * offset**3 - (CUBIC_A + 3.0) * offset**2 + 1.0
    far = CUBIC_A * (offset**3 - 5.0 * offset**2 + 8.0 * offset - 4.0)
    weights = torch.where(offset < 1.0, near, torch.where(offset < CUBIC_SUPPORT, far, torch.zeros_like(offset)))
    return (weights / weights.sum(1, keepdim=True)).float()


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bicubic resize to whole grey levels: columns first, then rows."""
    if pixels.shape[3] != width:
        across = resize_weights(pixels.shape[3], width, pixels.device)
        pixels = (pixels @ across.T).clamp(0, 255).round()
    if pixels.shape[2] != height:
        down = resize_weights(pixels.shape[2], height, pixels.device)
        pixels = (down @ pixels).clamp(0, 255).round()
    return pixels


def patchify(frames: Tensor) -> Tensor:
    """Pairs of frames [U, 2, 3, H, W] -> normalised patches [U, S, 3 * 2 * 14 * 14] as Qwen2-VL orders them."""
    num_units, num_frames, channels, height, width = frames.shape
    mean, deviation = (255.0 * constant(values, frames.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
    blocks = ((frames - mean) / deviation).reshape(
        num_units,
        num_frames,
        channels,
        rows // MERGE_SIZE,
        MERGE_SIZE,
        PATCH_SIZE,
        columns // MERGE_SIZE,
        MERGE_SIZE,
        PATCH_SIZE,
    )
    patch_dim = channels * num_frames * PATCH_SIZE**2
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(num_units, rows * columns, patch_dim)
