"""The cache of frames: the clips of the data module it comes from, without decoding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litdata import StreamingDataset

from datamodules import FrameCacheDataModule, FramesDataModule, MovingShapesDataModule
from datamodules.frame_cache import FrameWriter
from datamodules.sampler import ClipRequest
from datamodules.shards import ShardReader
from datamodules.video import VideoClips, VideoDataModule
from datamodules.windows import provenance

HALF_A_LEVEL = 0.5 / 127.5 + 1e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Videos of 20 to 24 frames, 64 x 48 pixels, of two classes."""
    folder = tmp_path_factory.mktemp("videos")
    for split in ("train", "val"):
        for label in ("left", "right"):
            for frames in (20, 24):
                write_video(folder / split / label / f"{frames}.mp4", frames, "mpeg4", 64, 48, bit_rate=400_000)
    return folder


def frames_of(root: Path, **options: Any) -> FramesDataModule:
    return FramesDataModule(str(root), **{"num_frames": 8, "resolution": 32, "batch_size": 2, "seed": 5, **options})


def write(folder: Path, data: VideoDataModule, jpeg: int | None = None, shard_items: int | None = 3) -> Path:
    data.setup("fit")
    FrameWriter(folder, data, jpeg, shard_items).run()
    return folder


def cached(folder: Path, **options: Any) -> FrameCacheDataModule:
    data = FrameCacheDataModule(
        str(folder), **{"num_frames": 8, "resolution": 32, "batch_size": 2, "seed": 5, **options}
    )
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def raw(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("raw") / "frames", frames_of(root))


@pytest.fixture(scope="module")
def lossy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("lossy") / "frames", frames_of(root), jpeg=90)


def largest_difference(one: VideoDataModule, other: VideoDataModule, epoch: int = 0) -> float:
    loaders = [data.train_dataloader() for data in (one, other)]
    for loader in loaders:
        loader.batch_sampler.set_epoch(epoch)
    differences = []
    for stored in zip(*loaders, strict=True):
        a, b = (data.on_after_batch_transfer(batch, 0) for data, batch in zip((one, other), stored, strict=True))
        assert torch.equal(a["index"], b["index"])
        assert torch.equal(a["label"], b["label"])
        assert a["video"].dtype == b["video"].dtype == torch.float32
        differences.append((a["video"] - b["video"]).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("options", [{}, {"frame_stride": 2}, {"horizontal_flip": True}])
@pytest.mark.parametrize("epoch", [0, 3])
def test_clips_are_those_of_the_videos(root: Path, raw: Path, options: dict[str, Any], epoch: int) -> None:
    decoded = frames_of(root, **options)
    decoded.setup("fit")
    assert largest_difference(decoded, cached(raw, **options), epoch) <= HALF_A_LEVEL


def test_windows_of_a_curriculum_are_those_of_the_videos(root: Path, raw: Path) -> None:
    decoded, read = frames_of(root), cached(raw)
    decoded.setup("fit")
    for data in (decoded, read):
        data.set_curriculum(lambda step: 4, 1, 2)
    assert largest_difference(decoded, read) <= HALF_A_LEVEL


def test_worker_processes_write_and_read_the_same(root: Path, raw: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "frames", frames_of(root, num_workers=2))
    for file in raw.rglob("*.*"):
        if file.name != "config.json":  # of whichever shard was last
            assert (other / file.relative_to(raw)).read_bytes() == file.read_bytes(), file
    assert largest_difference(cached(raw), cached(raw, num_workers=2)) == 0


def test_how_files_are_read_is_no_part_of_what_a_header_says(root: Path) -> None:
    said = []
    for options in ({}, {"read_timeout": 60.0, "max_bad_fraction": 0.5, "num_workers": 2}, {"antialias": False}):
        data = frames_of(root, **options)
        data.setup("fit")
        said.append(provenance(data, data.datasets))
    assert said[0] == said[1] != said[2]


def test_a_bad_video_is_empty_in_the_cache_and_stops_nothing(root: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(root, tmp_path / "videos")
    frames_of(videos).prepare_data()  # all are well
    bad, listed = videos / "train/left/20.mp4", videos / "train/right/24.mp4"
    bad.write_bytes(b"<html>")
    stamp = bad.stat().st_mtime_ns
    index = videos / ".longtake/index.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for line in lines:  # as if it had gone bad after it was indexed
        if line["path"] == "train/left/20.mp4":
            line["file"] = [bad.stat().st_size, stamp]
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = frames_of(videos, max_bad_fraction=0.0)
    data.quarantine().add(listed, "24.mp4: not read within 3 seconds")
    with pytest.warns(UserWarning, match=r"(cannot be read, and is empty in the cache|are in quarantine)"):
        folder = write(tmp_path / "frames", data)
    lengths = {name: frames for name, _, frames in json.loads((folder / "train/videos.json").read_text())}
    assert lengths == {"left/20.mp4": 0, "left/24.mp4": 24, "right/20.mp4": 20, "right/24.mp4": 0}
    assert data.num_quarantined() == 1  # what cannot be read as a whole may hold clips that can
    train = cached(folder).datasets["train"]
    assert isinstance(train, VideoClips)
    assert [video.path.as_posix() for video in train.videos] == ["left/24.mp4", "right/20.mp4"]


def test_a_lossy_cache_is_smaller_near_and_says_so(root: Path, raw: Path, lossy: Path) -> None:
    decoded = frames_of(root)
    decoded.setup("fit")
    assert not cached(raw).lossy
    assert cached(lossy).lossy
    assert HALF_A_LEVEL < largest_difference(decoded, cached(lossy)) < 0.5
    sizes = [sum(file.stat().st_size for file in folder.rglob("*.bin")) for folder in (raw, lossy)]
    assert sizes[1] < sizes[0] / 2


def test_the_library_streams_the_frames(raw: Path, lossy: Path) -> None:
    samples = [list(StreamingDataset(str(folder / "train"), shuffle=False)) for folder in (raw, lossy)]
    assert [sample["frames"].shape for sample in samples[0]] == [(n, 32, 32, 3) for n in (20, 24, 20, 24)]
    for sample in samples[1]:
        assert sample["frames"].dtype == np.uint8
        assert sample["ends"][-1] == len(sample["frames"])


def test_the_header_says_what_is_in_the_cache(lossy: Path) -> None:
    header = json.loads((lossy / "cache.json").read_text())
    assert (header["kind"], header["lossy"], header["jpeg_quality"], header["resolution"]) == ("frames", True, 90, 32)
    assert header["transform"]["class"] == "FramesDataModule"
    assert json.loads((lossy / "val/videos.json").read_text())[2] == ["right/20.mp4", 1, 20]


def test_a_data_module_without_videos_is_cached_clip_by_clip(tmp_path: Path) -> None:
    shapes = MovingShapesDataModule(num_train=5, num_val=2, num_frames=8, resolution=32, batch_size=2, seed=5)
    assert largest_difference(shapes, cached(write(tmp_path / "frames", shapes))) <= HALF_A_LEVEL


def test_a_video_of_several_parts_is_put_together(root: Path, raw: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("datamodules.frame_cache._FRAMES_AT_ONCE", 7)
    assert largest_difference(cached(raw), cached(write(tmp_path / "frames", frames_of(root)))) == 0


def test_an_unreadable_video_is_named_and_left_out(root: Path, tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(root, tmp_path / "videos")
    data = frames_of(tmp_path / "videos", cache_dir=str(tmp_path / "index"))
    data.setup("fit")
    (tmp_path / "videos/train/left/24.mp4").write_bytes(b"no video any more")
    with pytest.warns(UserWarning, match=r"left/24.mp4 cannot be read, and is empty in the cache"):
        FrameWriter(tmp_path / "frames", data).run()
    labels = [cached(tmp_path / "frames").datasets["train"][ClipRequest(index)]["label"] for index in range(3)]
    assert labels == [0, 1, 1]


def test_an_interrupted_command_goes_on(root: Path, raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw, tmp_path / "frames")
    for name in ("train/index.json", "train/chunk-0-1.bin", "train/videos.json", "val/index.json"):
        (tmp_path / "frames" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"is not complete: train and val.*longtake cache-frames"):
        cached(tmp_path / "frames")
    kept = (tmp_path / "frames/train/chunk-0-0.bin").stat().st_mtime_ns
    write(tmp_path / "frames", frames_of(root))
    assert (tmp_path / "frames/train/chunk-0-0.bin").stat().st_mtime_ns == kept
    assert largest_difference(cached(raw), cached(tmp_path / "frames")) == 0


@pytest.mark.parametrize("folder", ["raw", "lossy"])
def test_a_damaged_frame_is_found_when_it_is_read(folder: str, tmp_path: Path, request: Any) -> None:
    shutil.copytree(request.getfixturevalue(folder), tmp_path / "frames")
    file = tmp_path / "frames/train/chunk-0-1.bin"
    frames = ShardReader(tmp_path / "frames/train").leaves(3)["frames"].tobytes()
    content = bytearray(file.read_bytes())
    content[bytes(content).index(frames) + len(frames) - 1] ^= 1  # of the last frame
    file.write_bytes(content)
    video = cached(tmp_path / "frames").datasets["train"].videos[3]
    assert len(list(video.frames(0, 23, 1))) == 23
    with pytest.raises(ValueError, match=r"chunk-0-1.bin is damaged: the checksum of item 3 does not match"):
        list(video.frames(23, 1, 1))


def test_shards_have_the_size_that_is_asked_for_or_a_good_one(root: Path, tmp_path: Path) -> None:
    data = frames_of(root)
    data.setup("fit")
    assert FrameWriter(tmp_path, data, shard_items=3).jobs["train"].plan.shard_items == 3
    assert FrameWriter(tmp_path, data).jobs["train"].plan.shard_items == 2**27 // (22 * 32 * 32 * 3)


@pytest.mark.parametrize(
    ("options", "jpeg", "shard_items", "words"),
    [
        ({"random_crop": True}, None, None, "crops at random places. Give --data.random_crop=false"),
        ({}, 96, None, r"jpeg=96 is no quality: from 1 to 95 \(--jpeg\)"),
        ({}, None, 0, "shard_items=0 is too small"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    root: Path, tmp_path: Path, options: dict[str, Any], jpeg: int | None, shard_items: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "frames", frames_of(root, **options), jpeg, shard_items)
    assert not (tmp_path / "frames").exists()


def test_another_size_or_kind_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds frames of resolution=32, not 64 \(--data.resolution\)"):
        cached(raw, resolution=64)
    with pytest.raises(FileNotFoundError, match=r"No frames at .*longtake cache-frames"):
        cached(tmp_path)
