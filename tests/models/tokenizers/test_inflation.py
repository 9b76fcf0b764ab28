"""What a 2D tokenizer does with an image, the 3D one made of it does with a constant video."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from toy_networks import causal, magvit, noise, randomised, time_agnostic

from models.blocks import SamePadConv3d, SamePadConvTranspose3d
from models.tokenizers import VQGAN3D, GradientVectorQuantizer, PatchDiscriminator, StyleGANDiscriminator
from models.tokenizers.inflation import Inflation, inflate

FLAT = {"is_2d": True, "temporal_downsample": (False, False)}
TWINS: dict[str, tuple[Callable[..., VQGAN3D], dict[str, Any]]] = {
    "magvit": (magvit, FLAT),
    "causal": (causal, FLAT),
    "time-agnostic": (time_agnostic, {"is_2d": True, "downsample": (1, 8, 8)}),
}


def inflated(kind: str, method: Inflation, **options: Any) -> tuple[VQGAN3D, VQGAN3D]:
    """A 2D tokenizer, and a 3D one made of it."""
    make, flat = TWINS[kind]
    images, video = make(**options, **flat), make(**options)
    nn.init.zeros_(next(video.parameters()))  # another start
    assert inflate(video, images.state_dict(), method) == []
    return images, video


def still(tokenizer: VQGAN3D) -> tuple[Tensor, Tensor]:
    """An image, and a video that shows nothing else."""
    image = noise(1, 3, 1, 16, 16)
    frames = 9 if tokenizer.encoder.is_causal else 16
    return image, image.expand(-1, -1, frames, -1, -1)


def deviation(images: VQGAN3D, tokenizer: VQGAN3D) -> float:
    """How far encoding and decoding of a still video are from those of the image, at the worst frame."""
    image, video = still(tokenizer)
    expected, actual = images.encode(image).latents, tokenizer.encode(video).latents
    assert actual.shape[2] > 1
    decoded, frames = images.decode_native(expected), tokenizer.decode_native(expected.expand_as(actual))
    return max((actual - expected).abs().max().item(), (frames - decoded).abs().max().item())


@pytest.mark.parametrize("padding", ["zero", "replicate", "reflect"])
@pytest.mark.parametrize("kind", TWINS)
def test_central_inflation_shows_a_still_video_as_the_image(kind: str, padding: str) -> None:
    difference = deviation(*inflated(kind, "central", padding=padding))
    if kind == "causal" and padding == "zero":  # the central slice looks at the past, which is black
        assert difference > 1e-3
    else:
        assert difference < 1e-10


@pytest.mark.parametrize("kind", TWINS)
def test_average_inflation_does_so_where_borders_are_replicated(kind: str) -> None:
    assert deviation(*inflated(kind, "average", padding="replicate")) < 1e-10
    assert deviation(*inflated(kind, "average", padding="zero")) > 1e-3


@pytest.mark.parametrize("down_kernel", [3, 4])
@pytest.mark.parametrize("padding", ["zero", "replicate", "reflect"])
def test_last_slice_inflation_is_made_for_causal_networks(padding: str, down_kernel: int) -> None:
    images, video = inflated("causal", "last", padding=padding, down_kernel=down_kernel)
    assert deviation(images, video) < 1e-10
    image, _ = still(video)
    latents = images.encode(image).latents
    assert torch.allclose(video.encode(image).latents, latents, atol=1e-10)  # an image through the 3D network
    assert torch.allclose(video.decode_native(latents), images.decode_native(latents), atol=1e-10)


def test_last_slice_inflation_of_time_agnostic_networks_needs_replicated_borders() -> None:
    assert deviation(*inflated("time-agnostic", "last", padding="replicate")) < 1e-10
    assert deviation(*inflated("time-agnostic", "last", padding="zero")) > 1e-3


def flat_and_deep(method: Inflation, transposed: bool, stride: int) -> tuple[nn.Module, nn.Module]:
    if transposed:
        flat, deep = SamePadConvTranspose3d(2, 3, (1, 2, 2), is_2d=True), SamePadConvTranspose3d(2, 3, (stride, 2, 2))
    else:
        flat, deep = SamePadConv3d(2, 3, 4, (1, 2, 2), is_2d=True), SamePadConv3d(2, 3, 4, (stride, 2, 2))
    nn.Module.double(flat)
    assert inflate(deep.double(), flat.state_dict(), method) == []
    return flat, deep


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_centrally_inflated_convolution_works_frame_by_frame(kernel_size: int) -> None:
    flat, deep = SamePadConv3d(2, 3, kernel_size, is_2d=True), SamePadConv3d(2, 3, kernel_size)
    inflate(deep, flat.state_dict(), "central")
    x = noise(1, 2, 5, 6, 6).float()
    assert torch.allclose(deep(x), flat(x), atol=1e-6)


@pytest.mark.parametrize("method", get_args(Inflation))
def test_slices_of_a_kernel(method: Inflation) -> None:
    expected = {
        "central": {"conv": [0, 0, 1, 0], 1: [0, 1, 0, 0], 2: [0, 1, 1, 0]},
        "average": {"conv": [0.25] * 4, 1: [0.25] * 4, 2: [0.5] * 4},
        "last": {"conv": [0, 0, 0, 1], 1: [1, 0, 0, 0], 2: [1, 1, 0, 0]},
    }[method]
    for stride in (1, 2):
        for transposed in (False, True):
            flat, deep = flat_and_deep(method, transposed, stride)
            image, kernel = next(flat.parameters()), next(deep.parameters())
            profile = expected[stride if transposed else "conv"]
            assert torch.allclose(kernel, torch.stack([factor * image[:, :, 0] for factor in profile], dim=2))


@pytest.mark.parametrize("method", get_args(Inflation))
def test_other_weights_are_copied(method: Inflation) -> None:
    flat, deep = magvit(GradientVectorQuantizer(8, 3), **FLAT), magvit(GradientVectorQuantizer(8, 3))
    state = {name: value * 1.5 for name, value in flat.state_dict().items()}
    inflate(deep, state, method)
    copied = [name for name, value in deep.state_dict().items() if value.shape == state[name].shape]
    assert {name.split(".")[-1] for name in copied} == {"weight", "bias", "embeddings"}
    assert "encoder.layers.4.0.shortcut.conv.weight" in copied  # kernels of size 1
    assert all(torch.equal(deep.state_dict()[name], state[name]) for name in copied)


@pytest.mark.parametrize("blur", [False, True])
def test_a_centrally_inflated_discriminator_judges_a_still_clip_as_the_image(blur: bool) -> None:
    options = {"resolution": 16, "base_channels": 2, "channel_multipliers": (2, 2), "blur": blur}
    flat = randomised(StyleGANDiscriminator(1, is_2d=True, **options))
    deep = randomised(StyleGANDiscriminator(4, **options))
    assert inflate(deep, flat.state_dict(), "central") == []
    image = noise(2, 3, 1, 16, 16)
    logits, still_logits = flat(image)[0], deep(image.expand(-1, -1, 4, -1, -1))[0]
    if blur:  # zeros beyond the clip darken its ends
        assert not torch.allclose(logits, still_logits, atol=1e-3)
    else:
        assert torch.allclose(logits, still_logits, atol=1e-10)


def test_kernels_of_images_without_a_time_axis_are_inflated_too() -> None:
    flat, deep = PatchDiscriminator(2, base_channels=2), PatchDiscriminator(3, base_channels=2)
    assert inflate(deep, flat.state_dict(), "average") == []
    assert torch.allclose(deep.model1[0].weight.sum(2), flat.model1[0].weight)


def test_what_does_not_fit_keeps_its_values_and_is_named() -> None:
    flat, deep = magvit(**FLAT), magvit(base_channels=6)
    state = dict(flat.state_dict())
    before = deep.encoder.conv_first.conv.weight.clone()
    kept = inflate(deep, state, "central")
    assert "encoder.conv_first.conv.weight" in kept
    assert torch.equal(deep.encoder.conv_first.conv.weight, before)
    assert "decoder.conv_last.conv.bias" not in kept
    with pytest.raises(ValueError, match="None of the weights fit VQGAN3D"):
        inflate(magvit(), causal().encoder.layers[0].state_dict(), "central")
