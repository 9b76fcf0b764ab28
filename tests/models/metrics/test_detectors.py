import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.metrics import Detector, DetectorCard, FrechetDistance, Preprocessing
from models.metrics.detectors import Quantise, Resize, full_precision, quantise, resize_frames
from models.metrics.i3d import PROFILES
from models.random import keyed_generator


def video(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=keyed_generator(*shape)) * 2 - 1


class Means(nn.Module):
    """A network of three features: the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = x
        means = self.weight * x.mean(dim=(2, 3, 4))
        return means, means


def means(preprocessing: Preprocessing, **options: int) -> Detector:
    return Detector(Means(), DetectorCard("means", "none", 3, 3, preprocessing), **options)


# Resizing


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        ("legacy", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]),
        ("half_pixel", [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]),
        ("aligned_corners", [i * 3 / 7 for i in range(8)]),
    ],
)
def test_rules_differ_on_a_ramp(resize: Resize, expected: list[float]) -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 1, 4)
    rows = resize_frames(ramp.expand(1, 1, 2, 4, 4), 8, 8, resize)
    assert rows[0, 0, 1, 5].tolist() == pytest.approx(expected, abs=1e-6)
    columns = resize_frames(ramp.mT.expand(1, 1, 2, 4, 4), 8, 8, resize)
    assert columns[0, 0, 1, :, 5].tolist() == pytest.approx(expected, abs=1e-6)


def test_legacy_rule_keeps_the_source_pixels_at_whole_factors() -> None:
    x = video(1, 3, 2, 7, 8)
    assert torch.equal(resize_frames(x, 21, 16, "legacy")[..., ::3, ::2], x)


@pytest.mark.parametrize("size", [(5, 9), (64, 30)])
def test_legacy_rule_is_the_double_interpolation_at_unshifted_places(size: tuple[int, int]) -> None:
    x = video(1, 1, 1, 13, 17)
    result = resize_frames(x, *size, "legacy")[0, 0, 0]
    for i in range(size[0]):
        for j in range(size[1]):
            y, z = i * 13 / size[0], j * 17 / size[1]
            top, left = math.floor(y), math.floor(z)
            rows = [x[0, 0, 0, min(top + k, 12)] for k in range(2)]
            a, b = (row[left] + (row[min(left + 1, 16)] - row[left]) * (z - left) for row in rows)
            assert float(result[i, j]) == pytest.approx(float(a + (b - a) * (y - top)), abs=1e-5)


def test_half_pixel_rule_is_the_trilinear_one_at_an_unchanged_number_of_frames() -> None:
    x = video(2, 3, 5, 12, 10)
    expected = F.interpolate(x, (5, 24, 30), mode="trilinear", align_corners=False)
    assert torch.allclose(resize_frames(x, 24, 30, "half_pixel"), expected, atol=1e-6)


@pytest.mark.parametrize("resize", ["legacy", "half_pixel", "aligned_corners"])
def test_nothing_happens_to_a_video_of_the_right_size(resize: Resize) -> None:
    x = video(1, 3, 2, 16, 16)
    assert torch.equal(Preprocessing(16, resize)(x), x)


def test_antialiasing_averages_and_goes_with_one_rule() -> None:
    stripes = torch.tensor([-1.0, 1.0]).repeat(16).expand(1, 3, 2, 32, 32)
    assert resize_frames(stripes, 8, 8, "half_pixel", antialias=True).abs().max() < 0.1
    with pytest.raises(ValueError, match="goes with resize='half_pixel' only"):
        resize_frames(stripes, 8, 8, "legacy", antialias=True)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (17, 40), (8, 9)])
def test_cropping_brings_the_shorter_side_to_size_and_takes_the_centre(height: int, width: int) -> None:
    x = video(1, 3, 2, height, width)
    result = Preprocessing(16, "half_pixel", crop=True)(x)
    scale = 16 / min(height, width)
    whole = resize_frames(x, *(max(16, math.ceil(side * scale)) for side in (height, width)), "half_pixel")
    top, left = (whole.shape[3] - 16) // 2, (whole.shape[4] - 16) // 2
    assert torch.equal(result, whole[..., top : top + 16, left : left + 16])
    assert min(whole.shape[3:]) == 16
    stretched = Preprocessing(16, "half_pixel")(x)
    assert stretched.shape == result.shape
    assert not torch.allclose(stretched, result)


# Values


@pytest.mark.parametrize("levels", ["none", "floor", "round"])
def test_levels_of_uint8_keep_their_values(levels: Quantise) -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    expected = bytes_.float() * 2 / 255 - 1
    assert torch.allclose(quantise(bytes_, levels), expected, atol=1e-6)
    for floats in (expected, bytes_.float() / 127.5 - 1, (bytes_ / 255 - 0.5) * 2):
        assert torch.allclose(quantise(floats, levels), expected, atol=1e-6)
    assert quantise(torch.tensor([0, 255], dtype=torch.uint8), levels).tolist() == [-1, 1]


@pytest.mark.parametrize(("levels", "expected"), [("none", 100.6), ("floor", 100), ("round", 101)])
def test_values_between_levels(levels: Quantise, expected: float) -> None:
    value = torch.tensor([100.6 / 127.5 - 1])
    assert float((quantise(value, levels) + 1) * 127.5) == pytest.approx(expected, abs=1e-4)


# Detectors


def test_uint8_and_float_agree() -> None:
    bytes_ = (video(2, 3, 4, 8, 8) * 127 + 128).byte()
    detector = means(Preprocessing(16, "legacy"))
    assert torch.allclose(detector(bytes_).values, detector(bytes_.float() / 127.5 - 1).values, atol=1e-6)


def test_swapped_channels_change_the_features() -> None:
    x = video(1, 3, 4, 8, 8)
    detector = means(Preprocessing(8, "legacy"))
    assert not torch.allclose(detector(x).values, detector(x.flip(1)).values)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (video(1, 4, 8, 8, 3), r"takes video \[B, 3, T, H, W\], channels first; got \[1, 4, 8, 8, 3\]"),
        (video(3, 4, 8, 8), "channels first"),
        (video(1, 3, 4, 8, 8) + 1, r"takes float video in \[-1, 1\]; got values from"),
        (video(1, 3, 4, 8, 8) * math.nan, "got values from nan"),
        (torch.zeros(1, 3, 4, 8, 8, dtype=torch.int64), "or uint8; got torch.int64"),
        (video(1, 3, 2, 8, 8), "means needs at least 3 frames; the clips have 2"),
        (video(1, 3, 6, 8, 8), "means takes at most 5 frames; the clips have 6"),
    ],
)
def test_other_input_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        means(Preprocessing(8, "legacy", min_frames=3, max_frames=5))(x)


def test_clips_at_once_do_not_change_features() -> None:
    x = video(5, 3, 4, 8, 8)
    preprocessing = Preprocessing(8, "legacy")
    one, all_ = (means(preprocessing, clips_at_once=count)(x) for count in (2, 16))
    assert torch.allclose(one.values, all_.values)
    assert len(one) == 5
    assert means(preprocessing)(x[:0]).values.shape == (0, 3)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_weights_and_arithmetic_stay_in_float32(cast: Callable) -> None:
    detector = means(Preprocessing(8, "legacy"))
    cast(nn.ModuleList([detector])).train()
    assert detector.network.weight.dtype == torch.float32
    assert not detector.training
    with torch.autocast("cpu", torch.bfloat16):
        features = detector(video(1, 3, 4, 8, 8).to(torch.bfloat16))
    assert features.values.dtype == detector.network.seen.dtype == torch.float32
    assert not features.values.requires_grad


def test_full_precision_leaves_settings_as_they_were() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(torch.device("cpu")), torch.autocast("cpu", torch.bfloat16):
            pass
        with torch.autocast("cpu", torch.bfloat16):
            with full_precision(torch.device("cpu")):
                assert not torch.is_autocast_enabled("cpu")
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# Names


def test_numbers_of_random_weights_cannot_be_called_fvd(detector: Detector) -> None:
    assert FrechetDistance(detector).name == "frechet_random_i3d"
    quantities = ("frechet", "reconstruction_frechet", "kernel", "inception_score", "class_coherence")
    names = {detector.card.metric_name(quantity) for quantity in quantities}
    assert names == {f"{quantity}_random_i3d" for quantity in quantities}


def test_published_pipelines_are_as_published() -> None:
    """Resize, crop, what becomes of values between levels, batch norm's epsilon and the covariance's divisor."""
    table = {
        name: (p.preprocessing.resize, p.preprocessing.crop, p.preprocessing.quantise, p.eps, p.ddof)
        for name, p in PROFILES.items()
    }
    assert table == {
        "tf": ("legacy", False, "none", 1e-3, 1),
        "videogpt": ("half_pixel", False, "floor", 1e-5, 1),
        "stylegan_v": ("half_pixel", True, "round", 1e-3, 0),
    }
    for profile in PROFILES.values():
        assert (profile.preprocessing.size, profile.preprocessing.min_frames) == (224, 9)
        assert not profile.preprocessing.antialias
