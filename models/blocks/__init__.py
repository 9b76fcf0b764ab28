"""Parts that more than one network uses."""

from models.blocks.conv import Padding, SamePadConv3d, SamePadConvTranspose3d
from models.blocks.norm import Norm, SyncBatchNorm, make_norm

__all__ = ["Norm", "Padding", "SamePadConv3d", "SamePadConvTranspose3d", "SyncBatchNorm", "make_norm"]
