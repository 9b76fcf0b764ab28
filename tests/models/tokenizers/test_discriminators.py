import math

import pytest
import torch
import torch.nn.functional as F

from models.tokenizers import PatchDiscriminator, StyleGANDiscriminator
from models.tokenizers.discriminators import BlurPool, ResBlockDown


@pytest.mark.parametrize(("num_axes", "parameters"), [(2, 2_766_529), (3, 11_057_857)])
def test_published_parameter_counts(num_axes: int, parameters: int) -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(num_axes)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == parameters


@pytest.mark.parametrize(
    ("num_axes", "clip", "sizes"),
    [
        (2, (128, 128), [(65, 65), (33, 33), (17, 17), (18, 18), (19, 19)]),
        (3, (16, 128, 128), [(9, 65, 65), (5, 33, 33), (3, 17, 17), (4, 18, 18), (5, 19, 19)]),
    ],
)
def test_map_sizes_of_a_published_clip(num_axes: int, clip: tuple[int, ...], sizes: list[tuple[int, ...]]) -> None:
    with torch.device("meta"):
        logits, maps = PatchDiscriminator(num_axes, base_channels=4)(torch.empty(1, 3, *clip))
    assert [tuple(map_.shape[2:]) for map_ in [*maps, logits]] == sizes
    assert [map_.shape[1] for map_ in [*maps, logits]] == [4, 8, 16, 32, 1]


def test_channels_stop_doubling_at_512() -> None:
    with torch.device("meta"):
        _, maps = PatchDiscriminator(2, base_channels=256, num_layers=2)(torch.empty(1, 3, 16, 16))
    assert [map_.shape[1] for map_ in maps] == [256, 512, 512]


def test_parameters_have_the_official_names() -> None:
    with torch.device("meta"):
        names = PatchDiscriminator(3).state_dict().keys()
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {f"model{i}.0.{name}" for i in range(5) for name in ("weight", "bias")}
    assert names == expected | {f"model{i}.1.{name}" for i in (1, 2, 3) for name in norm}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 15_339_457),
        ({"base_channels": 128}, 61_341_569),
        ({"resolution": 64, "channel_multipliers": (2, 4, 4, 4)}, 11_734_465),
        ({"resolution": 64, "channel_multipliers": (2, 4, 4, 4), "base_channels": 128}, 46_922_625),
        ({"num_frames": 1, "is_2d": True}, 5_972_545),
        ({"num_frames": 1, "is_2d": True, "base_channels": 128}, 23_880_833),
        ({"num_frames": 17, "blur": True, "base_channels": 128}, 61_341_569),
    ],
    ids=["B", "L", "B-64", "L-64", "2D-B", "2D-L", "v2"],
)
def test_published_parameter_counts_of_magvit(options: dict, parameters: int) -> None:
    with torch.device("meta"):
        discriminator = StyleGANDiscriminator(**options)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == parameters
    multipliers = options.get("channel_multipliers", (2, 4, 4, 4, 4))
    assert discriminator.hidden.in_features == 4 * 4 * options.get("base_channels", 64) * multipliers[-1]


@pytest.mark.parametrize(
    ("blur", "frames", "sizes"), [(False, 16, [16, 8, 4, 2, 1, 1, 1]), (True, 17, [17, 9, 5, 3, 2, 1, 1])]
)
def test_every_block_halves_and_one_logit_is_left(blur: bool, frames: int, sizes: list[int]) -> None:
    torch.manual_seed(0)
    discriminator = StyleGANDiscriminator(frames, 32, base_channels=2, blur=blur)
    clips = torch.rand(2, 3, frames, 32, 32)
    logits, maps = discriminator(clips)
    assert logits.shape == (2, 1)
    assert [map_.shape[2] for map_ in maps] == sizes
    assert [map_.shape[3] for map_ in maps] == [32, 16, 8, 4, 2, 1, 1]
    assert [map_.shape[1] for map_ in maps] == [2, 4, 8, 8, 8, 8, 8]
    alone = torch.cat([discriminator(clip)[0] for clip in clips.split(1)])
    assert torch.allclose(logits, alone, atol=1e-6)  # no statistics of the batch: R1 takes each real's own gradient


def test_a_block_is_the_mean_of_squares_of_two_ways() -> None:
    torch.manual_seed(0)
    block = StyleGANDiscriminator(4, 8, base_channels=2, channel_multipliers=(2,)).blocks[0]
    assert isinstance(block, ResBlockDown)
    x = torch.randn(1, 2, 4, 8, 8)
    c1, c2, skip = block.conv1.conv, block.conv2.conv, block.shortcut.conv
    h = F.avg_pool3d(F.leaky_relu(F.conv3d(x, c1.weight, c1.bias, padding=1), 0.2), 2)
    h = F.leaky_relu(F.conv3d(h, c2.weight, c2.bias, padding=1), 0.2)
    expected = (h + F.conv3d(F.avg_pool3d(x, 2), skip.weight)) / math.sqrt(2)
    assert skip.bias is None
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_blur_keeps_constants_away_from_the_borders() -> None:
    pool = BlurPool(3)
    assert pool.kernel.sum() == 1
    ones = torch.ones(1, 2, 9, 8, 8)
    y = pool(ones)
    assert y.shape == (1, 2, 5, 4, 4)
    assert torch.equal(y[:, :, 1:-1, :-1, :-1], torch.ones(1, 2, 3, 3, 3))
    assert (y[:, :, 0, 1, 1] == 0.75).all()  # beyond lie zeros
    line = torch.zeros(1, 1, 5, 1, 1)
    line[0, 0, 2] = 1
    assert pool(line).flatten().tolist() == [0, 0.125, 0]  # [1, 2, 1] / 4 in time, 1 / 2 of the rest


def test_a_blur_of_images_leaves_time() -> None:
    x = torch.rand(1, 2, 3, 6, 6)
    y = BlurPool(2)(x)
    assert y.shape == (1, 2, 3, 3, 3)
    assert torch.allclose(y[:, :, 1:2], BlurPool(2)(x[:, :, 1:2]))


def test_clips_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clips of \(16, 32, 32\) .* got \(8, 32, 32\): set its num_frames"):
        StyleGANDiscriminator(16, 32, base_channels=2)(torch.zeros(1, 3, 8, 32, 32))
