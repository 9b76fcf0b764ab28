"""Parts that more than one network uses."""

from models.blocks.conv import Padding, SamePadConv3d, SamePadConvTranspose3d, Stream, TimePlacement
from models.blocks.norm import FrameGroupNorm, Norm, SyncBatchNorm, make_norm
from models.blocks.residual import ResBlock

__all__ = [
    "FrameGroupNorm",
    "Norm",
    "Padding",
    "ResBlock",
    "SamePadConv3d",
    "SamePadConvTranspose3d",
    "Stream",
    "SyncBatchNorm",
    "TimePlacement",
    "make_norm",
]
