"""MAGVIT's encoder and decoder: layer lists, published sizes, and that every latent sees the whole clip."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_networks import causal, frames_that_differ, magvit, noise

from models.tokenizers import VQGAN3D, GradientVectorQuantizer, MAGVITDecoder, MAGVITEncoder
from models.tokenizers.magvit import AveragePool
from models.tokenizers.networks import from_patches, to_patches


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("options", "encoder", "decoder"),
    [
        ({}, 17_149_888, 23_167_811),
        ({"base_channels": 128}, 68_443_776, 89_106_051),
        ({"channel_multipliers": (1, 2, 4)}, 15_379_392, 20_954_819),
        ({"base_channels": 128, "channel_multipliers": (1, 2, 4)}, 61_363_840, 80_256_387),
        ({"is_2d": True, "temporal_downsample": (False, False, False)}, 5_792_320, 7_755_203),
        ({"is_2d": True, "temporal_downsample": (False,) * 3, "base_channels": 128}, 23_020_416, 29_821_827),
    ],
    ids=["B", "L", "B-64", "L-64", "2D-B", "2D-L"],
)
def test_published_parameter_counts(options: dict, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        tokenizer = VQGAN3D(MAGVITEncoder(**options), GradientVectorQuantizer(), MAGVITDecoder(**options), (0, 1))
    # the encoder's last convolution is the tokenizer's
    assert (size(tokenizer.encoder) + size(tokenizer.pre_vq_conv), size(tokenizer.decoder)) == (encoder, decoder)
    assert size(tokenizer) == encoder + decoder + 1024 * 256
    assert size(tokenizer.post_vq_conv) == 0


@pytest.mark.parametrize(("multipliers", "pixels"), [((1, 2, 2, 4), 128), ((1, 2, 4), 64)])
def test_sixteen_frames_have_four_by_sixteen_by_sixteen_latents(multipliers: tuple[int, ...], pixels: int) -> None:
    with torch.device("meta"):
        options = {"base_channels": 2, "norm_groups": 2, "channel_multipliers": multipliers}
        features = MAGVITEncoder(**options)(torch.empty(1, 3, 16, pixels, pixels))
        assert features.shape == (1, 8, 4, 16, 16)
        assert MAGVITDecoder(8, **options)(features).shape == (1, 3, 16, pixels, pixels)


def test_time_is_halved_at_the_side_of_the_pixels() -> None:
    with torch.device("meta"):
        encoder = MAGVITEncoder(base_channels=2, norm_groups=2)
        sizes = []
        for layer in encoder.layers:
            layer.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:4])))
        encoder(torch.empty(1, 3, 16, 128, 128))
    levels = [(2, 16, 128), (2, 8, 64), (4, 8, 64), (4, 4, 32), (4, 4, 32), (4, 4, 16), (8, 4, 16), (8, 4, 16)]
    assert sizes == levels


def test_only_the_published_convolutions_have_a_bias() -> None:
    with torch.device("meta"):
        tokenizer = VQGAN3D(MAGVITEncoder(), GradientVectorQuantizer(), MAGVITDecoder())
    biased = [name for name, layer in tokenizer.named_modules() if getattr(layer, "bias", None) is not None]
    convolutions = [name for name in biased if name.endswith(".conv")]
    assert convolutions == [
        "pre_vq_conv.conv",
        "decoder.conv_first.conv",
        *(f"decoder.layers.{i}.conv.conv" for i in (2, 4, 6)),
        "decoder.conv_last.conv",
    ]


def test_initial_kernels_have_the_variance_of_lecun() -> None:
    torch.manual_seed(0)
    kernel = MAGVITEncoder(base_channels=32).layers[0][0].conv1.conv.weight
    deviation = (27 * 32) ** -0.5
    assert kernel.std().item() == pytest.approx(deviation, rel=0.02)
    assert kernel.abs().max() < 2.28 * deviation  # truncated at two, before its variance is restored


@pytest.mark.parametrize("padding", ["zero", "replicate", "reflect", "circular"])
def test_every_convolution_follows_the_padding_rule(padding: str) -> None:
    tokenizer = magvit(padding=padding)
    layers = [layer for network in (tokenizer.encoder, tokenizer.decoder) for layer in network.modules()]
    ours = [layer for layer in layers if hasattr(layer, "time_placement") and hasattr(layer, "kernel_size")]
    assert {layer.padding for layer in ours} == {padding}
    assert len(ours) == len([layer for layer in layers if isinstance(layer, nn.Conv3d)])
    video = noise(1, 3, 8, 8, 8)
    assert tokenizer.decode(tokenizer.encode(video).latents).shape == video.shape


def test_a_decoder_of_other_latents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder.latent_dim=256, but the quantizer's latents have 16 channels"):
        VQGAN3D(MAGVITEncoder(), GradientVectorQuantizer(dim=16), MAGVITDecoder())


def test_levels_need_a_flag_each() -> None:
    with pytest.raises(ValueError, match=r"channel_multipliers=\(1, 2, 2, 4\) halve 3 times"):
        MAGVITEncoder(temporal_downsample=(True, True))
    with pytest.raises(ValueError, match=r"a 2D network \(is_2d\) keeps every frame, expected false"):
        MAGVITEncoder(is_2d=True)


def test_the_last_frame_changes_the_first_latent() -> None:
    tokenizer = magvit()
    video = noise(1, 3, 16, 16, 16)
    changed = video.clone()
    changed[:, :, 15] = -1.0
    latents = [tokenizer.encode(v).latents for v in (video, changed)]
    assert frames_that_differ(*latents) == [0, 1, 2, 3]
    assert tokenizer.context_frames() is None


def test_the_2d_twin_works_frame_by_frame() -> None:
    tokenizer = magvit(is_2d=True, temporal_downsample=(False, False))
    video = noise(2, 3, 3, 16, 16)
    encoded = tokenizer.encode(video)
    alone = tokenizer.encode_images(video)
    assert torch.allclose(encoded.latents, alone.latents, atol=1e-12)
    assert torch.allclose(tokenizer.decode(encoded.latents), tokenizer.decode_images(alone.latents), atol=1e-12)
    assert tokenizer.downsample == (1, 4, 4)
    assert tokenizer.context_frames() == 0


def test_average_pooling_counts_real_entries_alone() -> None:
    pool = AveragePool((2, 2, 2))
    x = noise(1, 2, 1, 5, 4)
    y = pool(x)
    assert y.shape == (1, 2, 1, 3, 2)  # one frame stays one frame
    assert torch.allclose(y[:, :, 0, :2], F.avg_pool2d(x[:, :, 0, :4], 2))
    assert torch.allclose(y[0, 0, 0, 2, 0], x[0, 0, 0, 4, :2].mean())


@pytest.mark.parametrize("make", [magvit, causal])
def test_patches_are_channels_of_the_first_and_the_last_convolution_alone(make: Callable[..., VQGAN3D]) -> None:
    patched, plain = make(patch_size=2), make()
    for network in (patched.encoder, patched.decoder):
        first = "conv_first" if network is patched.encoder else "conv_last"
        channels = network.get_submodule(f"{first}.conv").weight.shape
        assert channels[1 if first == "conv_first" else 0] == 3 * 4
    video = noise(1, 3, 9 if patched.encoder.is_causal else 8, 16, 24)
    patched.encoder.layers, patched.encoder.final_block = plain.encoder.layers, plain.encoder.final_block
    plain.encoder.conv_first = patched.encoder.conv_first
    features = patched.encoder(video)
    assert torch.equal(features, plain.encoder(to_patches(video, 2)))
    assert features.shape[2:] == patched.latent_shape(*video.shape[2:])
    assert patched.downsample == (4, 8, 8)
    assert patched.decode(patched.encode(video).latents).shape == video.shape
    assert torch.equal(from_patches(to_patches(video, 2), 2), video)
