"""The three families of tokenizers beside plain versions of the same networks: training step, encoding, decoding.

The plain versions are written as a textbook would: pad, convolve, normalise, one line each, on the weights of ours. On
a GPU the networks have their published sizes, on a CPU small ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.report import Measurement, seconds_in_turn
from models.blocks.conv import SamePadConv3d, SamePadConvTranspose3d
from models.blocks.norm import FrameGroupNorm
from models.blocks.residual import ResBlock, ResStack
from models.random import keyed_generator
from models.tokenizers import (
    VQGAN3D,
    CausalDecoder,
    CausalEncoder,
    MAGVITDecoder,
    MAGVITEncoder,
    TimeAgnosticDecoder,
    TimeAgnosticEncoder,
    VectorQuantizer,
)
from models.tokenizers.causal import DecoderLevel
from models.tokenizers.magvit import AveragePool, UpsampleConv


@dataclass(frozen=True)
class Scale:
    """How large.

    Args:
        width: Channels of the first maps, relative to the published ones.
        resolution: Height and width.
        clips: Clips at once.
        codebook_size: Entries.
        long_frames: Frames of the video that passes in pieces.
        seconds: Least time of a measurement.
    """

    width: float
    resolution: int
    clips: int
    codebook_size: int
    long_frames: int
    seconds: float


PUBLISHED = Scale(1, 128, 4, 1024, 512, 3.0)
SMALL = Scale(1 / 8, 64, 2, 1024, 128, 3.0)
TOY = Scale(1 / 16, 16, 1, 16, 32, 0.0)


def run(quick: bool) -> list[Measurement]:
    """Measure all three families."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = TOY if quick else PUBLISHED if device.type == "cuda" else SMALL
    rows: list[Measurement] = []
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        tokenizer = make(scale).to(device)
        rows += measure(name, tokenizer, scale, device)
    return rows


def measure(name: str, tokenizer: VQGAN3D, scale: Scale, device: torch.device) -> list[Measurement]:
    """Time one family, ours and plain."""
    frames = 17 if tokenizer.encoder.is_causal else 16
    shape = (scale.clips, 3, frames, scale.resolution, scale.resolution)
    video = (torch.rand(shape, generator=keyed_generator(0)) * 2 - 1).to(device)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-5)

    def train(forward: Callable[[VQGAN3D, Tensor], tuple[Tensor, Tensor]]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            reconstruction, commitment = forward(tokenizer, video)
            loss = F.l1_loss(reconstruction, tokenizer.to_native(video)) + commitment
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def taken(*functions: Callable[[], object]) -> tuple[float, ...]:
        def synchronised(function: Callable[[], object]) -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return seconds_in_turn([partial(synchronised, function) for function in functions], scale.seconds)

    rows = []
    steps = taken(lambda: train(our_forward), lambda: train(plain_forward))
    rows.append(against(f"{name}: training step", *steps))
    with evaluating(tokenizer):
        latents = tokenizer.encode(video).latents
        encode = taken(lambda: tokenizer.encode(video), lambda: plain_codes(tokenizer, video))
        decode = taken(lambda: tokenizer.decode(latents), lambda: plain_decode(tokenizer, latents))
        for what, seconds in (("encoding", encode), ("decoding", decode)):
            rows.append(Measurement(f"{name}: {what}", scale.clips * frames / seconds[0], "frames/s"))
            rows.append(against(f"{name}: {what}", *seconds))
        if tokenizer.encoder.whole_clip_reason() is None:
            count = scale.long_frames + tokenizer.encoder.is_causal
            long = video.new_zeros(1, 3, count, *video.shape[3:])
            (pieces,) = taken(lambda: [None for _ in tokenizer.iter_encode(long)])
            rows.append(Measurement(f"{name}: encoding a long video in pieces", count / pieces, "frames/s"))
    return rows


def against(name: str, ours: float, plain: float) -> Measurement:
    """Our time over the plain version's; a tenth is what medians differ by on a busy machine."""
    details = {"ours_ms": 1e3 * ours, "plain_ms": 1e3 * plain}
    return Measurement(f"{name}, time / plain", ours / plain, "x", at_most=1.1, details=details)


@contextmanager
def evaluating(tokenizer: VQGAN3D) -> Iterator[None]:
    """No gradients, and no statistics of batches."""
    tokenizer.eval()
    with torch.no_grad():
        yield
    tokenizer.train()


# Ours


def time_agnostic(scale: Scale) -> VQGAN3D:
    """TATS, 4 x 8 x 8."""
    width = int(32 * scale.width)
    networks = (TimeAgnosticEncoder(base_channels=width), TimeAgnosticDecoder(base_channels=width))
    return VQGAN3D(networks[0], VectorQuantizer(scale.codebook_size, 256), networks[1], channels_last=True)


def magvit(scale: Scale) -> VQGAN3D:
    """MAGVIT-B."""
    width, groups = int(64 * scale.width), min(32, int(64 * scale.width))
    encoder = MAGVITEncoder(base_channels=width, norm_groups=groups)
    quantizer = VectorQuantizer(scale.codebook_size, 256)
    return VQGAN3D(encoder, quantizer, MAGVITDecoder(256, base_channels=width, norm_groups=groups), channels_last=True)


def causal(scale: Scale) -> VQGAN3D:
    """MAGVIT-v2, with the others' quantizer."""
    width, groups = int(128 * scale.width), min(32, int(128 * scale.width))
    blocks = 4 if scale.width == 1 else 1
    encoder = CausalEncoder(base_channels=width, norm_groups=groups, num_res_blocks=blocks)
    decoder = CausalDecoder(18, base_channels=width, norm_groups=groups, num_res_blocks=blocks)
    return VQGAN3D(encoder, VectorQuantizer(scale.codebook_size, 18), decoder, channels_last=True)


FAMILIES = {"time_agnostic": time_agnostic, "magvit": magvit, "causal": causal}


def our_forward(tokenizer: VQGAN3D, video: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction in the native range, and the quantizer's loss."""
    reconstruction, encoded = tokenizer(video)
    return reconstruction, encoded.losses["commitment"]


# The same as in a textbook


def plain_forward(tokenizer: VQGAN3D, video: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction in the native range, and the quantizer's loss; moves the codebook."""
    z = conv(tokenizer.pre_vq_conv, encode(tokenizer.encoder, tokenizer.to_native(video))).float()
    codebook = tokenizer.quantizer
    assert isinstance(codebook, VectorQuantizer)
    flat = z.movedim(1, -1).reshape(-1, z.shape[1])  # [n, D]
    codes = nearest(flat, codebook.embeddings)
    chosen = F.one_hot(codes, codebook.codebook_size).to(flat.dtype)  # [n, K]
    rows = (chosen @ codebook.embeddings).view(*z.movedim(1, -1).shape).movedim(-1, 1)
    with torch.no_grad():
        codebook.N.lerp_(chosen.sum(0), 0.01)
        codebook.z_avg.lerp_(chosen.T @ flat, 0.01)
        total = codebook.N.sum()
        weights = (codebook.N + 1e-7) / (total + codebook.codebook_size * 1e-7) * total
        codebook.embeddings.copy_(codebook.z_avg / weights[:, None])
    commitment = 0.25 * F.mse_loss(z, rows.detach())
    return decode(tokenizer, z + (rows - z).detach()), commitment


def plain_codes(tokenizer: VQGAN3D, video: Tensor) -> Tensor:
    """Codes `[B, t, h, w]`."""
    z = conv(tokenizer.pre_vq_conv, encode(tokenizer.encoder, tokenizer.to_native(video)))
    flat = z.movedim(1, -1)
    return nearest(flat.reshape(-1, z.shape[1]), tokenizer.quantizer.embeddings).view(flat.shape[:-1])  # type: ignore[arg-type]


def plain_decode(tokenizer: VQGAN3D, latents: Tensor) -> Tensor:
    """Video in [-1, 1]."""
    return tokenizer.from_native(decode(tokenizer, latents)).clamp(-1, 1)


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Numbers of the nearest entries."""
    distances = vectors.square().sum(1, keepdim=True) - 2 * vectors @ entries.T + entries.square().sum(1)
    return distances.argmin(1)


def encode(encoder: nn.Module, x: Tensor) -> Tensor:
    """Features of an encoder of any family."""
    x = conv(encoder.conv_first, x)  # type: ignore[arg-type]
    if isinstance(encoder, TimeAgnosticEncoder):
        for stage in encoder.conv_blocks:
            x = block(stage.res, conv(stage.down, x))  # type: ignore[arg-type]
    else:
        for layer in encoder.layers:  # type: ignore[union-attr]
            if isinstance(layer, ResStack):
                x = stack(layer, x)
            elif isinstance(layer, AveragePool):
                x = F.avg_pool3d(x, layer.stride, layer.stride, ceil_mode=True)
            else:
                x = conv(layer, x)
    return F.silu(norm(encoder.final_block[0], x))  # type: ignore[index, arg-type]


def decode(tokenizer: VQGAN3D, latents: Tensor) -> Tensor:
    """Video in the native range, by a decoder of any family."""
    decoder = tokenizer.decoder
    if isinstance(decoder, TimeAgnosticDecoder):
        x = conv(tokenizer.post_vq_conv, latents)  # type: ignore[arg-type]
        x = F.silu(norm(decoder.final_block[0], x))
        for stage in decoder.conv_blocks:
            x = conv_transpose(stage.up, x)  # type: ignore[arg-type]
            for residual in list(stage.children())[1:]:
                x = block(residual, x)  # type: ignore[arg-type]
        return conv(decoder.conv_last, x)
    x = conv(decoder.conv_first, latents)  # type: ignore[arg-type]
    x = stack(decoder.middle, x) if isinstance(decoder, CausalDecoder) else x
    for layer in decoder.layers:  # type: ignore[union-attr]
        if isinstance(layer, ResStack):
            x = stack(layer, x)
        elif isinstance(layer, UpsampleConv):
            x = conv(layer.conv, F.interpolate(x, scale_factor=layer.nearest.factors, mode="nearest"))
        elif isinstance(layer, DecoderLevel):
            size = (latents.shape[2] * layer.frames_per_latent, *x.shape[3:])
            shown = F.interpolate(latents, size, mode="nearest")[:, :, size[0] - x.shape[2] :]
            scale, shift = layer.ada_norm.modulation(shown).chunk(2, dim=1)
            x = stack(layer.blocks, norm(layer.ada_norm.norm, x) * (1 + scale) + shift)
        else:
            x = depth_to_space(conv(layer.conv, x), layer.depth_to_space.factors)
    return conv(decoder.conv_last, F.silu(norm(decoder.final_block[0], x)))  # type: ignore[arg-type, index]


def stack(blocks: ResStack, x: Tensor) -> Tensor:
    """Residual blocks."""
    for one in blocks:
        x = block(one, x)  # type: ignore[arg-type]
    return x


def block(layers: ResBlock, x: Tensor) -> Tensor:
    """Residual block."""
    h = conv(layers.conv1, F.silu(norm(layers.norm1, x)))
    h = conv(layers.conv2, F.silu(norm(layers.norm2, h)))
    return h + (x if layers.shortcut is None else conv(layers.shortcut, x))


def pad(layer: SamePadConv3d | SamePadConvTranspose3d, x: Tensor) -> Tensor:
    """Pad by kernel - stride, causal time in front."""
    time, height, width = ((k - s + 1) // 2 for k, s in zip(layer.kernel_size, layer.stride, strict=True))
    after = [k - s - p for k, s, p in zip(layer.kernel_size, layer.stride, (time, height, width), strict=True)]
    if layer.time_placement == "causal":
        time, after[0] = layer.kernel_size[0] - 1, 0
    return F.pad(x, (width, after[2], height, after[1], time, after[0]), mode=layer.padding)


def conv(layer: SamePadConv3d, x: Tensor) -> Tensor:
    """Convolution that keeps or divides the size."""
    return F.conv3d(pad(layer, x), layer.conv.weight, layer.conv.bias, layer.stride)


def conv_transpose(layer: SamePadConvTranspose3d, x: Tensor) -> Tensor:
    """Transposed convolution of kernel 4 that keeps or doubles the size."""
    return F.conv_transpose3d(pad(layer, x), layer.convt.weight, layer.convt.bias, layer.stride, padding=3)


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Group norm of frames, group norm of clips, or batch norm."""
    if isinstance(layer, FrameGroupNorm):
        frames = x.transpose(1, 2).flatten(0, 1)
        frames = F.group_norm(frames, layer.num_groups, layer.weight, layer.bias, layer.eps)
        return frames.unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training)


def depth_to_space(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Channels (time, height, width, rest) into time and space; the frames before the first are dropped."""
    s, p, q = factors
    b, c, t, h, w = x.shape
    x = x.view(b, s, p, q, c // (s * p * q), t, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return x.reshape(b, c // (s * p * q), t * s, h * p, w * q)[:, :, s - 1 :]
