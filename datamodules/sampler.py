"""Which clips make a batch, and which frames of them: a pure function of (seed, epoch, position).

The order of an epoch is a permutation drawn from (seed, epoch). Global batch b is the slice `[b*B*W, (b+1)*B*W)` of it,
and rank r of W takes the r-th run of B clips inside that slice. So one process with batches of 2B sees what two with B
see, a run that resumes sees what an uninterrupted one sees, and nothing of it is state: the loader only remembers how
many batches it has handed out.

Clip lengths that change during training (a curriculum) are decided here too, from the optimizer step that a batch
belongs to: worker processes prefetch, so that an attribute set in a callback would arrive some batches late.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from models.random import keyed_generator

# Streams keep draws apart that share the seed and a counter: epoch 3 and step 3 are not the same key.
_ORDER_STREAM, _WINDOW_STREAM = 101, 102


@dataclass(frozen=True)
class ClipRequest:
    """What a data set is asked for: one clip, or the frames of it that a curriculum needs.

    All frame numbers count frames of the clip (after the stride), from 0.

    Args:
        index: which sample of the data set.
        epoch: key of the random choices inside the sample (start in the video, crop, flip).
        window_start: first frame of the training window.
        window_frames: length of the window; None without a curriculum, when the whole clip is used.
        read_start: first frame to read: the window's margin comes before it.
        read_frames: how many frames to read; None for all from `read_start` on.
    """

    index: int
    epoch: int = 0
    window_start: int = 0
    window_frames: int | None = None
    read_start: int = 0
    read_frames: int | None = None


def make_item(request: ClipRequest, video: torch.Tensor, label: int, **more: Any) -> dict[str, Any]:
    """Return a data set's item: `video` `[3, T, H, W]`, its label and index, the window if there is one, and `more`.

    What else a data set may know of a clip: `text` (a string), `is_image` (a bool), `audio` and `low_res` (tensors).
    """
    item = {"video": video, "label": label, "index": request.index, **more}
    if request.window_frames is not None:
        item["window_start"] = request.window_start
        item["window_frames"] = request.window_frames
        item["margin_before"] = request.window_start - request.read_start
    return item


def float_video(batch: dict[str, Any]) -> dict[str, Any]:
    """Turn an item's or a batch's `video` of whole numbers from 0 to 255 into float32 in [-1, 1]; other video stays."""
    video = batch.get("video")
    if video is None or video.dtype != torch.uint8:
        return batch
    return batch | {"video": video.float().div_(127.5).sub_(1)}


def collate_clips(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of items: tensors are stacked, labels, indices and flags become tensors, texts become a list.

    The window stays three plain integers, since it is the same for the whole batch.

    Raises:
        ValueError: if some items hold what others do not.
    """
    partial = {key for item in items for key in item.keys() ^ items[0].keys()}
    if partial:
        raise ValueError(f"Only some clips of the batch hold {', '.join(sorted(partial))}: all must, or none.")
    batch = dict(items[0])
    for key, value in items[0].items():
        column = [item[key] for item in items]
        if isinstance(value, torch.Tensor):
            batch[key] = default_collate(column)  # in a worker, straight into memory that the processes share
        elif isinstance(value, str | list):
            batch[key] = column
        elif key in ("label", "index", "is_image"):
            batch[key] = torch.tensor(column)
    return batch


@dataclass(frozen=True)
class Curriculum:
    """How many frames of a clip are used at which optimizer step.

    Args:
        frames_at: pure function from the optimizer step to the length of the window, in frames.
        margin_frames: frames to read on each side of the window, clipped at the clip's ends; None reads the whole clip.
        frame_multiple: the window starts at a multiple of this.
    """

    frames_at: Callable[[int], int]
    margin_frames: int | None
    frame_multiple: int

    def __post_init__(self) -> None:
        if self.frame_multiple < 1 or (self.margin_frames is not None and self.margin_frames < 0):
            raise ValueError(
                f"A curriculum needs frame_multiple >= 1 and margin_frames >= 0 or None, "
                f"got {self.frame_multiple} and {self.margin_frames}."
            )

    def window(self, seed: int, step: int, num_frames: int) -> dict[str, int]:
        """Return the window of optimizer step `step` in a clip of `num_frames`, as the fields of a `ClipRequest`.

        Raises:
            ValueError: if `frames_at(step)` is not in `[1, num_frames]`.
        """
        frames = self.frames_at(step)
        if not 1 <= frames <= num_frames:
            raise ValueError(
                f"The curriculum asks for {frames} frames at step {step}, "
                f"but a clip has {num_frames} (--data.num_frames)."
            )
        starts = (num_frames - frames) // self.frame_multiple + 1
        generator = keyed_generator(seed, _WINDOW_STREAM, step)
        start = int(torch.randint(starts, (), generator=generator)) * self.frame_multiple
        margin = num_frames if self.margin_frames is None else self.margin_frames
        read_start, read_end = max(0, start - margin), min(num_frames, start + frames + margin)
        return {
            "window_start": start,
            "window_frames": frames,
            "read_start": read_start,
            "read_frames": read_end - read_start,
        }


class ClipBatchSampler(Sampler[list[ClipRequest]]):
    """Training batches of one rank: shuffled per epoch, the last incomplete global batch left out.

    Args:
        dataset_size: number of samples to draw from.
        batch_size: clips per batch and process, B.
        num_frames: length of a clip, in frames.
        seed: key of the order and of the windows.
        rank: this process.
        world_size: number of processes, W.
        accumulate_grad_batches: batches per optimizer step.
        limit_batches: how much of an epoch the trainer uses, a number of batches or a share (its
            `limit_train_batches`). It does not shorten the sampler; it only enters the count of optimizer steps.
        reshuffle: whether each epoch has its own order and random choices; otherwise all repeat the first one.
        curriculum: lengths of the training windows, None for whole clips.

    Raises:
        ValueError: if the data set does not fill one global batch.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        num_frames: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate_grad_batches: int = 1,
        limit_batches: int | float = 1.0,
        reshuffle: bool = True,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulate_grad_batches = accumulate_grad_batches
        self.reshuffle = reshuffle
        self.curriculum = curriculum
        self.epoch = 0
        self.start_batch = 0  # set by the loader for each iteration
        self.order: Callable[[int], list[int]] = self._shuffled  # a data set with an order of its own replaces it
        if dataset_size < self.global_batch_size:
            raise ValueError(
                f"The training set has {dataset_size} clips, fewer than one global batch of {self.global_batch_size} = "
                f"{batch_size} clips x {world_size} processes. Lower --data.batch_size or use fewer devices."
            )
        used = int(len(self) * limit_batches) if isinstance(limit_batches, float) else min(len(self), limit_batches)
        # Lightning also steps on an epoch's last batch, with whatever has accumulated by then
        self.steps_per_epoch = -(-used // accumulate_grad_batches)

    @property
    def global_batch_size(self) -> int:
        """Clips per batch over all processes."""
        return self.batch_size * self.world_size

    @property
    def sampler(self) -> "ClipBatchSampler":
        """This object: Lightning calls `set_epoch` on `loader.batch_sampler.sampler`, not on the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation: takes effect when the next iteration starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.dataset_size // self.global_batch_size

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        epoch = self.epoch
        order_epoch = epoch if self.reshuffle else 0
        order = self.order(order_epoch)
        for batch in range(self.start_batch, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            window: dict[str, int] = {}
            if self.curriculum is not None:
                step = epoch * self.steps_per_epoch + batch // self.accumulate_grad_batches
                window = self.curriculum.window(self.seed, step, self.num_frames)
            yield [ClipRequest(index, order_epoch, **window) for index in order[first : first + self.batch_size]]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = keyed_generator(self.seed, _ORDER_STREAM, epoch)
        return torch.randperm(self.dataset_size, generator=generator).tolist()


class ValidationBatchSampler(Sampler[list[ClipRequest]]):
    """Validation batches of one rank: in order, whole clips, the same number of batches on every rank.

    Where the last global batch does not divide by the ranks, it is filled up with clips from the beginning, fewer than
    one per rank. A metric over the gathered batches counts each `index` once.

    Args:
        dataset_size: number of samples.
        batch_size: clips per batch and process.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, dataset_size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.dataset_size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        global_batch = self.batch_size * self.world_size
        for start in range(0, self.dataset_size, global_batch):
            size = -(-min(global_batch, self.dataset_size - start) // self.world_size)
            first = start + self.rank * size
            yield [ClipRequest(index % self.dataset_size) for index in range(first, first + size)]


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` over a `ClipBatchSampler` that goes on where a checkpoint left off, in the middle of an epoch too.

    Lightning keeps the state of such a loader in its checkpoints. The state is the epoch and the number of batches
    handed out (not of those that workers have prefetched), which is the same on every rank.

    Args:
        dataset: map-style data set, indexed by `ClipRequest`.
        batch_sampler: the order.
        **options: all else that a `DataLoader` takes.
    """

    batch_sampler: ClipBatchSampler

    def __init__(self, dataset: Dataset[dict[str, Any]], batch_sampler: ClipBatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self._position = (0, 0)  # epoch, batches handed out
        self._resume_from = (0, 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override] # a generator is all that anyone needs
        # A generator's body runs at its first `next`: by then Lightning has called `set_epoch`. The place to resume
        # from is taken and cleared at once, since nobody promises to run the generator to its end.
        epoch = self.batch_sampler.epoch
        resume_epoch, resume_batch = self._resume_from
        self._resume_from = (0, 0)
        start = resume_batch if epoch == resume_epoch else 0
        self.batch_sampler.start_batch = start
        for handed_out, batch in enumerate(super().__iter__(), start=start + 1):
            self._position = (epoch, handed_out)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, with what it is a position in."""
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, **self._fingerprint()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that the saved loader had handed out.

        Raises:
            ValueError: if the data set's size, the seed or the global batch size differ from the saved ones: the order
                would be another one, and clips would silently be repeated and left out.
        """
        names = {
            "dataset_size": "clips in the training set",
            "seed": "seed of the data order (--data.seed)",
            "global_batch_size": "clips per global batch (--data.batch_size x processes)",
        }
        current = self._fingerprint()
        different = [
            f"{name}: {state[key]} in the checkpoint, {current[key]} now"
            for key, name in names.items()
            if state[key] != current[key]
        ]
        if different:
            raise ValueError(
                f"The training data cannot be resumed, since its order would differ. {'; '.join(different)}. "
                "Restore the checkpoint's values, or start a new run from its weights."
            )
        self._position = self._resume_from = (state["epoch"], state["batch"])
        self.batch_sampler.set_epoch(state["epoch"])

    def _fingerprint(self) -> dict[str, int]:
        sampler = self.batch_sampler
        return {
            "dataset_size": sampler.dataset_size,
            "seed": sampler.seed,
            "global_batch_size": sampler.global_batch_size,
        }
