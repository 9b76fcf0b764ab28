"""The cache of tokens: what is written, what is read back, how it goes on after a kill, and what is refused."""

import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litdata import StreamingDataset
from numbered_video import numbered_frame, read_number
from torch import Tensor

from datamodules import MovingShapesDataModule, TokenDataModule
from datamodules.listing import Video
from datamodules.sampler import ClipRequest
from datamodules.shards import ShardReader
from datamodules.tokens import CachedTokens, TokenOptions, TokenWriter, codes_type, read_codes
from datamodules.video import Split, VideoClips, VideoDataModule

ABOUT: dict[str, Any] = {"tokenizer_digest": "abc", "codebook_size": 1000, "downsample": (4, 8, 8)}
Encode = Callable[[Tensor], Mapping[str, Tensor]]


def shades(video: Tensor) -> Tensor:
    """A tokenizer for tests: the mean brightness of 4 x 8 x 8 pixels, in 1000 steps."""
    patches = video.mean(dim=1).unflatten(1, (-1, 4)).unflatten(3, (-1, 8)).unflatten(5, (-1, 8))
    return ((patches.mean(dim=(2, 4, 6)) + 1) * 499.5).round().long()  # [B, t, h, w]


def as_codes(video: Tensor) -> dict[str, Tensor]:
    return {"codes": shades(video)}


def as_latents(video: Tensor) -> dict[str, Tensor]:
    grid = shades(video).float()
    return {"latents": torch.stack([grid / 1000, grid.sqrt()], dim=1)}  # [B, 2, t, h, w]


def moving_shapes(**options: Any) -> MovingShapesDataModule:
    return MovingShapesDataModule(
        **{"num_train": 7, "num_val": 3, "num_frames": 16, "resolution": 32, "batch_size": 3, "seed": 5, **options}
    )


class NumberedVideo(Video):
    """Frames that say their number, of a video that needs no file."""

    def frames(self, start: int, count: int, stride: int) -> Any:
        return (numbered_frame(number, 32, 32) for number in range(start, start + count * stride, stride))


class NumberedVideos(VideoDataModule):
    """Videos of 16 to 24 frames."""

    flip = False

    def make_dataset(self, split: Split) -> VideoClips:
        lengths = (16, 19, 24) if split == "train" else (18,)
        videos = [NumberedVideo(Path(f"root/class/{n}.avi"), 10 + n, n) for n in lengths]
        return VideoClips(
            videos, self.num_frames, self.frame_stride, self.resolution, self.seed, horizontal_flip=self.flip
        )


def first_frame(video: Tensor) -> dict[str, Tensor]:
    """Codes that say which frame a clip begins with."""
    numbers = [read_number(((clip[:, 0].permute(1, 2, 0) + 1) * 127.5).numpy()) for clip in video]
    return {"codes": torch.tensor(numbers)[:, None, None, None].expand(-1, video.shape[2] // 4, 4, 4)}


def write(folder: Path, data: VideoDataModule, encode: Encode = as_codes, about: Any = ABOUT, **options: Any) -> Path:
    data.setup("fit")
    writer = TokenWriter(folder, data, about, TokenOptions(**{"shard_items": 3, **options}))
    writer.begin()
    writer.write(encode)
    writer.close()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but for the description of the shard that happened to be written last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tokens") / "codes", moving_shapes())


def opened(cache: Path, **options: Any) -> TokenDataModule:
    module = TokenDataModule(str(cache), **{"num_frames": 16, "resolution": 32, "batch_size": 2, "seed": 5, **options})
    module.setup("fit")
    return module


# What is kept


@pytest.mark.parametrize(("split", "count"), [("train", 7), ("val", 3)])
def test_every_clip_is_kept_once_in_order(cache: Path, split: Split, count: int) -> None:
    """The last batch and the last shard are smaller: nothing is lost or repeated."""
    pixels = moving_shapes()
    pixels.setup("fit")
    tensors, about = read_codes(cache, split)
    clips = [pixels.datasets[split][ClipRequest(index)] for index in range(count)]
    assert torch.equal(tensors["codes"], shades(torch.stack([clip["video"] for clip in clips])))
    assert tensors["codes"].dtype == torch.int64
    assert tensors["label"].tolist() == [clip["label"] for clip in clips]
    assert tensors["index"].tolist() == list(range(count))
    assert about["tokenizer_digest"] == "abc"


def test_the_header_says_what_made_the_cache(cache: Path) -> None:
    header = json.loads((cache / "cache.json").read_text())
    digests = header.pop("data_digest")
    assert len({digests["train"], digests["val"]}) == 2
    transform = header.pop("transform")
    assert transform["class"] == "MovingShapesDataModule"
    assert transform["speed"] == [0.02, 0.06]
    assert transform["seed"] == 5
    assert not transform.keys() & {"root", "batch_size", "num_workers"}
    assert header == {
        "format_version": 1,
        "kind": "tokens",
        "tokenizer_digest": "abc",
        "codebook_size": 1000,
        "downsample": [4, 8, 8],
        "num_frames": 16,
        "resolution": 32,
        "fields": {"codes": "uint16"},
        "tasks": {},
        "windows": {"policy": "clip", "stride": None},
        "copies": {"train": 1, "val": 1},
        "samples": {"train": 7, "val": 3},
        "shard_items": 3,
    }


def test_the_library_streams_the_codes(cache: Path) -> None:
    streamed = list(StreamingDataset(str(cache / "val"), shuffle=False))
    tensors, _ = read_codes(cache, "val")
    for number, sample in enumerate(streamed):
        assert np.array_equal(sample["codes"], tensors["codes"][number])
        assert (sample["index"], sample["source"]) == (number, str(number).encode())
    assert len(streamed) == 3


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [
        (2**8, "uint8"),
        (2**8 + 1, "uint16"),
        (2**16, "uint16"),
        (2**16 + 1, "int32"),
        (2**31, "int32"),
        (2**40, "int64"),
    ],
)
def test_codes_take_as_few_bytes_as_the_codebook_allows(tmp_path: Path, codebook_size: int, dtype: str) -> None:
    def largest(video: Tensor) -> dict[str, Tensor]:
        return {"codes": torch.full((len(video), 1, 2, 1), codebook_size - 1)}

    assert codes_type(codebook_size) == dtype
    folder = write(tmp_path / "codes", moving_shapes(), largest, ABOUT | {"codebook_size": codebook_size})
    reader = ShardReader(folder / "val")
    header = 4 * (2 + 3)  # type and number of axes, then their lengths
    assert len(reader.leaves(0)["codes"]) == header + 2 * np.dtype(dtype).itemsize
    assert read_codes(folder, "val")[0]["codes"].flatten().tolist() == [codebook_size - 1] * 6


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_latents_come_back_with_the_statistics_of_their_channels(tmp_path: Path, kind: Any, dtype: torch.dtype) -> None:
    pixels = moving_shapes()
    data = opened(write(tmp_path / "latents", pixels, as_latents, ABOUT | {"codebook_size": None}, latents=kind))
    clips = [data.datasets["train"][ClipRequest(index)]["latents"] for index in range(7)]
    written = torch.cat([as_latents(batch["video"])["latents"] for batch in pixels.ordered_dataloader("train")])
    assert clips[0].dtype == torch.float32
    assert torch.equal(torch.stack(clips), written.to(dtype).float())
    columns = torch.stack(clips).double().movedim(1, 0).flatten(1)
    mean, std = data.latent_statistics()
    torch.testing.assert_close(mean.double(), columns.mean(dim=1))
    torch.testing.assert_close(std.double(), columns.std(dim=1, correction=0))


def test_codes_and_latents_of_one_cache_go_to_the_models_that_need_them(tmp_path: Path) -> None:
    def both(video: Tensor) -> dict[str, Tensor]:
        return as_codes(video) | as_latents(video)

    folder = write(tmp_path / "tokens", moving_shapes(), both, latents="fp32")
    assert opened(folder).datasets["train"][ClipRequest(0)].keys() == {"label", "index", "codes", "latents"}
    codes = read_codes(folder, "train")[0]["codes"]
    for grid, other in (("codes", "latents"), ("latents", "codes")):
        data = TokenDataModule(str(folder), num_frames=16, resolution=32)
        data.require("abc", grid, {})  # type: ignore[arg-type] # mypy takes the words for any
        data.setup("fit")
        clip = data.datasets["train"][ClipRequest(3)]
        assert other not in clip
        assert torch.equal(clip.get("codes", (clip[grid][0] * 1000).round().long()), codes[3])


def test_a_cache_without_what_the_model_is_trained_on_is_refused(cache: Path, tmp_path: Path) -> None:
    data = TokenDataModule(str(cache), num_frames=16, resolution=32)
    data.require("abc", "latents", {})
    with pytest.raises(ValueError, match=r"holds no latents, which the model is trained on.*--latents=bf16"):
        data.setup("fit")
    folder = write(tmp_path / "real", moving_shapes(), as_latents, ABOUT | {"codebook_size": None}, latents="bf16")
    data = TokenDataModule(str(folder), num_frames=16, resolution=32)
    data.require("abc", "codes", {})
    with pytest.raises(ValueError, match=r"holds no codes, which the model is trained on.*longtake tokenize"):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"holds latents alone, and codes are needed.*longtake tokenize"):
        read_codes(folder, "train")


def test_an_item_tells_its_video_and_where_in_it_it_begins(tmp_path: Path) -> None:
    data = NumberedVideos(num_frames=8, resolution=32, seed=3)
    reader = ShardReader(write(tmp_path / "codes", data, first_frame) / "train")
    for number, length in enumerate((16, 19, 24)):
        leaves = reader.leaves(number)
        assert leaves["source"].tobytes() == f"class/{length}.avi".encode()
        start = reader.integer(leaves["start"])
        assert start == data.datasets["train"].start(number, 0)
        assert reader.array(leaves["codes"], "<u2")[0, 0, 0] == start


# Windows and copies


def test_copies_are_what_the_first_epochs_show(tmp_path: Path) -> None:
    pixels = NumberedVideos(num_frames=8, resolution=32, batch_size=3, seed=3)
    cached = opened(write(tmp_path / "codes", pixels, first_frame, copies=4), num_frames=8, batch_size=3, seed=3)
    assert len(cached.datasets["train"]) == 3
    loaders = [module.train_dataloader() for module in (pixels, cached)]
    seen = []
    for epoch in range(4):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
        (shown,), (kept,) = (list(loader) for loader in loaders)
        video = pixels.on_after_batch_transfer(shown, 0)["video"]
        assert torch.equal(first_frame(video)["codes"], kept["codes"])
        assert torch.equal(shown["index"], kept["index"])
        assert torch.equal(shown["label"], kept["label"])
        seen.append(cached.datasets["train"][ClipRequest(2, epoch)]["codes"][0, 0, 0].item())
    assert len(set(seen)) > 1
    assert cached.datasets["train"][ClipRequest(2, 4 + 1)]["codes"][0, 0, 0] == seen[1]  # then they come again
    assert len(cached.datasets["val"]) == 1


@pytest.mark.parametrize(
    ("stride", "starts"),
    [
        (None, [[0, 8], [0, 8, 11], [0, 8, 16]]),  # the last window ends with the video
        (4, [[0, 4, 8], [0, 4, 8, 11], [0, 4, 8, 12, 16]]),
    ],
)
def test_windows_cover_each_video(tmp_path: Path, stride: int | None, starts: list[list[int]]) -> None:
    data = NumberedVideos(num_frames=8, resolution=32, seed=3)
    folder = write(tmp_path / "codes", data, first_frame, windows="cover", window_stride=stride)
    tensors, _ = read_codes(folder, "train")
    assert tensors["codes"][:, 0, 0, 0].tolist() == [start for video in starts for start in video]
    assert tensors["label"].tolist() == [label for label, v in zip((26, 29, 34), starts, strict=True) for _ in v]
    reader = ShardReader(folder / "train")
    assert [reader.integer(reader.leaves(n)["start"]) for n in range(len(reader))] == [
        start for video in starts for start in video
    ]
    assert len(opened(folder, num_frames=8).datasets["train"]) == len(reader)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (NumberedVideos, {"windows": "cover", "copies": 2}, "all copies of a window would be equal"),
        (NumberedVideos, {"window_stride": 4}, "--windows=cover; give both or neither"),
        (NumberedVideos, {"windows": "cover", "window_stride": 0}, r"window_stride=0 is no distance"),
        (MovingShapesDataModule, {"windows": "cover"}, "MovingShapes has no videos to cover: give --windows=clip"),
        (NumberedVideos, {"copies": 0}, "copies=0, shard_items=3: at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, data: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "codes", data(num_frames=8, resolution=32), first_frame, **options)
    assert not (tmp_path / "codes").exists()


# Tasks


def test_the_condition_codes_of_the_tasks_that_a_model_needs_come_along(tmp_path: Path) -> None:
    def with_condition(video: Tensor) -> dict[str, Tensor]:
        return {
            "codes": shades(video),
            "task/upside_down": shades(video.flip(3)),
            "task/mirrored": shades(video.flip(4)),
        }

    tasks = {"upside_down": {}, "mirrored": {"axis": 4}}
    folder = write(tmp_path / "codes", moving_shapes(), with_condition, tasks=tasks)

    def required(folder: Path, **needed: Any) -> dict[str, Any]:
        data = TokenDataModule(str(folder), num_frames=16, resolution=32)
        data.require("abc", "codes", needed)
        data.setup()
        return data.datasets["train"][ClipRequest(1, window_start=4, window_frames=8)]

    clip = required(folder, upside_down={})
    assert clip["codes"].shape == (2, 4, 4)
    assert torch.equal(clip["task/upside_down"], clip["codes"].flip(1))
    assert "task/mirrored" not in clip
    assert {"task/upside_down", "task/mirrored"} < required(folder, **tasks).keys()
    with pytest.raises(ValueError, match=r"no condition codes of inward, .*--model.tasks.*its tasks: upside_down, mi"):
        required(folder, inward={}, mirrored={"axis": 4})
    with pytest.raises(ValueError, match=r"other settings than the model's: mirrored: {'axis': 4}, not {'axis': 3}"):
        required(folder, mirrored={"axis": 3})


def test_a_cache_without_tasks_says_so(cache: Path) -> None:
    data = TokenDataModule(str(cache), num_frames=16, resolution=32)
    data.require("abc", "codes", {"inward": {}})
    with pytest.raises(ValueError, match=r"no condition codes of inward.* its tasks: none"):
        data.setup()


def test_a_tokenizer_that_gives_other_grids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds \['codes', 'task/inward'\], but got \['codes'\] to write"):
        write(tmp_path / "codes", moving_shapes(), tasks={"inward": {}})


# Interruptions and processes


def test_processes_make_what_one_makes(cache: Path, tmp_path: Path) -> None:
    data = moving_shapes()
    data.setup("fit")
    writer = TokenWriter(tmp_path / "codes", data, ABOUT, TokenOptions(shard_items=3))
    writer.begin()
    for rank in (2, 0, 1):
        writer.write(as_codes, rank, world_size=3)
    writer.close()
    assert contents(tmp_path / "codes") == contents(cache)


def test_worker_processes_make_what_none_make(cache: Path, tmp_path: Path) -> None:
    assert contents(write(tmp_path / "codes", moving_shapes(num_workers=2))) == contents(cache)


def _write_until_killed(folder: Path) -> None:
    torch.set_num_threads(1)  # the threads of the process that this one is a copy of are not there to wait for
    batches: list[int] = []

    def kills_itself(video: Tensor) -> dict[str, Tensor]:
        batches.append(len(video))
        if sum(batches) == 6:  # of two shards of three clips, the second is not written yet
            os.kill(os.getpid(), signal.SIGKILL)
        return as_codes(video)

    write(folder, moving_shapes(batch_size=2), kills_itself)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_command_goes_on_and_ends_with_the_same_cache(cache: Path, tmp_path: Path, world_size: int) -> None:
    folder = tmp_path / "codes"
    process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(folder,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (folder / "train").glob("*.bin")] == ["chunk-0-0.bin"]
    with pytest.raises(FileNotFoundError, match=r"is not complete: train and val\. .*goes on.*longtake tokenize"):
        opened(folder)

    data, clips = moving_shapes(batch_size=2), []

    def counts(video: Tensor) -> dict[str, Tensor]:
        clips.append(len(video))
        return as_codes(video)

    data.setup("fit")
    writer = TokenWriter(folder, data, ABOUT, TokenOptions(shard_items=3))
    writer.begin()
    for rank in range(world_size):
        writer.write(counts, rank, world_size)
    writer.close()
    assert sum(clips) == 7 + 3 - 3  # what was there is not computed again
    assert contents(folder) == contents(cache)


@pytest.mark.parametrize(
    ("data", "about", "words"),
    [
        ({"speed": (0.1, 0.2)}, {}, "transform: "),
        ({"num_train": 8}, {}, "samples: "),
        ({}, {"tokenizer_digest": "xyz"}, "tokenizer_digest: abc there, xyz now"),
    ],
)
def test_an_unfinished_cache_of_other_settings_is_refused(
    cache: Path, tmp_path: Path, data: dict[str, Any], about: dict[str, Any], words: str
) -> None:
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/cache.json").write_bytes((cache / "cache.json").read_bytes())
    with pytest.raises(ValueError, match=f"unfinished cache that was begun with other settings:(.|\n)*{words}"):
        write(tmp_path / "codes", moving_shapes(**data), about=ABOUT | about)


def test_a_complete_cache_is_not_written_to(cache: Path) -> None:
    before = contents(cache)
    with pytest.raises(FileExistsError, match=r"codes exists already.*\(--out\)"):
        write(cache, moving_shapes())
    assert contents(cache) == before


# Reading


@pytest.mark.parametrize(("start", "frames"), [(0, 4), (4, 8), (12, 4), (0, 16)])
def test_a_window_is_a_slice_of_the_codes(cache: Path, start: int, frames: int) -> None:
    clips = opened(cache).datasets["train"]
    whole = clips[ClipRequest(1)]
    # a margin is asked for, as it would be of pixels, and is not needed
    item = clips[ClipRequest(1, window_start=start, window_frames=frames, read_start=max(0, start - 8), read_frames=16)]
    assert torch.equal(item.pop("codes"), whole["codes"][start // 4 : (start + frames) // 4])
    assert item == {
        "label": whole["label"],
        "index": 1,
        "window_start": start,
        "window_frames": frames,
        "margin_before": 0,
    }


def test_a_causal_window_counts_its_first_frame(tmp_path: Path) -> None:
    def causal(video: Tensor) -> dict[str, Tensor]:
        return {"codes": torch.arange(5)[None, :, None, None].expand(len(video), -1, 2, 2)}

    folder = write(tmp_path / "codes", moving_shapes(num_frames=17), causal)
    clips = opened(folder, num_frames=17).datasets["train"]
    assert clips[ClipRequest(0, window_frames=9)]["codes"][:, 0, 0].tolist() == [0, 1, 2]


def test_without_a_curriculum_a_clip_is_all_of_its_codes(cache: Path) -> None:
    item = opened(cache).datasets["train"][ClipRequest(2)]
    assert item.keys() == {"codes", "label", "index"}
    assert item["codes"].shape == (4, 4, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_those_of_the_pixels(cache: Path, workers: int) -> None:
    """Cached codes and pixels give a prior the same clips in the same windows."""
    loaders = []
    for module in (moving_shapes(), opened(cache, batch_size=3, num_workers=workers)):
        module.set_curriculum(lambda step: (4, 12)[step % 2], 8, 4)
        module.setup("fit")
        loaders.append(module.train_dataloader())
    for pixels, cached in zip(*loaders, strict=True):
        assert torch.equal(pixels["index"], cached["index"])
        assert torch.equal(pixels["label"], cached["label"])
        assert pixels["window_start"] == cached["window_start"]
        assert pixels["window_frames"] == cached["window_frames"]
        first = pixels["margin_before"] // 4
        window = shades(pixels["video"])[:, first : first + pixels["window_frames"] // 4]
        assert torch.equal(window, cached["codes"])


def test_validation_keeps_whole_clips_under_a_curriculum(cache: Path) -> None:
    data = opened(cache)
    data.set_curriculum(lambda step: 4, 8, 4)
    batches = list(data.val_dataloader())
    assert [tuple(batch["codes"].shape) for batch in batches] == [(2, 4, 4, 4), (1, 4, 4, 4)]
    assert "window_frames" not in batches[0]


def test_clips_stay_on_disk(cache: Path) -> None:
    """What goes to a worker does not grow with the cache, nor by reading it."""
    clips = opened(cache).datasets["train"]
    assert isinstance(clips, CachedTokens)
    fresh = len(pickle.dumps(clips))
    assert fresh < 2000
    for index in range(7):
        clips[ClipRequest(index)]
    assert len(pickle.dumps(clips)) == fresh


def test_what_is_read_can_be_written_to_without_changing_the_cache(cache: Path) -> None:
    clips = opened(cache).datasets["train"]
    clips[ClipRequest(0)]["codes"].zero_()
    assert clips[ClipRequest(0)]["codes"].any()


def test_a_damaged_file_is_named_when_the_clip_is_read(cache: Path, tmp_path: Path) -> None:
    for name, content in contents(cache).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    file = tmp_path / "train/chunk-0-1.bin"
    reader = ShardReader(tmp_path / "train")
    codes = reader.leaves(4)["codes"].tobytes()
    content = bytearray(file.read_bytes())
    content[bytes(content).index(codes) + len(codes) - 1] ^= 1  # one bit
    file.write_bytes(content)
    clips = opened(tmp_path).datasets["train"]
    clips[ClipRequest(5)]
    with pytest.raises(ValueError, match=r"chunk-0-1.bin is damaged: the checksum of item 4 does not match"):
        clips[ClipRequest(4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 32}, r"holds tokens for num_frames=16, not 32 \(--data.num_frames\)"),
        ({"resolution": 64}, r"holds tokens for resolution=32, not 64 \(--data.resolution\)"),
    ],
)
def test_codes_of_other_clips_are_refused(cache: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(cache, **changes)


def test_codes_of_another_tokenizer_are_refused(cache: Path) -> None:
    data = TokenDataModule(str(cache), num_frames=16, resolution=32)
    data.require("xyz", "codes", {})
    with pytest.raises(ValueError, match=r"made by tokenizer abc, the model uses xyz.*--model.tokenizer"):
        data.setup("validate")


def test_codes_of_the_models_tokenizer_are_taken(cache: Path) -> None:
    data = TokenDataModule(str(cache), num_frames=16, resolution=32)
    data.require("abc", "codes", {})
    data.setup("fit")
    assert len(data.datasets["train"]) == 7
