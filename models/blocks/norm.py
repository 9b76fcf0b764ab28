"""Normalisation layers of the convolutional networks."""

from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from models.blocks.distributed import sum_over_ranks, world_size

Norm = Literal["batch", "group", "frame_group"]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all ranks, on the GPU and on the CPU.

    In one process this is plain batch normalisation. Over several, the GPU runs torch's `SyncBatchNorm`, which refuses
    CPU tensors; the CPU gets the same statistics and gradients from sums over the ranks. Not a subclass of torch's
    layer, since DistributedDataParallel refuses a CPU model that holds one.

    A penalty on gradients (R1) differentiates twice, which torch's layer cannot do: over ranks, its backward pass is a
    kernel and a sum that have no derivatives. `twice_differentiable` takes the sums over the ranks on the GPU as well,
    for more memory and time.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    process_group = None  # all ranks; torch's forward asks for it
    twice_differentiable = False

    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # [B, C, ...] of any rank
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[B, C, ...]` per channel."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        if input.is_cuda and not self.twice_differentiable:
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        return self._forward_over_ranks(input)

    def _forward_over_ranks(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        axes = [0, *range(2, input.ndim)]
        channels = (1, -1) + (1,) * (input.ndim - 2)
        x = input.to(self.weight.dtype)  # full precision under autocast
        count = sum_over_ranks(x.new_tensor(x.numel() / x.shape[1]))
        mean = sum_over_ranks(x.sum(axes)) / count  # [C]
        centered = x - mean.view(channels)
        # a second pass over the centred values: mean(x^2) - mean(x)^2 would cancel
        var = sum_over_ranks(centered.square().sum(axes)) / count  # [C]
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()  # [C]
        return (centered * scale.view(channels) + self.bias.view(channels)).to(input.dtype)


class FrameGroupNorm(nn.GroupNorm):
    """Group normalisation of each frame by itself: what a causal network needs (MAGVIT-v2).

    Statistics over the whole clip would tell the first frame of the last one, and an image would be another one as a
    video of a single frame.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[B, C, T, H, W]` over the height, width and channels of a group."""
        if input.shape[2] == 0:  # a piece of a stream
            return input
        frames = super().forward(rearrange(input, "b c t h w -> (b t) c h w"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(input))


def make_norm(norm: Norm, channels: int, num_groups: int = 32) -> nn.Module:
    """Build a normalisation layer: batch (epsilon 1e-5), or group of the clip or of each frame (epsilon 1e-6).

    Raises:
        ValueError: if the channels do not divide into the groups.
    """
    if norm == "batch":
        return SyncBatchNorm(channels)
    if channels % num_groups:
        raise ValueError(
            f"norm='{norm}' has {num_groups} groups, which do not divide {channels} channels: raise base_channels"
        )
    layer = nn.GroupNorm if norm == "group" else FrameGroupNorm
    return layer(num_groups, channels, eps=1e-6)
