"""Patch discriminators of TATS: one looks at single frames, one at whole clips."""

from typing import Literal

from torch import Tensor, nn

from models.blocks.norm import SyncBatchNorm


class PatchDiscriminator(nn.Module):
    """Convolutional classifier of overlapping patches.

    Kernel 4, two zeros of padding; all convolutions but the last two halve each axis; batch norm (over all ranks) and
    leaky ReLU in between.

    Args:
        num_axes: 2 for frames, 3 for clips.
        in_channels: Channels of the video.
        base_channels: Channels of the first map; they double up to 512.
        num_layers: Number of halving convolutions.
    """

    def __init__(
        self, num_axes: Literal[2, 3], in_channels: int = 3, base_channels: int = 64, num_layers: int = 3
    ) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[num_axes]
        widths = [min(base_channels * 2**i, 512) for i in range(num_layers + 1)]
        self.num_maps = num_layers + 2
        self.model0 = nn.Sequential(conv(in_channels, widths[0], 4, stride=2, padding=2), nn.LeakyReLU(0.2))
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            stage = nn.Sequential(
                conv(widths[i - 1], widths[i], 4, stride=stride, padding=2),
                SyncBatchNorm(widths[i]),
                nn.LeakyReLU(0.2),
            )
            self.add_module(f"model{i}", stage)
        self.add_module(f"model{num_layers + 1}", nn.Sequential(conv(widths[-1], 1, 4, stride=1, padding=2)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Judge frames `[B, C, H, W]` or clips `[B, C, T, H, W]`.

        Returns:
            Logits, one a patch, and the hidden maps from first to last.
        """
        maps = []
        for i in range(self.num_maps):
            x = self.get_submodule(f"model{i}")(x)
            maps.append(x)
        return maps[-1], maps[:-1]
