"""Videos and images in one batch, for joint training as W.A.L.T does it.

A row of a batch is one video, or a stack of images that takes its place: as many images as the video has latent frames
(1 + t for 1 + T pixel frames under a causal tokenizer). The images lie in the first frames of the row, the others are
black. The model encodes each of them by itself, as a video of one frame, which gives both kinds of row one latent
shape; and it keeps the images apart from each other in attention. `is_image` tells it which rows these are.

At which positions of an epoch stacks come follows from their share alone: position p holds one where
floor((p + 1) share) exceeds floor(p share). So wherever share x batch size is a whole number, each batch holds exactly
that many.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.sampler import ClipRequest, ResumableLoader
from datamodules.video import Split, VideoDataModule
from models.random import keyed_generator

_VIDEO_STREAM, _IMAGE_STREAM = 131, 132


class MixedClips(Dataset[dict[str, Any]]):
    """Videos `0 ... V - 1`, and behind them the stacks of images of an epoch.

    All videos come once in an epoch. Images are taken one after the other from shuffled passes over all of them, which
    go on from epoch to epoch: with more images than an epoch needs, the next one shows others; with fewer, some come
    again in the same epoch, cropped differently. Which images stack j of epoch e holds follows from (seed, e, j).

    An item holds what a clip of its source does, and `is_image`. `frame_label` `[S]`, and `frame_text` (a list of S)
    where there are captions, say it for each image of a stack; a video's are repeated. `label` and `text` are those of
    a stack's first image, and `index` counts stacks from V on.

    Args:
        videos: data set of clips.
        images: data set of clips of one frame; None for videos alone.
        images_per_stack: images that take a video's place, S.
        num_frames: pixel frames of a row.
        image_ratio: share of the stacks among all rows.
        seed: key of the order.
    """

    def __init__(
        self,
        videos: Dataset[dict[str, Any]],
        images: Dataset[dict[str, Any]] | None,
        images_per_stack: int,
        num_frames: int,
        image_ratio: float,
        seed: int,
    ) -> None:
        self.videos = videos
        self.images = images
        self.images_per_stack = images_per_stack
        self.num_frames = num_frames
        self.seed = seed
        self.num_videos: int = len(videos)  # type: ignore[arg-type] # torch's Dataset declares no length
        # an exact fraction: floor(p x 0.6) falls beside the whole number where p x 0.6 should be one
        self.share = Fraction(image_ratio).limit_denominator(10**6) if images is not None else Fraction(0)

    def __len__(self) -> int:
        return int(self.num_videos / (1 - self.share))

    def quarantined(self) -> Mapping[Path, str]:
        """Return which videos and images are in quarantine and why, as all processes know it by now."""
        found: dict[Path, str] = {}
        for part in (self.videos, self.images):
            if part is not None and hasattr(part, "quarantined"):
                found |= part.quarantined()
        return found

    def order(self, epoch: int) -> list[int]:
        """Return the rows of an epoch: shuffled videos, between them the stacks in the order of their numbers."""
        generator = keyed_generator(self.seed, _VIDEO_STREAM, epoch)
        videos = iter(torch.randperm(self.num_videos, generator=generator).tolist())
        per, of = self.share.as_integer_ratio()
        rows = []
        for position in range(len(self)):
            stack = position * per // of  # how many came before
            rows.append(self.num_videos + stack if (position + 1) * per // of > stack else next(videos))
        return rows

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        if request.index < self.num_videos:
            item = self.videos[request]
            frames, is_image = [item] * self.images_per_stack, False
        else:
            frames, is_image = self._stack(request), True
            item = frames[0] | {key: self._padded(key, frames) for key in ("video", "low_res") if key in frames[0]}
            item["index"] = request.index
        item = item | {"is_image": is_image, "frame_label": torch.tensor([frame["label"] for frame in frames])}
        return item | ({"frame_text": [frame["text"] for frame in frames]} if "text" in item else {})

    def _stack(self, request: ClipRequest) -> list[dict[str, Any]]:
        assert self.images is not None  # else there are no stacks to ask for
        size: int = len(self.images)  # type: ignore[arg-type] # as above
        stack = request.epoch * (len(self) - self.num_videos) + request.index - self.num_videos
        items = []
        for number in range(stack * self.images_per_stack, (stack + 1) * self.images_per_stack):
            image_pass, position = divmod(number, size)
            index = int(_image_order(self.seed, image_pass, size)[position])
            # the pass is the key of an image's random choices: within an epoch it may come twice
            items.append(self.images[replace(request, index=index, epoch=image_pass)])
        return items

    def _padded(self, key: str, images: list[dict[str, Any]]) -> Tensor:
        """Join images `[3, 1, H, W]` to `[3, T, H, W]`."""
        stack = torch.cat([image[key] for image in images], dim=1)
        row = stack.new_full((3, self.num_frames, *stack.shape[2:]), -1.0)
        row[:, : stack.shape[1]] = stack
        return row


@lru_cache(maxsize=2)  # neighbouring stacks are of one pass, or of two
def _image_order(seed: int, image_pass: int, size: int) -> Tensor:
    return torch.randperm(size, generator=keyed_generator(seed, _IMAGE_STREAM, image_pass))


class MixedDataModule(VideoDataModule):
    """Videos and images by a fixed share, from two data modules; validation shows the videos alone.

    Batches hold, besides what both parts hold, `is_image` `[B]` bool and `frame_label` `[B, S]`, and with captions
    `frame_text`, B lists of S strings. A row of images holds S images in its first S frames, the rest is black (-1).
    The parts' batch sizes, worker processes and seeds play no role: those of this module count.

    Args:
        videos: where the videos come from.
        images: where the images come from: clips of one frame, of the videos' resolution.
        image_ratio: share of the rows that are stacks of images, between 0 and 1.
        images_per_stack: images that take a video's place: its latent frames, 5 for 17 frames under W.A.L.T's
            tokenizer.
        num_frames: frames of a clip; the same as the videos'.
        resolution: height and width; the same as the parts'.
        batch_size: rows per training batch and process.
        val_batch_size: videos per validation batch and process, `batch_size` by default.
        num_workers: worker processes per loader; 0 reads in the main process.
        seed: key of the data order and of all random choices in both parts.
    """

    def __init__(
        self,
        videos: VideoDataModule,
        images: VideoDataModule,
        image_ratio: float = 0.5,
        images_per_stack: int = 5,
        num_frames: int = 17,
        resolution: int = 128,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_frames, videos.frame_stride, resolution, batch_size, val_batch_size, num_workers, seed)
        for part_name, part in (("videos", videos), ("images", images)):
            # built in Python, not by the command line: a checkpoint keeps plain values, not the object
            if self.hparams.get(part_name) is part:
                path = f"{type(part).__module__}.{type(part).__name__}"
                self.hparams[part_name] = {"class_path": path, "init_args": dict(part.hparams)}
            part.seed = seed
        for part_name, name, found, expected in (
            ("videos", "num_frames", videos.num_frames, num_frames),
            ("images", "num_frames", images.num_frames, 1),
            ("videos", "resolution", videos.resolution, resolution),
            ("images", "resolution", images.resolution, resolution),
        ):
            if found != expected:
                raise ValueError(
                    f"The {part_name} have {name}={found}, expected {expected} (--data.{part_name}.init_args.{name})."
                )
        if not 0 < image_ratio < 1 or not 1 <= images_per_stack <= num_frames:
            raise ValueError(
                f"image_ratio={image_ratio}, images_per_stack={images_per_stack}: expected a share between 0 and 1, "
                f"and from 1 to num_frames={num_frames} images (--data.image_ratio, --data.images_per_stack)."
            )
        self.videos = videos
        self.images = images
        self.image_ratio = image_ratio
        self.images_per_stack = images_per_stack

    def require_model(self, model: Any) -> None:
        """Refuse a model that would take a stack of images for a video: most of its frames are black.

        Args:
            model: the module to train; it reads `is_image` if its `accepts_images` is True.

        Raises:
            ValueError: if it does not.
        """
        if not getattr(model, "accepts_images", False):
            raise ValueError(
                f"{type(model).__name__}, as it is set up, does not tell images from videos, and would train on the "
                "black frames behind a batch's images. Give a model that does (W.A.L.T with "
                "--model.joint_images=true), or train on the videos alone (--data)."
            )

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets that the stage needs, once, for a model that can tell images from videos."""
        if self.trainer is not None and stage == "fit":
            self.require_model(self.trainer.lightning_module)
        super().setup(stage)

    def prepare_data(self) -> None:
        """Let both parts prepare their data."""
        self.videos.prepare_data()
        self.images.prepare_data()

    def make_dataset(self, split: Split) -> MixedClips:
        """Return videos and stacks of images for training, videos alone for validation."""
        images = self.images.make_dataset(split) if split == "train" else None
        return MixedClips(
            self.videos.make_dataset(split), images, self.images_per_stack, self.num_frames, self.image_ratio, self.seed
        )

    def set_curriculum(self, frames_at: Callable[[int], int], margin_frames: int | None, frame_multiple: int) -> None:
        """Refuse: a stack of images has no window.

        Raises:
            ValueError: always.
        """
        raise ValueError("Videos mixed with images have one length: a curriculum needs the videos alone.")

    def train_dataloader(self) -> ResumableLoader:
        """Return training batches of videos and stacks, resumable at any batch."""
        loader = super().train_dataloader()
        loader.batch_sampler.order = self.datasets["train"].order  # type: ignore[attr-defined] # of MixedClips
        return loader

    def ordered_dataloader(self, split: Split) -> DataLoader[dict[str, Any]]:
        """Return all videos of a split in order, without the images."""
        loader = super().ordered_dataloader(split)
        loader.batch_sampler.dataset_size = self.datasets[split].num_videos  # type: ignore[union-attr,attr-defined]
        return loader
