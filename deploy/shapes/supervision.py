"""Auxiliary losses: what the generator knows about every place of a picture, asked of the features there.

From answers alone the vision tower finds colours within a thousand steps, but knew no kinds after 8,000: an answer says
which kind, not where it shows. Two linear heads, used in training only, say where: one on the vision features (which
shape touches this cell, and how), one on an early layer of the language model (which cell of which picture this is).

Shapes: U units of a group, V cells (tokens) of a unit, K shapes of a picture, 2 frames in a unit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploy.shapes.batches import MAX_FRAMES, Batch, PictureGroup
from deploy.shapes.drawing import covered
from deploy.shapes.scenes import COLOURS, KINDS, MERGE_SIZE, grid_of

NUM_KINDS, NUM_COLOURS, NUM_GEOMETRY = len(KINDS) + 1, len(COLOURS), 3  # kind 0 is the background
POINTS = 7  # along a side of a cell, at which the outline of the shapes is asked for
BACKGROUND_WEIGHT = 0.1
GEOMETRY_WEIGHTS = (0.25, 0.25, 1.0)  # of x, y, radius
FRAME_OUTPUTS = NUM_KINDS + NUM_COLOURS + 1 + NUM_GEOMETRY + POINTS**2


@dataclass(frozen=True, slots=True)
class CellTargets:
    """What is in each cell of each frame, [U, 2, V]. Geometry [U, 2, V, 3] is the offset of the cell from the centre of
    the shape in x and y, in cells, and the binary logarithm of the shape's radius in cells: sizes are told apart by
    their ratio."""

    kind: Tensor
    colour: Tensor
    is_centre: Tensor
    geometry: Tensor
    outline: Tensor  # [U, 2, V, POINTS ** 2]: which points of the cell a shape covers


def cell_targets(group: PictureGroup) -> CellTargets:
    """A cell belongs to the nearest shape whose bounding box touches it."""
    _, rows, columns = (side // MERGE_SIZE for side in grid_of(group.height, group.width))
    device = group.shapes.device
    kind, colour, x, y, radius = group.shapes.unbind(-1)  # each [P, K]
    x, y = x * columns / group.width, y * rows / group.height
    radius_x, radius_y = radius * columns / group.width, radius * rows / group.height
    log_radius = ((radius_x + radius_y) / 2).clamp(min=0.1).log2()
    cell = torch.arange(rows * columns, device=device)
    cell_x, cell_y = (cell % columns) + 0.5, (cell // columns) + 0.5  # [V]
    dx, dy = cell_x[:, None] - x[:, None], cell_y[:, None] - y[:, None]  # [P, V, K]
    present = (radius > 0)[:, None]
    touches = present & (dx.abs() < radius_x[:, None] + 0.5) & (dy.abs() < radius_y[:, None] + 0.5)
    is_centre = present & (dx.abs() <= 0.5) & (dy.abs() <= 0.5)
    distance = torch.where(touches, dx.square() + dy.square(), torch.inf)
    nearest = distance.argmin(-1)  # [P, V]
    touched = touches.any(-1)

    def pick(values: Tensor) -> Tensor:
        return values[:, None].expand_as(dx).gather(-1, nearest[..., None])[..., 0]

    def along(offsets: Tensor) -> Tensor:
        return offsets.gather(-1, nearest[..., None])[..., 0]

    def paired(values: Tensor) -> Tensor:
        """[P, V, ...] -> [U, 2, V, ...]; a still is both frames of its unit."""
        return values.reshape(-1, group.frames, *values.shape[1:]).expand(-1, 2, *values.shape[1:])

    return CellTargets(
        kind=paired(torch.where(touched, pick(kind).long() + 1, 0)),
        colour=paired(pick(colour).long()),
        is_centre=paired(is_centre.any(-1).float()),
        geometry=paired(torch.stack([along(dx), along(dy), pick(log_radius)], dim=-1)),
        outline=paired(outline_points(group, rows, columns)),
    )


def outline_points(group: PictureGroup, rows: int, columns: int) -> Tensor:
    """[P, V, POINTS ** 2], 1 where a shape covers the point. The outline is what makes a kind, and is easy to see."""
    device = group.shapes.device
    y = (torch.arange(rows * POINTS, device=device)[:, None] + 0.5) * (group.height / (rows * POINTS))
    x = (torch.arange(columns * POINTS, device=device)[None, :] + 0.5) * (group.width / (columns * POINTS))
    points = torch.stack([covered(shape, x, y) for shape in group.shapes.unbind(1)]).any(0)
    cells = points.view(-1, rows, POINTS, columns, POINTS).permute(0, 1, 3, 2, 4)
    return cells.reshape(len(points), rows * columns, POINTS**2).float()


class AuxiliaryHeads(nn.Module):
    """Used in training only; not part of the checkpoint."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.shapes = nn.Linear(hidden_size, 2 * FRAME_OUTPUTS)
        self.places = nn.Linear(hidden_size, 2 + MAX_FRAMES)

    def shape_loss(self, group: PictureGroup, features: Tensor) -> Tensor:
        """`features` [U, V, hidden] as the vision tower gives them."""
        targets = cell_targets(group)
        outputs = self.shapes(features.float()).unflatten(-1, (2, FRAME_OUTPUTS)).transpose(1, 2)  # [U, 2, V, outputs]
        kind, colour, centre, geometry, outline = outputs.split(
            [NUM_KINDS, NUM_COLOURS, 1, NUM_GEOMETRY, POINTS**2], dim=-1
        )
        touched = (targets.kind > 0).float()
        num_touched = touched.sum().clamp(min=1.0)
        # Most cells are background; they must not drown the kinds.
        balance = torch.ones(NUM_KINDS, device=kind.device)
        balance[0] = BACKGROUND_WEIGHT
        kind_loss = F.cross_entropy(kind.flatten(0, 2), targets.kind.flatten(), balance)
        colour_loss = F.cross_entropy(colour.flatten(0, 2), targets.colour.flatten(), reduction="none")
        colour_loss = (colour_loss * touched.flatten()).sum() / num_touched
        centre_loss = F.binary_cross_entropy_with_logits(centre[..., 0], targets.is_centre)
        errors = F.smooth_l1_loss(geometry, targets.geometry, reduction="none", beta=0.25)
        geometry_loss = (errors * errors.new_tensor(GEOMETRY_WEIGHTS)).sum(-1)
        geometry_loss = (geometry_loss * touched).sum() / num_touched
        outline_loss = F.binary_cross_entropy_with_logits(outline, targets.outline, reduction="none").mean(-1)
        weight = touched + BACKGROUND_WEIGHT
        outline_loss = (outline_loss * weight).sum() / weight.sum()
        return kind_loss + colour_loss + centre_loss + geometry_loss + 2.0 * outline_loss

    def place_loss(self, batch: Batch, early: Tensor) -> Tensor:
        """`early` [B * vision tokens of a row, hidden]: an early layer of the language model at the vision tokens."""
        places, numbers = vision_places(batch)
        outputs = self.places(early.float()).view(len(batch.token_ids), -1, 2 + MAX_FRAMES)
        place, number = outputs.split([2, MAX_FRAMES], dim=-1)
        place_loss = F.mse_loss(place, places.expand_as(place))
        number_loss = F.cross_entropy(number.flatten(0, 1), numbers.expand(len(outputs), -1).flatten())
        return 10.0 * place_loss + number_loss


def vision_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """For the vision tokens of a row: (x, y) of the cell as shares of the picture, and the number of its unit."""
    places, numbers = [], []
    count = 0
    num_rows = len(batch.token_ids)
    for group in batch.groups:
        _, rows, columns = (side // MERGE_SIZE for side in grid_of(group.height, group.width))
        device = group.shapes.device
        cell = torch.arange(rows * columns, device=device)
        place = torch.stack([(cell % columns + 0.5) / columns, (cell // columns + 0.5) / rows], dim=-1)
        num_units = len(group.shapes) // group.frames // num_rows
        places.append(place.repeat(num_units, 1))
        numbers.append(torch.arange(count, count + num_units, device=device).repeat_interleave(rows * columns))
        count += num_units
    return torch.cat(places), torch.cat(numbers)
