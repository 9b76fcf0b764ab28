"""From a 2D tokenizer to a 3D one: kernels of images become kernels of clips.

A 2D tokenizer is the same class with `is_2d`, so its weights have the names and, but for the kernels' length in time,
the shapes of the 3D one. A kernel W of k frames is made of the image's kernel w by one of three rules:

    central (MAGVIT, section 3.1)           W[k // 2] = w, all else 0
    average (Carreira and Zisserman, 2017)  W[i] = w / k for all i
    last (MAGVIT-v2)                        W[k - 1] = w, all else 0: for causal convolutions

A transposed convolution of stride s gives each of its frames k / s of the kernel's slices, so s slices in a row share
the role of one: the central two of four for s = 2; the first s for `last`, which are those of the newest latent; and
`average` divides by k / s. Where channels become time (the up-sampling of MAGVIT-v2), those of the image are repeated
for each of the frames.

With `central` a constant video gives the images' result at every frame, whatever the padding, but for group norm over a
clip that is not constant. With `last` so does a causal network with padding `zero` or `replicate`; with `average`
networks that replicate or reflect.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from models.tokenizers.causal import DepthToSpaceUpsample

Inflation = Literal["central", "average", "last"]


@torch.no_grad()
def inflate(network: nn.Module, images: Mapping[str, Tensor], method: Inflation) -> list[str]:
    """Set the weights of a 3D network to those of its 2D twin.

    Args:
        network: a tokenizer, an encoder, a decoder or a discriminator; changed in place.
        images: state dict of the 2D twin: kernels `[out, in, 1, h, w]`, or `[out, in, h, w]`.
        method: how kernels grow in time.

    Returns:
        Names of the network's entries that have no counterpart of a fitting shape; they keep their values.

    Raises:
        ValueError: if nothing fits: `images` are those of another network.
    """
    kept = []
    repeated = {
        f"{name}.conv.conv.{kind}": layer.depth_to_space.factors[0]
        for name, layer in network.named_modules()
        if isinstance(layer, DepthToSpaceUpsample)
        for kind in ("weight", "bias")
    }
    strides = {
        f"{name}.weight": layer.stride[0]
        for name, layer in network.named_modules()
        if isinstance(layer, nn.ConvTranspose3d)
    }
    for name, own in network.state_dict().items():
        image = images.get(name)
        if image is None:
            kept.append(name)
            continue
        if image.ndim == own.ndim - 1 == 4:
            image = image[:, :, None]
        image = image.repeat(repeated.get(name, 1), *[1] * (image.ndim - 1)) if image.ndim else image
        is_kernel = own.ndim == 5 and image.ndim == 5 and image.shape[2] == 1
        if is_kernel and own.shape[:2] + own.shape[3:] == image.shape[:2] + image.shape[3:]:
            own.copy_(image * time_profile(own.shape[2], strides.get(name), method).to(own)[:, None, None])
        elif own.shape == image.shape:
            own.copy_(image)
        else:
            kept.append(name)
    if len(kept) == len(network.state_dict()):
        raise ValueError(f"None of the weights fit {type(network).__name__}: they are those of another network.")
    return kept


def time_profile(frames: int, stride: int | None, method: Inflation) -> Tensor:
    """Factor of the image's kernel in each slice of a kernel.

    Args:
        frames: length k of the kernel in time.
        stride: of a transposed convolution; None for any other.
        method: how kernels grow.

    Returns:
        `[k]`, in double precision.
    """
    profile = torch.zeros(frames, dtype=torch.float64)
    share = stride or 1
    if method == "average":
        return profile + share / frames
    if stride is None:
        first = frames - 1 if method == "last" else frames // 2
    else:
        first = 0 if method == "last" else (frames - stride) // 2  # its slices run backwards in time
    profile[first : first + share] = 1
    return profile
