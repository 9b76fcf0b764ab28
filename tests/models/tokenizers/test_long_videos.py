"""Videos in pieces: equal to the whole at every frame, at a memory that does not grow with their length."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from toy_networks import causal, magvit, noise, time_agnostic

from models.tokenizers import VQGAN3D, LookupFreeQuantizer, VectorQuantizer
from models.tokenizers.vqgan3d import pieces

CAUSAL: dict[str, Callable[..., VQGAN3D]] = {
    "causal": causal,
    "causal, kernel 4": lambda *args: causal(*args, down_kernel=4),
    "causal, zeros": lambda *args: causal(*args, padding="zero"),
    "causal, reflected": lambda *args: causal(*args, padding="reflect"),
    "time-agnostic, causal": lambda *args: time_agnostic(*args, time_placement="causal"),
}
SAME: dict[str, Callable[..., VQGAN3D]] = {
    "time-agnostic": time_agnostic,
    "time-agnostic, zeros": lambda *args: time_agnostic(*args, padding="zero"),
    "time-agnostic, reflected": lambda *args: time_agnostic(*args, padding="reflect"),
    "time-agnostic, 16x": lambda *args: time_agnostic(*args, downsample=(4, 16, 16)),
    "time-agnostic, norm of frames": lambda *args: time_agnostic(
        *args, norm="frame_group", base_channels=32, downsample=(2, 2, 2)
    ),
    "images": lambda *args: magvit(*args, is_2d=True, temporal_downsample=(False, False)),
}


@pytest.fixture(params=CAUSAL | SAME)
def tokenizer(request: pytest.FixtureRequest) -> VQGAN3D:
    return (CAUSAL | SAME)[request.param]()


def whole(tokenizer: VQGAN3D) -> VQGAN3D:
    """The same, with pieces so long that there is one."""
    tokenizer.piece_frames = 10**6
    return tokenizer


def clip(tokenizer: VQGAN3D, latents: int) -> Tensor:
    factor, pixels = tokenizer.downsample[0], tokenizer.downsample[1]
    frames = 1 + (latents - 1) * factor if tokenizer.encoder.is_causal else latents * factor
    return noise(1, 3, frames, pixels, pixels)


@pytest.mark.parametrize("piece_frames", [1, 6, 16])
@pytest.mark.parametrize("latents", [1, 3, 11])
def test_every_frame_is_that_of_the_whole(tokenizer: VQGAN3D, latents: int, piece_frames: int) -> None:
    video = clip(tokenizer, latents)
    expected = whole(tokenizer).encode(video)
    decoded, native = tokenizer.decode(expected.latents), tokenizer.decode_native(expected.latents)
    tokenizer.piece_frames = piece_frames
    assert torch.allclose(tokenizer.encode(video).latents, expected.latents, rtol=0, atol=1e-10)
    assert torch.allclose(tokenizer.decode(expected.latents), decoded, rtol=0, atol=1e-10)
    assert torch.allclose(tokenizer.decode_native(expected.latents), native, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [[41], [1] * 41, [16, 25], [7, 30, 4]])
def test_a_stream_may_come_in_any_parts(sizes: list[int]) -> None:
    tokenizer = causal()
    video = noise(2, 3, 41, 8, 8)
    expected = whole(tokenizer).encode(video).latents
    decoded = tokenizer.decode(expected)
    tokenizer.piece_frames = 8
    encoded = list(tokenizer.iter_encode(iter(video.split(sizes, dim=2))))
    assert len(encoded) >= 5  # not all at the end
    assert torch.allclose(torch.cat([e.latents for e in encoded], dim=2), expected, rtol=0, atol=1e-10)
    frames = list(tokenizer.iter_decode(iter(expected.split([3, 1, 7], dim=2))))
    assert torch.allclose(torch.cat(frames, dim=2), decoded, rtol=0, atol=1e-10)


def test_in_single_precision_the_difference_is_rounding() -> None:
    for tokenizer in (causal().float(), time_agnostic().float()):
        video = clip(tokenizer, 21).float()
        expected = whole(tokenizer).encode(video).latents
        decoded = tokenizer.decode(expected)
        tokenizer.piece_frames = 16
        assert torch.allclose(tokenizer.encode(video).latents, expected, rtol=0, atol=1e-5)
        assert torch.allclose(tokenizer.decode(expected), decoded, rtol=0, atol=1e-5)


def test_codes_losses_and_statistics_are_those_of_the_whole() -> None:
    for make, quantizer in ((causal, LookupFreeQuantizer(3)), (time_agnostic, VectorQuantizer(8, 3))):
        tokenizer = make(quantizer)
        video = clip(tokenizer, 13)
        expected = whole(tokenizer).encode(video)
        tokenizer.piece_frames = 8
        encoded = tokenizer.encode(video)
        assert torch.equal(encoded.codes, expected.codes)
        assert len(encoded.codes.unique()) > 1
        assert torch.allclose(tokenizer.codes_to_latents(encoded.codes), encoded.latents)
        for name in ("losses", "statistics"):
            ours, theirs = getattr(encoded, name), getattr(expected, name)
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[key].double(), theirs[key].double()) for key in theirs), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"norm": "group", "base_channels": 32, "downsample": (2, 2, 2)},
            "its group norm takes statistics over all frames",
        ),
        ({"padding": "circular"}, "padding='circular' shows the first frames the last ones"),
        ({"padding": "real"}, "padding='real' uses up frames at both ends"),
    ],
)
def test_a_network_that_needs_the_whole_clip_says_why(options: dict[str, Any], reason: str) -> None:
    tokenizer = time_agnostic(**options)
    with pytest.raises(ValueError, match=f"iter_encode: TimeAgnosticEncoder needs the whole clip, since {reason}"):
        next(tokenizer.iter_encode(noise(1, 3, 64, 8, 8)))
    with pytest.raises(ValueError, match=f"iter_decode: TimeAgnosticDecoder needs the whole clip, since {reason}"):
        next(tokenizer.iter_decode(noise(1, 3, 16, 1, 1)))


def test_magvit_needs_the_whole_clip_and_gets_it() -> None:
    tokenizer = magvit()
    with pytest.raises(ValueError, match="MAGVITEncoder needs the whole clip, since its group norm"):
        next(tokenizer.iter_encode(noise(1, 3, 16, 8, 8)))
    video = noise(1, 3, 32, 8, 8)
    latents = tokenizer.encode(video).latents
    assert torch.equal(latents, whole(tokenizer).encode(video).latents)


def test_training_sees_the_whole_clip() -> None:
    tokenizer = time_agnostic().train()
    video = noise(1, 3, 32, 8, 8)
    seen: list[int] = []
    tokenizer.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    tokenizer.encode(video)
    assert seen == [32]
    with pytest.raises(ValueError, match=r"in training, layers take statistics over the whole clip\. Call eval\(\)"):
        next(tokenizer.iter_encode(video))


def test_a_stream_of_a_length_that_does_not_fit_is_refused() -> None:
    tokenizer = causal()
    with pytest.raises(ValueError, match=r"frames=40 .* Nearest: 37 or 41"):
        list(tokenizer.iter_encode(iter(noise(1, 3, 40, 8, 8).split(8, dim=2))))
    with pytest.raises(ValueError, match=r"frames=40 .* Nearest: 37 or 41"):
        next(tokenizer.iter_encode(noise(1, 3, 40, 8, 8)))  # known beforehand
    with pytest.raises(ValueError, match="at least one frame"):
        list(tokenizer.iter_encode(iter(())))


def test_pieces_have_one_size_and_the_last_is_never_empty() -> None:
    video = torch.arange(10.0).view(1, 1, 10, 1, 1)
    for sizes in ([10], [5, 5], [1] * 10, [4, 0, 6]):
        cut = list(pieces(video.split(sizes, dim=2), 5))
        assert [(piece.flatten().tolist(), last) for piece, last in cut] == [
            ([0, 1, 2, 3, 4], False),
            ([5, 6, 7, 8, 9], True),
        ]


class LiveBytes(TorchDispatchMode):
    """Most bytes that tensors made within held at one time."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.given and storage._cdata not in self.storages:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.total += storage.nbytes()
        if self.total > self.peak:  # or less: only now look who is still alive
            self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.total)
        return result


def peak_bytes(run: Callable[[Tensor], Any], given: Tensor) -> int:
    with LiveBytes(given) as live:
        run(given)
    return live.peak


def test_the_counter_counts() -> None:
    def twice(x: Tensor) -> None:
        for _ in range(2):
            y = x + 1  # 4 kB
            z = y[:500] * 2  # 2 kB
            del y, z

    assert peak_bytes(twice, torch.zeros(1000)) == 6000


def exhaust(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (causal, {"channel_multipliers": (1, 1), "temporal_downsample": (True,)}),
        (time_agnostic, {"downsample": (4, 4, 4), "base_channels": 1}),
    ],
)
def test_peak_memory_does_not_grow_with_the_video(make: Callable[..., VQGAN3D], options: dict[str, Any]) -> None:
    tokenizer = make(VectorQuantizer(8, 3), **options).float()
    tokenizer.piece_frames = 16
    peaks: dict[str, list[int]] = {"iter_encode": [], "iter_decode": [], "encode": [], "decode": []}
    for frames in (64, 2048):
        count = frames + 1 if tokenizer.encoder.is_causal else frames
        video = torch.zeros(1, 3, count, 8, 8)
        encoded = tokenizer.encode(video)
        latents = encoded.latents
        given = latents.nbytes + encoded.codes.nbytes
        peaks["iter_encode"].append(peak_bytes(lambda v: exhaust(tokenizer.iter_encode(v)), video))
        peaks["iter_decode"].append(peak_bytes(lambda z: exhaust(tokenizer.iter_decode(z)), latents))
        peaks["encode"].append(peak_bytes(tokenizer.encode, video) - given)
        peaks["decode"].append(peak_bytes(tokenizer.decode, latents) - video.nbytes)
    for name, (short, long) in peaks.items():
        assert 0 < long <= 1.1 * short, (name, short, long)
    at_once = peak_bytes(tokenizer.encoder, video)
    assert at_once > 20 * peaks["iter_encode"][1]
