"""The causal tokenizer of MAGVIT-v2 and W.A.L.T: nothing depends on later frames, and an image is a short video."""

from functools import partial

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from toy_networks import causal, frames_that_differ, noise

from models.blocks import FrameGroupNorm
from models.tokenizers import (
    VQGAN3D,
    CausalDecoder,
    CausalEncoder,
    ContinuousLatents,
    LookupFreeQuantizer,
    MAGVITDecoder,
    Quantizer,
    VectorQuantizer,
)
from models.tokenizers.causal import AdaptiveGroupNorm, DepthToSpace

KINDS = {
    "kernel 3": {},
    "kernel 4": {"down_kernel": 4},
    "zeros": {"padding": "zero"},
    "reflected": {"padding": "reflect"},
    "wrapped around": {"padding": "circular"},
    "time last": {"temporal_downsample": (False, True)},
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> VQGAN3D:
    return causal(**KINDS[request.param])


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("quantizer", "down_kernel", "encoder", "decoder"),
    [
        (LookupFreeQuantizer, 3, 144_865_298, 225_682_051),
        (LookupFreeQuantizer, 4, 150_321_170, 225_682_051),
        (ContinuousLatents, 4, 150_316_040, 225_513_091),
    ],
    ids=["MAGVIT-v2", "MAGVIT-v2, kernel 4", "W.A.L.T"],
)
def test_published_parameter_counts(quantizer: type[Quantizer], down_kernel: int, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        latents = quantizer()
        tokenizer = VQGAN3D(CausalEncoder(down_kernel=down_kernel), latents, CausalDecoder(latents.dim))
    # the encoder's last convolution is the tokenizer's
    assert (size(tokenizer.encoder) + size(tokenizer.pre_vq_conv), size(tokenizer.decoder)) == (encoder, decoder)


@pytest.mark.parametrize(
    ("multipliers", "millions"), [((1, 2, 2, 4), 112.0), ((1, 1, 2, 2, 4), 115.1)], ids=["8x", "16x"]
)
def test_published_sizes_of_the_2d_twins(multipliers: tuple[int, ...], millions: float) -> None:
    options = {"channel_multipliers": multipliers, "temporal_downsample": (False,) * 4, "is_2d": True}
    with torch.device("meta"):
        tokenizer = VQGAN3D(CausalEncoder(**options), LookupFreeQuantizer(), CausalDecoder(**options))
    assert round(size(tokenizer) / 1e6, 1) == millions


def test_seventeen_frames_have_five_latents() -> None:
    with torch.device("meta"):
        options = {"base_channels": 2, "norm_groups": 2, "num_res_blocks": 1}
        features = CausalEncoder(**options)(torch.empty(1, 3, 17, 128, 128))
        assert features.shape == (1, 8, 5, 16, 16)
        assert CausalDecoder(8, **options)(features).shape == (1, 3, 17, 128, 128)


def test_time_is_halved_at_the_side_of_the_latents() -> None:
    strides = [layer.stride for layer in CausalEncoder(base_channels=32).layers if hasattr(layer, "stride")]
    assert strides == [(1, 2, 2), (2, 2, 2), (2, 2, 2)]


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_one_plus_four_k_frames_come_back(tokenizer: VQGAN3D, frames: int) -> None:
    factor = tokenizer.downsample[0]
    video = noise(1, 3, frames, 8, 8)
    latents = tokenizer.encode(video).latents
    assert latents.shape[2] == 1 + (frames - 1) // factor == tokenizer.latent_shape(frames, 8, 8)[0]
    assert tokenizer.decode(latents).shape == video.shape


@pytest.mark.parametrize(("frames", "nearest"), [(16, "13 or 17"), (18, "17 or 21"), (2, "1 or 5"), (0, "1")])
def test_other_numbers_of_frames_are_refused_with_the_nearest_that_fit(frames: int, nearest: str) -> None:
    tokenizer = causal()
    assert not tokenizer.valid_frames(frames)
    expected = rf"frames={frames} .* takes 1 \+ 4k frames\. Nearest: {nearest} \(--data\.num_frames\)"
    with pytest.raises(ValueError, match=expected):
        tokenizer.encode(noise(1, 3, frames, 8, 8))


@pytest.mark.parametrize("training", [False, True])
def test_a_latent_sees_no_later_frame(tokenizer: VQGAN3D, training: bool) -> None:
    tokenizer.train(training)
    factor = tokenizer.downsample[0]
    video = noise(1, 3, 17, 8, 8)
    latents = tokenizer.encode(video).latents
    for frame in (0, 1, 4, 5, 16):
        changed = video.clone()
        changed[:, :, frame] += 0.5
        first = -(-frame // factor)  # frame 4 l is the last of latent l's
        differ = frames_that_differ(latents, tokenizer.encode(changed).latents)
        assert differ
        assert min(differ) == first
        assert first > 0 or differ[0] == 0


def test_a_frame_sees_no_later_latent(tokenizer: VQGAN3D) -> None:
    factor = tokenizer.downsample[0]
    latents = noise(1, 3, 4, 2, 2)
    video = tokenizer.decode_native(latents)
    for i in range(4):
        changed = latents.clone()
        changed[:, :, i] += 0.5
        differ = frames_that_differ(video, tokenizer.decode_native(changed))
        assert min(differ) == (factor * i - (factor - 1) if i else 0)


def test_the_beginning_of_a_clip_is_encoded_and_decoded_as_in_the_whole(tokenizer: VQGAN3D) -> None:
    factor = tokenizer.downsample[0]
    video = noise(1, 3, 1 + 4 * factor, 8, 8)
    latents = tokenizer.encode(video).latents
    decoded = tokenizer.decode_native(latents)
    for k in (0, 1, 3):
        beginning = tokenizer.encode(video[:, :, : 1 + k * factor]).latents
        assert torch.allclose(beginning, latents[:, :, : 1 + k], atol=1e-12)
        assert torch.allclose(tokenizer.decode_native(beginning), decoded[:, :, : 1 + k * factor], atol=1e-12)


def test_images_and_videos_share_a_batch(tokenizer: VQGAN3D) -> None:
    videos, images = noise(2, 3, 9, 8, 8), noise(2, 3, 2, 8, 8).flip(0)
    batch = torch.cat([videos, images[:, :, :1].expand(-1, -1, 9, -1, -1)])  # an image is the first frame of a clip
    latents = tokenizer.encode(batch).latents
    alone = tokenizer.encode_images(images)
    assert alone.latents.shape[2] == 2
    assert torch.allclose(latents[2:, :, 0], alone.latents[:, :, 0], atol=1e-12)
    assert torch.allclose(latents[:2], tokenizer.encode(videos).latents, atol=1e-12)
    assert torch.allclose(latents[:2, :, 0], tokenizer.encode(videos[:, :, :1]).latents[:, :, 0], atol=1e-12)
    decoded = tokenizer.decode_images(alone.latents)
    assert torch.allclose(decoded[:, :, 0], tokenizer.decode(latents[2:])[:, :, 0], atol=1e-12)


def test_images_have_codes_as_well() -> None:
    tokenizer = causal(VectorQuantizer(16, 3))
    images = noise(2, 3, 4, 8, 8)
    encoded = tokenizer.encode_images(images)
    assert encoded.codes.shape == (2, 4, 2, 2)
    assert torch.equal(encoded.codes[1, 2:3], tokenizer.encode(images[1:2, :, 2:3]).codes[0])
    assert torch.allclose(tokenizer.codes_to_latents(encoded.codes), encoded.latents)


@pytest.fixture
def norm_over_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameGroupNorm, "forward", nn.GroupNorm.forward)


@pytest.mark.usefixtures("norm_over_the_clip")
def test_statistics_over_the_clip_would_break_all_of_it() -> None:
    tokenizer = causal()
    video = noise(1, 3, 9, 8, 8)
    changed = video.clone()
    changed[:, :, 8] += 0.5
    latents = tokenizer.encode(video).latents
    assert frames_that_differ(latents, tokenizer.encode(changed).latents) == [0, 1, 2]
    assert not torch.allclose(tokenizer.encode(video[:, :, :1]).latents, latents[:, :, :1], atol=1e-3)
    decoded = tokenizer.decode_native(latents)
    assert not torch.allclose(tokenizer.decode_native(latents[:, :, :2]), decoded[:, :, :5], atol=1e-3)


def test_depth_goes_to_the_published_places() -> None:
    layer = DepthToSpace((2, 2, 2))
    x = torch.zeros(1, 8 * 3, 2, 1, 1)
    t, h, w, c = 1, 0, 1, 2
    x[0, ((t * 2 + h) * 2 + w) * 3 + c, 1] = 1.0
    y = layer(x)
    assert y.shape == (1, 3, 3, 2, 2)
    assert y.nonzero().tolist() == [[0, c, 2 * 1 + t - 1, h, w]]  # a frame less in front
    back = rearrange(y[:, :, 1:], "b c (t s) (h p) (w q) -> b (s p q c) t h w", s=2, p=2, q=2)
    assert torch.equal(back, x[:, :, 1:])


def modulated(latents: Tensor, frames: int, per_latent: int, weight: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    layer = AdaptiveGroupNorm(4, 3, num_groups=2).double()
    layer.modulation.weight.data *= weight
    layer.modulation.bias.data.fill_(0.1 * weight)
    x = noise(1, 4, frames, 4, 4)
    return layer(x, latents, per_latent), layer.norm(x)


def test_adaptive_norm_without_weights_is_group_norm() -> None:
    y, plain = modulated(noise(1, 3, 2, 2, 2), frames=5, per_latent=4, weight=0.0)
    assert torch.equal(y, plain)


def test_adaptive_norm_follows_the_latent_at_each_position() -> None:
    latents = noise(1, 3, 3, 2, 2)
    y, plain = modulated(latents, frames=9, per_latent=4, weight=1.0)
    changed = latents.clone()
    changed[:, :, 1, 0, 1] += 1
    other, _ = modulated(changed, frames=9, per_latent=4, weight=1.0)
    places = (y != other).any(1).nonzero()[:, 1:]  # frame, row, column
    assert {tuple(place) for place in places.tolist()} == {
        (t, h, w) for t in range(1, 5) for h in (0, 1) for w in (2, 3)
    }
    assert not torch.allclose(y, plain)


def test_the_decoder_must_be_causal_as_well() -> None:
    encoder = partial(CausalEncoder, base_channels=32, temporal_downsample=(True, True, False))
    with pytest.raises(ValueError, match=r"encoder\.time_placement=causal, but decoder.time_placement=same"):
        VQGAN3D(encoder(), ContinuousLatents(8), MAGVITDecoder(8, base_channels=32))
