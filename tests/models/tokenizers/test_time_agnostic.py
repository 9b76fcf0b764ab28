"""Behaviour of TATS' encoder and decoder in evaluation, in float64, with random weights and running statistics."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.blocks.conv import Padding, SamePadConv3d, SamePadConvTranspose3d, TimePlacement
from models.random import keyed_generator
from models.tokenizers import VQGAN3D, TimeAgnosticDecoder, TimeAgnosticEncoder, VectorQuantizer

Triple = tuple[int, int, int]


def randomised(network: nn.Module) -> nn.Module:
    """In evaluation, with weights and statistics that no initialisation has made special."""
    generator = keyed_generator(0)
    network.double().eval()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim > 1:
            value.normal_(0, 1.5 * (value.shape[0] / value.numel()) ** 0.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(0.3, 0.3, generator=generator)
    return network.requires_grad_(False)


def encoder(downsample: Triple = (4, 8, 8), base_channels: int = 2, **options: Any) -> TimeAgnosticEncoder:
    return randomised(TimeAgnosticEncoder(base_channels=base_channels, downsample=downsample, **options))


def decoder(downsample: Triple = (4, 8, 8), base_channels: int = 2, **options: Any) -> TimeAgnosticDecoder:
    return randomised(TimeAgnosticDecoder(base_channels=base_channels, downsample=downsample, **options))


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=keyed_generator(1), dtype=torch.float64) - 0.5


def frames_differ(a: Tensor, b: Tensor) -> list[int]:
    """Indices along time at which two tensors `[B, C, T, H, W]` differ."""
    return (a - b).abs().amax((0, 1, 3, 4)).gt(1e-12).nonzero().flatten().tolist()


@pytest.mark.parametrize(("downsample", "parameters"), [((4, 8, 8), 23_652_227), ((4, 16, 16), 95_622_275)])
def test_published_parameter_counts(downsample: Triple, parameters: int) -> None:
    with torch.device("meta"):
        tokenizer = VQGAN3D(
            TimeAgnosticEncoder(downsample=downsample),
            VectorQuantizer(16384, 256),
            TimeAgnosticDecoder(downsample=downsample),
        )
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters


def test_parameters_have_the_official_names_and_shapes() -> None:
    with torch.device("meta"):
        encoder_state = TimeAgnosticEncoder().state_dict()
        decoder_state = TimeAgnosticDecoder().state_dict()
    assert (len(encoder_state), len(decoder_state)) == (55, 97)
    assert encoder_state["conv_first.conv.weight"].shape == (32, 3, 3, 3, 3)
    assert encoder_state["conv_blocks.0.down.conv.weight"].shape == (64, 32, 4, 4, 4)
    assert encoder_state["conv_blocks.2.res.conv1.conv.weight"].shape == (256, 256, 3, 3, 3)
    assert encoder_state["conv_blocks.1.res.norm2.running_var"].shape == (128,)
    assert encoder_state["final_block.0.weight"].shape == (256,)
    ups = [decoder_state[f"conv_blocks.{i}.up.convt.weight"].shape[:2] for i in range(3)]
    assert ups == [(256, 256), (256, 128), (128, 64)]
    assert decoder_state["conv_blocks.2.res2.conv2.conv.bias"].shape == (64,)
    assert decoder_state["final_block.0.running_mean"].shape == (256,)
    assert decoder_state["conv_last.conv.weight"].shape == (3, 64, 3, 3, 3)


@pytest.mark.parametrize("downsample", [(4, 8, 8), (4, 4, 4), (2, 4, 8), (1, 2, 2)])
@pytest.mark.parametrize("padding", ["replicate", "zero", "reflect", "circular"])
def test_decoder_restores_the_size_that_the_encoder_divides(downsample: Triple, padding: Padding) -> None:
    t, h, w = downsample
    video = noise(1, 3, 2 * t, 2 * h, w)
    network = encoder(downsample, padding=padding)
    features = network(video)
    assert features.shape == (1, network.out_channels, 2, 2, 1)
    assert network.latent_shape(*video.shape[2:]) == (2, 2, 1)
    assert decoder(downsample, padding=padding)(features).shape == video.shape


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_still_video_has_still_latents_when_borders_are_replicated(norm: str) -> None:
    video = noise(1, 3, 1, 16, 16).expand(-1, -1, 12, -1, -1)
    features = encoder(norm=norm, base_channels=16)(video)
    assert (features - features[:, :, :1]).abs().max() < 1e-12


def test_zero_padding_tells_latents_where_they_are() -> None:
    video = noise(1, 3, 1, 16, 16).expand(-1, -1, 12, -1, -1)
    features = encoder(padding="zero")(video)
    assert (features - features[:, :, :1]).abs().max() > 0.01


def test_zero_padding_continues_the_video_with_black() -> None:
    """An encoder that pads with zeros cannot tell black frames that it is given from those that it pads with."""
    network = encoder(padding="zero")
    seen_by_first_layer = {}
    network.conv_first.conv.register_forward_pre_hook(lambda _, args: seen_by_first_layer.update(padded=args[0]))
    VQGAN3D(network, VectorQuantizer(2, 2), decoder(), pixel_range=(-0.25, 0.5)).double().eval().encode(
        noise(1, 3, 4, 8, 8)
    )
    padded = seen_by_first_layer["padded"]  # [1, 3, 6, 10, 10]
    assert (padded[:, :, [0, -1]] == -0.25).all()
    assert (padded[..., [0, -1]] == -0.25).all()


@pytest.mark.parametrize("padding", ["replicate", "zero", "reflect", "circular"])
def test_every_convolution_follows_the_padding_rule(padding: Padding) -> None:
    for network in (encoder(padding=padding), decoder(padding=padding)):
        ours = [m for m in network.modules() if isinstance(m, SamePadConv3d | SamePadConvTranspose3d)]
        assert {conv.padding for conv in ours} == {padding}
        assert len(ours) == len([m for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)])


def test_a_circular_network_moves_with_a_video_that_wraps_around() -> None:
    video = noise(1, 3, 8, 16, 16)
    network, inverse = encoder(padding="circular"), decoder(padding="circular")
    moved = network(video.roll((4, 8, 8), (2, 3, 4)))
    assert torch.allclose(moved, network(video).roll((1, 1, 1), (2, 3, 4)), atol=1e-12)
    assert torch.allclose(inverse(moved), inverse(network(video)).roll((4, 8, 8), (2, 3, 4)), atol=1e-12)


def test_a_latent_sees_64_frames_and_a_frame_12_latents() -> None:
    video = noise(1, 3, 120, 8, 8)
    network, inverse = encoder(), decoder()
    features = network(video)
    for frame in (59, 60, 63):  # latents i with 4 i - 32 <= frame <= 4 i + 31
        changed = video.clone()
        changed[:, :, frame] += 1
        assert frames_differ(network(changed), features) == [i for i in range(30) if 4 * i - 32 <= frame <= 4 * i + 31]
    decoded = inverse(features)
    reached = {}
    for i in range(30):
        changed = features.clone()
        changed[:, :, i] += 1
        reached[i] = frames_differ(inverse(changed), decoded)
    assert [i for i in range(30) if 60 in reached[i]] == list(range(9, 21))
    assert max(sum(frame in frames for frames in reached.values()) for frame in range(120)) == 12


@pytest.mark.parametrize(("downsample", "context"), [((4, 8, 8), 32), ((4, 4, 4), 16), ((2, 4, 4), 14), ((1, 2, 2), 5)])
def test_context_is_the_reach_of_the_encoder(downsample: Triple, context: int) -> None:
    network = encoder(downsample)
    assert network.context_frames() == context
    factor = downsample[0]
    window = slice(context, context + 2 * factor)
    video = noise(1, 3, window.stop + context, downsample[1], downsample[2])
    features = network(video)[:, :, window.start // factor : window.stop // factor]
    beyond = torch.cat([noise(1, 3, 8, *downsample[1:]), video, noise(1, 3, 8, *downsample[1:])], dim=2)
    unchanged = network(beyond)[:, :, (8 + window.start) // factor : (8 + window.stop) // factor]
    assert torch.allclose(features, unchanged, atol=1e-12)
    less = network(video[:, :, factor:])[:, :, window.start // factor - 1 : window.stop // factor - 1]
    assert frames_differ(features, less)  # with one latent's frames less it is too short


def test_group_norm_and_circular_padding_need_the_whole_clip() -> None:
    assert encoder(norm="group", base_channels=16).context_frames() is None
    assert encoder(padding="circular").context_frames() is None


def test_windows_agree_with_the_whole_away_from_their_ends() -> None:
    features = noise(1, 16, 24, 1, 1)
    inverse = decoder()
    whole, window = inverse(features)[:, :, 16:80], inverse(features[:, :, 4:20])
    # 6 latents before a frame's own and 5 after, for half of the frames one less; beyond 18 and 17 frames below 1e-7
    assert frames_differ(whole, window) == [*range(22), *range(43, 64)]
    assert (whole - window)[:, :, 18:47].abs().max() < 1e-7 * whole.abs().max()
    video = noise(1, 3, 128, 8, 8)
    network = encoder()
    whole, window = network(video)[:, :, 4:28], network(video[:, :, 16:112])
    assert frames_differ(whole, window) == [*range(8), *range(17, 24)]


def test_with_group_norm_no_window_agrees_with_the_whole() -> None:
    features = noise(1, 128, 24, 1, 1)
    inverse = decoder(norm="group", base_channels=16)
    assert len(frames_differ(inverse(features)[:, :, 16:80], inverse(features[:, :, 4:20]))) == 64


def test_still_latents_decode_to_a_video_of_period_four_away_from_the_ends() -> None:
    frames = decoder()(noise(1, 16, 1, 1, 1).expand(-1, -1, 30, -1, -1))
    changing = frames_differ(frames[:, :, 4:], frames[:, :, :-4])
    assert not set(changing) & set(range(20, 93))
    assert changing
    assert frames_differ(frames[:, :, 21:61], frames[:, :, 20:60])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((17, 64, 64), r"frames=17 .* multiples of 4\. Nearest: 16 or 20 \(--data\.num_frames\)"),
        ((3, 64, 64), r"frames=3 .* Nearest: 4 \("),
        ((16, 60, 64), r"height=60 .* multiples of 8\. Nearest: 56 or 64 \(--data\.resolution\)"),
        ((16, 64, 65), r"width=65 .* Nearest: 64 or 72"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(size: Triple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder().latent_shape(*size)


def test_valid_frames_are_the_multiples_of_the_temporal_factor() -> None:
    assert [frames for frames in range(13) if encoder().valid_frames(frames)] == [4, 8, 12]


@pytest.mark.parametrize("downsample", [(3, 8, 8), (4, 0, 8), (1, 1, 1)])
def test_factors_that_are_no_powers_of_two_are_refused(downsample: Triple) -> None:
    with pytest.raises(ValueError, match="expected powers of two"):
        TimeAgnosticEncoder(downsample=downsample)


@pytest.mark.parametrize("placement", ["same", "causal"])
def test_real_padding_takes_the_neighbours_that_the_clip_brings_along(placement: TimePlacement) -> None:
    """The latents of a window with its neighbours are those that the window has in the middle of a long video."""
    rule = {"time_placement": placement}
    network, padded = encoder(padding="real", **rule), encoder(padding="replicate", **rule)
    before, after = network.margin_frames()
    assert (before, after) == ((32, 28) if placement == "same" else (63, 0))
    extra = 1 if placement == "causal" else 0
    long = noise(1, 3, 200 + extra, 8, 8)
    whole = padded(long)
    window = long[:, :, 80 - before : 80 + 16 + extra + after]  # neighbours, 16 frames, neighbours
    assert network.latent_shape(window.shape[2], 8, 8) == (4 + extra, 1, 1)
    assert torch.allclose(network(window), whole[:, :, 20 : 24 + extra], atol=1e-12)
    assert not network.valid_frames(16)
    with pytest.raises(ValueError, match=r"frames=16 .* the neighbours that padding='real' uses up"):
        network.latent_shape(16, 8, 8)


@pytest.mark.parametrize("placement", ["same", "causal"])
def test_a_real_decoder_gives_the_frames_whose_neighbouring_latents_are_there(placement: TimePlacement) -> None:
    rule = {"time_placement": placement}
    network, padded = decoder(padding="real", **rule), decoder(padding="replicate", **rule)
    before, after = network.margin_latents()
    assert (before, after) == ((6, 6) if placement == "same" else (11, 0))
    features = noise(1, 16, 20, 1, 1)
    frames = network(features)
    assert frames.shape[2] == network.frames_of(20) == (32 if placement == "same" else 33)
    first = 4 * before
    assert torch.allclose(frames, padded(features)[:, :, first : first + frames.shape[2]], atol=1e-12)
    with pytest.raises(ValueError, match=f"too few for padding='real': expected {before + after + 1}"):
        network(features[:, :, : before + after])


def test_a_reconstruction_is_compared_with_the_frames_that_it_shows() -> None:
    rule: dict[str, Any] = {"base_channels": 2, "padding": "real"}
    tokenizer = VQGAN3D(TimeAgnosticEncoder(**rule), VectorQuantizer(8, 3), TimeAgnosticDecoder(**rule)).eval()
    video = noise(1, 3, 60 + 48 + 16, 8, 8).float()
    reconstruction, encoded = tokenizer(video)
    assert encoded.codes.shape == (1, 4 + 12, 1, 1)
    assert torch.equal(tokenizer.reconstructed_frames(video), video[:, :, 32 + 24 : 32 + 24 + 16])
    assert reconstruction.shape[2] == 16
    assert tokenizer.context_frames() is None


def test_causal_placement_reaches_every_convolution() -> None:
    for network in (encoder(time_placement="causal"), decoder(time_placement="causal")):
        ours = [m for m in network.modules() if isinstance(m, SamePadConv3d | SamePadConvTranspose3d)]
        assert {conv.time_placement for conv in ours} == {"causal"}
    network, inverse = encoder(time_placement="causal"), decoder(time_placement="causal")
    video = noise(1, 3, 17, 8, 8)
    features = network(video)
    frames = inverse(features)
    assert (features.shape[2], frames.shape[2]) == (5, 17)
    assert network.latent_shape(17, 8, 8) == (5, 1, 1)
    changed = video.clone()
    changed[:, :, 9:] += 1
    assert frames_differ(network(changed), features) == [3, 4]  # latents 0, 1 and 2 end with frames 0, 4 and 8
    changed = features.clone()
    changed[:, :, 3:] += 1
    assert frames_differ(inverse(changed), frames) == list(range(9, 17))


def test_a_2d_network_works_frame_by_frame() -> None:
    network, inverse = encoder((1, 8, 8), is_2d=True), decoder((1, 8, 8), is_2d=True)
    video = noise(1, 3, 3, 8, 8)
    features = network(video)
    assert torch.allclose(features[:, :, 1:2], network(video[:, :, 1:2]), atol=1e-12)
    assert torch.allclose(inverse(features)[:, :, 1:2], inverse(features[:, :, 1:2]), atol=1e-12)
    with pytest.raises(ValueError, match=r"a 2D network \(is_2d\) keeps every frame"):
        TimeAgnosticEncoder(is_2d=True)


def test_patches_are_channels_of_the_first_and_the_last_convolution_alone() -> None:
    encoder = TimeAgnosticEncoder(base_channels=4, downsample=(4, 8, 8), patch_size=2).eval()
    decoder = TimeAgnosticDecoder(base_channels=4, downsample=(4, 8, 8), patch_size=2).eval()
    plain = TimeAgnosticEncoder(in_channels=12, base_channels=4, downsample=(4, 4, 4)).eval()
    plain.load_state_dict(encoder.state_dict())
    video = torch.rand(2, 3, 8, 32, 48)
    patches = torch.cat([video[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)  # [2, (p q c), 8, 16, 24]
    patches = patches.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)  # [2, (c p q), 8, 16, 24]
    features = encoder(video)
    torch.testing.assert_close(features, plain(patches))
    assert features.shape[2:] == encoder.latent_shape(8, 32, 48) == (2, 4, 6)
    assert decoder(torch.rand(1, decoder.in_channels, 2, 4, 6)).shape == (1, 3, 8, 32, 48)


def test_patches_larger_than_a_latent_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size=4: expected powers of two"):
        TimeAgnosticEncoder(downsample=(4, 2, 2), patch_size=4)


def test_channels_last_changes_the_place_of_numbers_only() -> None:
    parts = [TimeAgnosticEncoder(base_channels=4), VectorQuantizer(16, 8), TimeAgnosticDecoder(base_channels=4)]
    here, there = VQGAN3D(*copy.deepcopy(parts)).eval(), VQGAN3D(*parts, channels_last=True).eval()
    there.load_state_dict(here.state_dict())
    weight = there.encoder.conv_first.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not weight.is_contiguous()
    video = torch.rand(1, 3, 8, 32, 32) * 2 - 1
    codes = here.encode(video).codes
    assert torch.equal(there.encode(video).codes, codes)
    latents = here.codes_to_latents(codes)
    torch.testing.assert_close(there.decode(latents), here.decode(latents), rtol=0, atol=1e-5)
