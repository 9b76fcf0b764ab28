"""The world of the embedded moving shapes: its names, colours and geometry.

Whoever draws it (the data set) and whoever judges what a model has made of it (the oracle) read them here.
"""

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("horizontal", "vertical", "diagonal")
CLASS_NAMES = tuple(f"{motion} {shape}" for shape in SHAPES for motion in MOTIONS)
COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "yellow": (1.0, 1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "cyan": (-1.0, 1.0, 1.0),
    "blue": (-1.0, -1.0, 1.0),
    "magenta": (1.0, -1.0, 1.0),
}


def signed_distance(shape: int, x: Tensor, y: Tensor, radius: float | Tensor) -> Tensor:
    """Distance to the outline of a shape that fills `[-radius, radius]^2`, negative inside.

    Exact inside and along the sides; past a corner it is the distance to the nearer side's line, which draws corners
    sharp.

    Args:
        shape: index into `SHAPES`.
        x: to the right of the centre, in any unit.
        y: below the centre, in the same unit; broadcasts with `x`.
        radius: half the width and height, in the same unit.
    """
    match SHAPES[shape]:
        case "circle":
            return (x.square() + y.square()).sqrt() - radius
        case "square":
            return torch.maximum(x.abs(), y.abs()) - radius
        case "triangle":  # tip up; the sides run from (0, -radius) to (+-radius, radius)
            slanted = (2 * x.abs() - y - radius) * 5**-0.5
            return torch.maximum(slanted, y - radius)
        case _:  # cross, with arms a third as thick as long
            ax, ay = x.abs(), y.abs()
            across = torch.maximum(ax - radius, ay - radius / 3)
            return torch.minimum(across, torch.maximum(ax - radius / 3, ay - radius))
