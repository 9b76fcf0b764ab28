from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.blocks.conv import Padding, SamePadConv3d, SamePadConvTranspose3d, Stream, TimePlacement, pad_same

PADDINGS = [padding for padding in get_args(Padding) if padding != "real"]  # those that pad


def frames_seen(layer: nn.Module, frames: int) -> list[list[int]]:
    """For each frame of the layer's output, the frames of its input that change it."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, frames, 4, 4)
    y = layer(x)
    seen: list[list[int]] = [[] for _ in range(y.shape[2])]
    for frame in range(frames):
        changed = x.clone()
        changed[:, :, frame] += 1
        for i in (layer(changed) - y).abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist():
            seen[i].append(frame)
    return seen


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


def test_causal_time_is_padded_in_front_alone() -> None:
    line = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1, 1)
    for stride in (1, 2):
        padded = pad_same(line, (3, 1, 1), (stride, 1, 1), "zero", fill=7.0, time_placement="causal")
        assert padded.flatten().tolist() == [7, 7, 1, 2, 3]


@pytest.mark.parametrize("padding", ["reflect", "circular"])
def test_causal_time_never_continues_with_the_future(padding: Padding) -> None:
    x = torch.arange(9.0).view(1, 1, 3, 1, 3)
    padded = pad_same(x, (3, 1, 3), (1, 1, 1), padding, time_placement="causal")
    assert torch.equal(padded[:, :, :2], padded[:, :, 2:3].expand(-1, -1, 2, -1, -1))  # the first frame, twice
    middle = [1, 0, 1, 2, 1] if padding == "reflect" else [2, 0, 1, 2, 0]
    assert padded[0, 0, 0, 0].tolist() == middle  # space follows the rule


def test_real_padding_leaves_time_and_replicates_space() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 1, 3)
    assert torch.equal(pad_same(x, (3, 1, 3), (1, 1, 1), "real"), F.pad(x, (1, 1, 0, 0, 0, 0), mode="replicate"))


@pytest.mark.parametrize("padding", ["replicate", "zero", "reflect", "real"])
@pytest.mark.parametrize("placement", get_args(TimePlacement))
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (4, 2), (4, 1)])
def test_a_convolution_knows_which_frames_it_sees(
    padding: Padding, placement: TimePlacement, kernel_size: int, stride: int
) -> None:
    conv = SamePadConv3d(2, 2, kernel_size, (stride, 1, 1), padding, placement)
    frames = 9 if placement == "causal" else 8
    first_given = -(-conv.time_pads[0] // stride) if padding == "real" else 0
    shift = first_given * stride - conv.time_pads[0] if padding == "real" else 0  # `real` starts at its first frame
    seen = frames_seen(conv, frames)
    for i, actual in enumerate(seen[2:4], start=2):
        first, last = conv.inputs_of(i + first_given, i + first_given)
        assert actual == [frame - shift for frame in range(first, last + 1) if 0 <= frame - shift < frames]
        assert placement == "same" or last == (i + first_given) * stride


@pytest.mark.parametrize("placement", get_args(TimePlacement))
@pytest.mark.parametrize("stride", [1, 2])
def test_a_transposed_convolution_knows_which_frames_it_sees(placement: TimePlacement, stride: int) -> None:
    conv = SamePadConvTranspose3d(2, 2, (stride, 1, 1), "zero", placement)
    seen = frames_seen(conv, 6)
    assert len(seen) == (6 * stride if placement == "same" else 1 + 5 * stride)
    for i, actual in enumerate(seen):
        first, last = conv.inputs_of(i, i)
        assert actual == list(range(max(0, first), min(last, 5) + 1))
        assert placement == "same" or last == -(-i // stride)


@pytest.mark.parametrize("placement", get_args(TimePlacement))
@pytest.mark.parametrize("stride", [1, 2])
def test_a_real_transposed_convolution_gives_the_frames_that_padding_cannot_reach(
    placement: TimePlacement, stride: int
) -> None:
    real = SamePadConvTranspose3d(2, 2, (stride, 1, 1), "real", placement)
    padded = SamePadConvTranspose3d(2, 2, (stride, 1, 1), "replicate", placement)
    padded.load_state_dict(real.state_dict())
    x = torch.randn(1, 2, 7, 4, 4)
    whole, part = padded(x), real(x)
    inside = [i for i in range(whole.shape[2]) if padded.inputs_of(i, i)[0] >= 0 and padded.inputs_of(i, i)[1] < 7]
    assert torch.allclose(whole[:, :, inside], part[:, :, part.shape[2] - len(inside) :], atol=1e-6)
    assert part.shape[2] - len(inside) in (0, stride - 1)  # frames before the first that a causal layer gives


@pytest.mark.parametrize(
    ("padding", "placement"),
    [(padding, "causal") for padding in PADDINGS]
    + [(padding, "same") for padding in PADDINGS if padding != "circular"],
)
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [3, 0, 6], [8, 1]])
def test_layers_give_in_pieces_what_they_give_at_once(
    padding: Padding, placement: TimePlacement, sizes: list[int]
) -> None:
    rule = {"padding": padding, "time_placement": placement}
    layers = [SamePadConv3d(2, 3, k, s, **rule) for k, s in ((3, 1), (3, (2, 1, 1)), (4, 2), (4, (1, 2, 2)), (1, 1))]
    layers += [SamePadConvTranspose3d(2, 3, s, **rule) for s in (1, 2)]
    x = torch.randn(2, 2, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        stream, given = Stream(), []
        for i, piece in enumerate(x.split(sizes, dim=2)):
            stream.is_last = i == len(sizes) - 1
            given.append(layer(piece, stream))
        assert torch.allclose(torch.cat(given, dim=2), layer(x), atol=1e-6)


def test_a_stream_waits_no_longer_than_it_must() -> None:
    conv = SamePadConv3d(1, 1, 3)
    causal = SamePadConv3d(1, 1, 3, time_placement="causal")
    piece = torch.randn(1, 1, 4, 2, 2)
    assert conv(piece, Stream()).shape[2] == 3  # the fourth frame's neighbour is still to come
    assert causal(piece, Stream()).shape[2] == 4


def test_kernels_of_a_2d_layer_cover_one_frame() -> None:
    x = torch.randn(1, 2, 3, 8, 8)
    conv, up = SamePadConv3d(2, 2, 4, (1, 2, 2), is_2d=True), SamePadConvTranspose3d(2, 2, (1, 2, 2), is_2d=True)
    assert (conv.conv.weight.shape[2], up.convt.weight.shape[2]) == (1, 1)
    for layer in (conv, up):
        alone = torch.cat([layer(frame) for frame in x.split(1, dim=2)], dim=2)
        assert torch.allclose(layer(x), alone, atol=1e-6)
    with pytest.raises(ValueError, match=r"stride=\(2, 2, 2\) leaves gaps between kernels of \(1, 4, 4\)"):
        SamePadConv3d(2, 2, 4, 2, is_2d=True)
