"""BAIR robot pushing (Ebert et al., 2017): 43,264 + 256 clips of 30 frames, 64x64, two cameras, a robot's arm.

The official archive holds TFRecord files of 256 clips each. Despite their names (`<frame>/<camera>/encoded`), its
images are raw RGB bytes; copies that hold JPEG files under these names are read too.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from datamodules.decoding import UnreadableVideoError, VideoInfo
from datamodules.index import Entry, Level
from datamodules.listing import Video, files_below, spaced_starts
from datamodules.sampler import ClipRequest
from datamodules.tfrecord import Record, parse_example
from datamodules.video import Split, VideoClips, VideoFilesDataModule

NUM_FRAMES = 30
RAW_SHAPE = (64, 64, 3)

_FOLDERS: dict[Split, str] = {"train": "train", "val": "test"}
_INFO = VideoInfo(NUM_FRAMES, RAW_SHAPE[1], RAW_SHAPE[0], rotation=0, container="tfrecords")


@dataclass(frozen=True, kw_only=True)
class BAIRVideo(Video):
    """The frames of one camera in a record, from `first_frame` on; `path` is the record's file.

    Args:
        record: where it lies.
        camera: which images.
        first_frame: number in the record of the video's frame 0.
        verify: whether each reading compares the record with its checksum.
    """

    record: Record
    camera: str
    first_frame: int = 0
    verify: bool = False

    @property
    def place(self) -> Path:
        """What the quarantine list calls it."""
        return self.path / str(self.record.number)

    def frames(self, start: int, count: int, stride: int) -> Iterator[np.ndarray]:
        """Yield frames `start, start + stride, ...` as uint8 `[64, 64, 3]`.

        Raises:
            UnreadableVideoError: if the record cannot be read, or does not hold 30 frames of the camera.
        """
        features = self._features()
        suffix = f"/{self.camera}/encoded"
        expected = {f"{number}{suffix}" for number in range(NUM_FRAMES)}
        found = {key for key in features if key.endswith(suffix)}
        if found != expected:
            cameras = sorted({key.split("/")[1] for key in features if key.endswith("/encoded")})
            raise UnreadableVideoError(
                f"{self.record}: expected {NUM_FRAMES} frames under the keys 0{suffix} to {NUM_FRAMES - 1}{suffix}, "
                f"found {len(found)}; {len(expected - found)} are missing. Its cameras: {', '.join(cameras) or 'none'}."
            )
        for number in self._numbers(start, count, stride):
            yield self._image(f"{number}{suffix}", features)

    def vectors(self, name: str, start: int, count: int, stride: int) -> torch.Tensor:
        """Return `action` `[T, 4]` or `endeffector_pos` `[T, 3]`, float32, of frames `start, start + stride, ...`.

        Raises:
            UnreadableVideoError: if the record does not hold them.
        """
        features = self._features()
        try:
            rows = [features[f"{number}/{name}"] for number in self._numbers(start, count, stride)]
            return torch.from_numpy(np.stack(rows).astype(np.float32))
        except (KeyError, ValueError, TypeError) as error:
            raise UnreadableVideoError(f"{self.record}: no `{name}` for each frame: {error}") from error

    def _features(self) -> dict[str, Any]:
        try:
            return parse_example(self.record.read(self.verify))
        except ValueError as error:
            raise UnreadableVideoError(f"{self.record}: {error}") from error

    def _numbers(self, start: int, count: int, stride: int) -> range:
        first = self.first_frame + start
        return range(first, first + count * stride, stride)

    def _image(self, key: str, features: dict[str, Any]) -> np.ndarray:
        values = features[key]
        data = bytes(values[0]) if isinstance(values, list) and len(values) == 1 else b""
        if data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"):
            try:
                with Image.open(io.BytesIO(data)) as image:
                    return np.array(image.convert("RGB"))
            except OSError as error:
                raise UnreadableVideoError(f"{self.record}: {key} is a broken JPEG file: {error}") from error
        if len(data) != np.prod(RAW_SHAPE):
            raise UnreadableVideoError(
                f"{self.record}: {key} holds {len(data)} bytes, expected {np.prod(RAW_SHAPE)} (64x64 RGB) or a JPEG."
            )
        return np.frombuffer(data, np.uint8).reshape(RAW_SHAPE).copy()  # torch wants to be able to write


class BAIRClips(VideoClips):
    """Clips of BAIR with the arm's commands: `action` `[T, 4]` and `endeffector_pos` `[T, 3]` of the clip's frames."""

    def item(self, request: ClipRequest) -> dict[str, Any]:
        """Return the item of this clip and no other, with the commands."""
        item = super().item(request)
        video = self.videos[request.index]
        assert isinstance(video, BAIRVideo)
        start = self.start(request.index, request.epoch) + request.read_start * self.frame_stride
        for name in ("action", "endeffector_pos"):
            item[name] = video.vectors(name, start, item["video"].shape[1], self.frame_stride)
        return item


class BAIRDataModule(VideoFilesDataModule):
    """BAIR robot pushing, the small version (64x64): one clip a record, from a random place in each epoch.

    The root holds `softmotion30_44k/{train,test}/*.tfrecords`, or is that folder. Validation uses the test records:
    from their first frame, as the standard protocol has it, or windows evenly spaced in time. All labels are 0.

    Damaged records are found when the files are indexed, once, and left out with a warning that names file, record and
    byte. Records that turn out not to hold 30 frames of the camera go into quarantine, and are replaced by others.

    Args:
        root: folder of the data set; the environment variable LONGTAKE_BAIR by default.
        camera: the papers use image_aux1; numbers for image_main are not comparable.
        num_frames: frames of a clip; a record has 30.
        frame_stride: distance of neighbouring frames of a clip in the record, 1 for all frames.
        resolution: height and width of a clip, in pixels; 64 is stored.
        antialias: whether the bilinear resize filters when it shrinks.
        horizontal_flip: whether half of the training clips are mirrored.
        actions: whether batches also hold `action` `[B, T, 4]` and `endeffector_pos` `[B, T, 3]`, float32.
        val_windows: clips of each test record, evenly spaced: 1 begins at its first frame, 15 of 16 frames are MAGVIT's
            debiased protocol, the first window of all records first; null takes one at a place drawn from the seed.
        verify: when records are compared with their checksums: once, as the files are indexed; always, at each reading
            too; or never.
        cache_dir: where to keep the index of the records and the quarantine list; `<root>/.longtake` by default.
        max_bad_fraction: share of the records that may turn out unreadable before the run stops (at least one record,
            unless it is 0), judged after 100 reads.
        batch_size: training clips per batch and process.
        val_batch_size: validation clips per batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 reads in the main process.
        seed: key of the data order and of all random choices in clips.

    Raises:
        ValueError: if 30 frames do not hold the clips asked for, or mirrored clips are asked for with actions.
    """

    title = "BAIR"
    root_variable = "LONGTAKE_BAIR"
    source = (
        "The data set is one archive of 32 GB, http://rail.eecs.berkeley.edu/datasets/bair_robot_pushing_dataset_v0.tar"
        ": softmotion30_44k/{train,test}/traj_<first>_to_<last>.tfrecords."
    )

    def __init__(
        self,
        root: str | None = None,
        camera: Literal["image_aux1", "image_main"] = "image_aux1",
        num_frames: int = 16,
        frame_stride: int = 1,
        resolution: int = 64,
        antialias: bool = True,
        horizontal_flip: bool = False,
        actions: bool = False,
        val_windows: int | None = 1,
        verify: Literal["once", "always", "never"] = "once",
        cache_dir: str | None = None,
        max_bad_fraction: float = 0.01,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            num_frames,
            frame_stride,
            resolution,
            antialias=antialias,
            horizontal_flip=horizontal_flip,
            val_windows=val_windows,
            cache_dir=cache_dir,
            max_bad_fraction=max_bad_fraction,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.span = (num_frames - 1) * frame_stride + 1
        starts = NUM_FRAMES - self.span + 1
        if starts < 1:
            raise ValueError(
                f"BAIR: {num_frames} frames at stride {frame_stride} span {self.span}, but a record has {NUM_FRAMES}. "
                "Lower --data.num_frames or --data.frame_stride."
            )
        if val_windows is not None and val_windows > starts:
            raise ValueError(
                f"BAIR: a record has {starts} windows of {num_frames} frames at stride {frame_stride}, "
                f"not {val_windows} (--data.val_windows)."
            )
        if actions and horizontal_flip:
            raise ValueError(
                "BAIR: a mirrored clip does not show the command that the arm was given. "
                "Switch off --data.horizontal_flip or --data.actions."
            )
        self.camera = camera
        self.actions = actions
        self.verify = verify
        self._level: Level = "quick" if verify == "never" else "full"

    def class_names(self) -> list[str]:
        """Return the one class that there is."""
        return ["robot pushing"]

    def entries(self, level: Level = "full", again: bool = False) -> dict[Path, Entry]:
        """Examine the record files that are not yet in the index; each record is taken for 30 frames."""
        return {path: _with_frames(path, entry) for path, entry in super().entries(level, again).items()}

    def prepare_data(self) -> None:
        """Index the records, in one process of each machine; the others read the index."""
        self.entries(self._level)

    def make_dataset(self, split: Split) -> VideoClips:
        """Return the clips of the training or of the test records.

        Raises:
            FileNotFoundError: if the root or the files are not there.
            UnreadableVideoError: if the first record is not one of BAIR's.
        """
        videos = [
            BAIRVideo(
                path=record.path,
                label=0,
                num_frames=NUM_FRAMES,
                record=record,
                camera=self.camera,
                verify=self.verify == "always",
            )
            for record in self._records(split)
        ]
        next(videos[0].frames(0, 1, 1))  # another data set fails here, and not record by record
        if self.actions:
            videos[0].vectors("action", 0, 1, 1)
        if split == "val" and self.val_windows is not None:
            starts = spaced_starts(NUM_FRAMES, self.span, self.val_windows)
            videos = [replace(v, first_frame=start, num_frames=self.span) for start in starts for v in videos]
        return self.make_clips(videos, split, BAIRClips if self.actions else VideoClips)

    def listing(self) -> dict[Split, dict[Path, int]]:
        """Return the record files of both splits, in the order of their numbers, with the label 0.

        Raises:
            FileNotFoundError: if there are none.
        """
        root = self.found_root()
        base = root / "softmotion30_44k" if (root / "softmotion30_44k").is_dir() else root
        found: dict[Split, dict[Path, int]] = {}
        for split, folder in _FOLDERS.items():
            files = sorted(files_below(base / folder, (".tfrecords",)), key=lambda file: (_bounds(file), file))
            if not files:
                raise FileNotFoundError(f"BAIR: no traj_*.tfrecords in {base / folder} {self.hint()}")
            found[split] = dict.fromkeys(files, 0)
        return found

    def _records(self, split: Split) -> list[Record]:
        """Return the sound records of a split, and warn of the others."""
        entries = self.entries(self._level)
        files = {path: entries[path] for path in self.listing()[split]}
        if reasons := [entry.error for entry in files.values() if entry.error]:
            rank_zero_warn(f"BAIR {split}: records are missing or damaged, and left out: {'; '.join(reasons[:3])}")
        found = [Record(path, *place) for path, entry in files.items() for place in entry.records]
        if not found:
            raise FileNotFoundError(f"BAIR {split}: no sound record in {len(files)} files {self.hint()}")
        return found


def _with_frames(path: Path, entry: Entry) -> Entry:
    """Say what reading needs to know of a file's records, and whether there are as many as its name promises."""
    first, last = _bounds(path)
    error, is_truncated, found, promised = entry.error, entry.is_truncated, len(entry.records), last - first + 1
    if not error and found != promised > 0:
        is_truncated = found < promised  # cut between two records, where nothing in the file tells
        error = f"{path} {'ends after' if is_truncated else 'holds'} {found} records; its name promises {promised}"
    return replace(entry, info=_INFO if entry.records else None, error=error, is_truncated=is_truncated)


def _bounds(file: Path) -> tuple[int, int]:
    """Return the numbers of the first and the last record that a file's name promises; (0, -1) if it does not say."""
    match = re.fullmatch(r"traj_(\d+)_to_(\d+)", file.stem)
    return (int(match[1]), int(match[2])) if match else (0, -1)
