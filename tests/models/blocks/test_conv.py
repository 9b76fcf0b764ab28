from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from models.blocks.conv import Padding, SamePadConv3d, SamePadConvTranspose3d, pad_same

PADDINGS = get_args(Padding)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "before", "after"), [(3, 1, 1, 1), (4, 2, 1, 1), (4, 1, 2, 1), (1, 1, 0, 0)]
)
def test_the_odd_entry_is_padded_in_front(kernel_size: int, stride: int, before: int, after: int) -> None:
    line = torch.arange(1.0, 6.0).view(1, 1, 5, 1, 1)
    padded = pad_same(line, (kernel_size, 1, 1), (stride, 1, 1), "zero").flatten().tolist()
    assert padded == [0.0] * before + [1, 2, 3, 4, 5] + [0.0] * after


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("replicate", [1, 1, 1, 2, 3, 3]),
        ("zero", [7, 7, 1, 2, 3, 7]),
        ("reflect", [3, 2, 1, 2, 3, 2]),
        ("circular", [2, 3, 1, 2, 3, 1]),
    ],
)
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_each_rule_continues_every_axis(padding: Padding, expected: list[int], axis: int) -> None:
    shape, kernel = [1] * 5, [1] * 3
    shape[axis], kernel[axis - 2] = 3, 4
    line = torch.tensor([1.0, 2.0, 3.0]).view(shape)
    assert pad_same(line, tuple(kernel), (1, 1, 1), padding, fill=7.0).flatten().tolist() == expected


def test_reflection_replicates_axes_that_are_too_short() -> None:
    x = torch.randn(1, 2, 1, 4, 2)  # one frame; two columns are too few for the two of padding
    padded = pad_same(x, (3, 3, 4), (1, 1, 1), "reflect")
    expected = F.pad(F.pad(x, (0, 0, 1, 1, 0, 0), mode="reflect"), (2, 1, 0, 0, 1, 1), mode="replicate")
    assert torch.equal(padded, expected)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (4, (2, 2, 2)), (4, (1, 2, 2)), (1, 1)])
def test_convolution_divides_the_size_by_its_stride(
    padding: Padding, kernel_size: int, stride: int | tuple[int, int, int]
) -> None:
    conv = SamePadConv3d(2, 3, kernel_size, stride, padding)
    t, h, w = (stride,) * 3 if isinstance(stride, int) else stride
    assert conv(torch.randn(1, 2, 4, 6, 8)).shape == (1, 3, 4 // t, 6 // h, 8 // w)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("frames", [1, 3])
def test_transposed_convolution_multiplies_the_size_by_its_stride(
    padding: Padding, stride: tuple[int, int, int], frames: int
) -> None:
    conv = SamePadConvTranspose3d(2, 3, stride, padding)
    t, h, w = stride
    assert conv(torch.randn(1, 2, frames, 2, 4)).shape == (1, 3, frames * t, 2 * h, 4 * w)


def test_transposed_convolution_refuses_strides_its_kernel_cannot_do() -> None:
    with pytest.raises(ValueError, match="expected 1 or 2"):
        SamePadConvTranspose3d(2, 3, stride=4)


def test_zero_padding_equals_the_padding_of_torch() -> None:
    conv = SamePadConv3d(2, 3, kernel_size=3, padding="zero")
    x = torch.randn(1, 2, 4, 5, 6)
    assert torch.allclose(conv(x), F.conv3d(x, conv.conv.weight, conv.conv.bias, padding=1), atol=1e-6)


def test_parameters_have_the_official_names() -> None:
    assert list(SamePadConv3d(1, 1).state_dict()) == ["conv.weight", "conv.bias"]
    assert list(SamePadConvTranspose3d(1, 1).state_dict()) == ["convt.weight", "convt.bias"]
