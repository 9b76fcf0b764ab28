"""Toy tokenizers of every kind, with weights that no initialisation has made special, in float64 and evaluation."""

from typing import Any

import torch
from torch import Tensor, nn

from models.random import keyed_generator
from models.tokenizers import (
    VQGAN3D,
    CausalDecoder,
    CausalEncoder,
    ContinuousLatents,
    MAGVITDecoder,
    MAGVITEncoder,
    Quantizer,
    TimeAgnosticDecoder,
    TimeAgnosticEncoder,
)

SMALL: dict[str, Any] = {"base_channels": 4, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1, "norm_groups": 2}
LATENT_DIM = 3


def randomised(network: nn.Module) -> Any:
    generator = keyed_generator(0)
    network.double().eval()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim > 1:
            value.normal_(0, (value.shape[0] / value.numel()) ** 0.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(0.3, 0.3, generator=generator)
    return network.requires_grad_(False)


def time_agnostic(quantizer: Quantizer | None = None, **options: Any) -> VQGAN3D:
    """4 x 8 x 8 pixels a latent, unless the options say otherwise."""
    options = {"base_channels": 2} | options
    quantizer = quantizer or ContinuousLatents(LATENT_DIM)
    return randomised(VQGAN3D(TimeAgnosticEncoder(**options), quantizer, TimeAgnosticDecoder(**options)))


def magvit(quantizer: Quantizer | None = None, **options: Any) -> VQGAN3D:
    """4 x 4 x 4 pixels a latent, unless the options say otherwise."""
    options = SMALL | {"temporal_downsample": (True, True)} | options
    quantizer = quantizer or ContinuousLatents(LATENT_DIM)
    decoder = MAGVITDecoder(quantizer.dim, **options)
    return randomised(VQGAN3D(MAGVITEncoder(**options), quantizer, decoder, (0.0, 1.0)))


def causal(quantizer: Quantizer | None = None, down_kernel: int = 3, **options: Any) -> VQGAN3D:
    """4 x 4 x 4 pixels a latent, unless the options say otherwise."""
    options = SMALL | {"temporal_downsample": (True, True)} | options
    quantizer = quantizer or ContinuousLatents(LATENT_DIM)
    encoder = CausalEncoder(down_kernel=down_kernel, **options)
    return randomised(VQGAN3D(encoder, quantizer, CausalDecoder(quantizer.dim, **options)))


def noise(*shape: int) -> Tensor:
    """Values in [-1, 1]."""
    return torch.rand(shape, generator=keyed_generator(1), dtype=torch.float64) * 2 - 1


def frames_that_differ(a: Tensor, b: Tensor) -> list[int]:
    """Indices along time at which two tensors `[B, C, T, H, W]` are not equal."""
    return (a != b).any(0).any(0).flatten(1).any(1).nonzero().flatten().tolist()
