"""What a frozen tokenizer makes of every clip of a data module, computed once, and the data module that reads it.

`shards.py` says how a cache lies on disk. An item holds one clip:

    codes      `[t, h, w]` in the smallest integer type that holds the codebook, unless the tokenizer has none
    latents    `[D, t, h, w]`, if they are kept: float32, or bfloat16 as the uint16 of the same bits (numpy knows no
               bfloat16); of a tokenizer with codes, what it rounds to them
    task/...   the codes of a task's condition (COMMIT's padded video), `[t, h, w]`, for each task that the header names
    label      class
    index      which sample of the data module it shows
    start      frame of the source video at which it begins
    source     name of the source video, UTF-8
    crc32      checksum of the arrays above, in their order

Items come copy by copy: item `c n + i` is sample i of n as epoch c shows it, with its own place, crop and flip. So from
a cache of c copies, the first c epochs are those that pixels would have given, and then they come again. The
curriculum's windows are cut from the codes of whole clips, so no margin is needed.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.sampler import ClipRequest, collate_clips
from datamodules.shards import FORMAT_VERSION, ShardPlan, ShardReader, begin, progress_bar, read_header, write_json
from datamodules.video import Split, VideoClips, VideoDataModule
from datamodules.windows import CoveringWindows, clip_origin, provenance

COMMAND = "longtake tokenize --config <experiment>"

# The type as it is written to the file, for each type that a header may name.
_STORED = {"uint8": "u1", "uint16": "<u2", "int32": "<i4", "int64": "<i8", "float32": "<f4", "bfloat16": "<u2"}


@dataclass(frozen=True)
class TokenOptions:
    """What a cache of tokens holds.

    Args:
        windows: `clip`: of each video one clip a copy, at a random place; `cover`: all windows of each video.
        window_stride: Frames of the video from one window of `cover` to the next; None for a clip's length.
        copies: Copies of the training clips, each with its own random place, crop and flip.
        shard_items: Clips of a shard: what is lost at most when the command is killed.
        latents: Keep latents in this type; besides codes, if the tokenizer has some.
        tasks: Tasks whose condition's codes are kept beside those of the clip, and the settings that each depends on.
    """

    windows: Literal["clip", "cover"] = "clip"
    window_stride: int | None = None
    copies: int = 1
    shard_items: int = 1024
    latents: Literal["bf16", "fp32"] | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def codes_type(codebook_size: int) -> str:
    """Return the smallest integer type that holds codes in `[0, codebook_size)`."""
    limits = {"uint8": 2**8, "uint16": 2**16, "int32": 2**31}
    return next((name for name, limit in limits.items() if codebook_size <= limit), "int64")


class _Clips(Dataset[dict[str, Any]]):
    """All clips that a split of the cache holds, by the number of their item."""

    def __init__(self, dataset: Dataset[dict[str, Any]], copies: int) -> None:
        self.dataset = dataset
        self.samples: int = len(dataset)  # type: ignore[arg-type] # torch's Dataset declares no length
        self.copies = copies

    def __len__(self) -> int:
        return self.copies * self.samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, index = divmod(number, self.samples)
        clip = self.dataset[ClipRequest(index, epoch)]
        # an unreadable video is replaced by another: where the clip comes from is asked of what is shown
        source, start = clip_origin(self.dataset, clip["index"], epoch)
        return clip | {"source": source.encode(), "start": start}


class TokenWriter:
    """Writes a cache of tokens: `begin` in one process, `write` in each, `close` in one when all have written.

    Args:
        folder: Where to.
        data: Gives the clips; set up for fit.
        about: What makes the tokens: `tokenizer_digest`, `codebook_size`, `downsample`.
        options: What to keep.

    Raises:
        ValueError: If the options do not fit each other or the data.
    """

    def __init__(
        self, folder: Path, data: VideoDataModule, about: Mapping[str, Any], options: TokenOptions = TokenOptions()
    ) -> None:
        if options.copies < 1 or options.shard_items < 1:
            raise ValueError(f"copies={options.copies}, shard_items={options.shard_items}: at least 1 of each.")
        datasets = dict(data.datasets)
        if options.windows == "cover":
            for split, dataset in datasets.items():
                if not isinstance(dataset, VideoClips):
                    raise ValueError(f"{type(dataset).__name__} has no videos to cover: give --windows=clip.")
                datasets[split] = CoveringWindows(dataset, options.window_stride, f"Windows of {split}")
        elif options.window_stride is not None:
            raise ValueError("--window_stride is the distance of the windows of --windows=cover; give both or neither.")
        train = datasets["train"]
        fixed = isinstance(train, VideoClips) and not (train.random_crop or train.horizontal_flip)
        if options.copies > 1 and options.windows == "cover" and fixed:
            raise ValueError(
                f"copies={options.copies}: all copies of a window would be equal without --data.random_crop or "
                "--data.horizontal_flip. Leave it at 1 (--copies)."
            )
        self.data = data
        size = about["codebook_size"]  # None for continuous latents
        self.fields: dict[str, str] = {} if size is None else {"codes": codes_type(size)}
        if options.latents is not None:
            self.fields["latents"] = {"bf16": "bfloat16", "fp32": "float32"}[options.latents]
        self.fields |= {f"task/{task}": codes_type(size) for task in options.tasks}
        copies = {"train": options.copies, "val": 1}
        self.clips = {split: _Clips(dataset, copies[split]) for split, dataset in datasets.items()}
        self.folder = folder
        self.header = {
            "format_version": FORMAT_VERSION,
            "kind": "tokens",
            **about,
            **provenance(data, datasets),
            "fields": self.fields,
            "tasks": options.tasks,
            "windows": {"policy": options.windows, "stride": options.window_stride},
            "copies": copies,
            "samples": {split: clips.samples for split, clips in self.clips.items()},
            "shard_items": options.shard_items,
        }
        self.plans = {
            split: ShardPlan(folder / split, len(clips), options.shard_items) for split, clips in self.clips.items()
        }

    def begin(self) -> None:
        """Write the header, or compare it with that of the cache to go on with."""
        begin(self.folder, self.header)

    def write(self, encode: Callable[[Tensor], Mapping[str, Tensor]], rank: int = 0, world_size: int = 1) -> None:
        """Write this process's share of the shards, those left out that are there already.

        Args:
            encode: Video `[B, 3, T, H, W]` to the grids to keep, by the names of the header's fields: codes
                `[B, t, h, w]` or latents `[B, D, t, h, w]`.
            rank: This process.
            world_size: Number of processes.
        """
        for split, plan in self.plans.items():
            shards = plan.missing(rank, world_size)
            if found := len(range(rank, plan.num_shards, world_size)) - len(shards):
                rank_zero_info(f"{plan.folder}: going on, {found} shards are there.")
            size = self.data.val_batch_size
            batches = [
                list(numbers[first : first + size])
                for numbers in map(plan.items, shards)
                for first in range(0, len(numbers), size)
            ]
            options = self.data._loader_options() | {"collate_fn": _collate}
            loader = DataLoader(self.clips[split], batch_sampler=batches, **options)
            items: list[dict[str, Any]] = []
            unwritten = iter(shards)
            shard = next(unwritten, 0)
            with progress_bar() as progress:
                task = progress.add_task(f"Tokenizing {split}", total=sum(map(len, batches)))
                for batch in loader:
                    items += self._items(batch, encode(batch["video"]))
                    progress.advance(task, len(batch["source"]))
                    if len(items) == len(plan.items(shard)):
                        plan.write(shard, items)
                        items, shard = [], next(unwritten, 0)

    def close(self) -> None:
        """Complete the cache: indices, and the statistics of latents.

        Raises:
            RuntimeError: If shards are missing.
        """
        if "latents" in self.fields:  # before the indices, which make the cache complete
            train = self.plans["train"]
            statistics = _channel_statistics(ShardReader(train.folder, train.index()), self.fields["latents"])
            write_json(self.folder / "statistics.json", statistics)
        for plan in self.plans.values():
            plan.close()

    def _items(self, batch: dict[str, Any], grids: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        if grids.keys() != self.fields.keys():
            raise ValueError(f"{self.folder} holds {sorted(self.fields)}, but got {sorted(grids)} to write.")
        arrays = {name: _stored(grids[name], dtype) for name, dtype in self.fields.items()}
        return [
            {name: array[row] for name, array in arrays.items()}
            | {
                "label": int(batch["label"][row]),
                "index": int(batch["index"][row]),
                "start": batch["start"][row],
                "source": batch["source"][row],
                "crc32": _checksum(array[row] for array in arrays.values()),
            }
            for row in range(len(batch["source"]))
        ]


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return collate_clips(items) | {name: [item[name] for item in items] for name in ("source", "start")}


def _stored(grid: Tensor, dtype: str) -> np.ndarray:
    grid = grid.detach().cpu()
    if dtype == "bfloat16":
        return grid.to(torch.bfloat16).view(torch.uint16).numpy()
    return grid.numpy().astype(_STORED[dtype])


def _loaded(array: np.ndarray, dtype: str) -> Tensor:
    """Copy what lies in the file to codes int64 or latents float32."""
    if dtype == "bfloat16":
        return torch.from_numpy(array.copy()).view(torch.bfloat16).float()
    return torch.from_numpy(array.astype("<f4" if dtype == "float32" else "<i8"))


def _checksum(arrays: Iterable[np.ndarray]) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _channel_statistics(reader: ShardReader, dtype: str) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel over all latents, item by item in float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for number in range(len(reader)):
        latents = _loaded(reader.array(reader.leaves(number)["latents"], _STORED[dtype]), dtype)
        latents = latents.double().flatten(1)  # [D, t h w]
        count += latents.shape[1]
        total = total + latents.sum(dim=1)
        squares = squares + latents.square().sum(dim=1)
    mean = total / count
    return {"mean": mean.tolist(), "std": (squares / count - mean.square()).clamp(min=0).sqrt().tolist()}


class CachedTokens(Dataset[dict[str, Any]]):
    """The clips of one split of a cache; they stay on disk.

    Args:
        root: Folder of the cache.
        split: Which of its splits.
        header: Of the cache.
        grids: Which of its fields come with each clip.
    """

    def __init__(self, root: Path, split: Split, header: dict[str, Any], grids: Iterable[str]) -> None:
        self.reader = ShardReader(root / split)
        self.samples: int = header["samples"][split]
        self.copies: int = header["copies"][split]
        self.frames_per_latent: int = header["downsample"][0]
        self.fields: dict[str, str] = header["fields"]
        self.grids = list(grids)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        """Return `codes` `[t', h, w]`, `latents` `[D, t', h, w]` and `task/...`, of the clip or of its window.

        Raises:
            ValueError: If the file is damaged.
        """
        number = request.epoch % self.copies * self.samples + request.index
        leaves = self.reader.leaves(number)
        arrays = {name: self.reader.array(leaves[name], _STORED[dtype]) for name, dtype in self.fields.items()}
        self.reader.check(number, _checksum(arrays.values()), self.reader.integer(leaves["crc32"]))
        item: dict[str, Any] = {name: self.reader.integer(leaves[name]) for name in ("label", "index")}
        window = slice(None)
        if request.window_frames is not None:
            start = request.window_start // self.frames_per_latent
            # rounded up: where the first latent frame is a frame of its own, 1 + 4 k frames have 1 + k of them
            window = slice(start, start - (-request.window_frames // self.frames_per_latent))
            item |= {
                "window_start": request.window_start,
                "window_frames": request.window_frames,
                "margin_before": 0,
            }
        for name in self.grids:
            item[name] = _loaded(arrays[name][..., window, :, :], self.fields[name])
        return item


def read_codes(folder: Path, split: Split) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all codes of a split into memory: for numbers over small caches.

    Returns:
        `codes` int64 `[n, t, h, w]` and those of all conditions, `task/<name>`, with `label` and `index` `[n]`, and the
        cache's header.

    Raises:
        FileNotFoundError: If there is no complete cache.
        ValueError: If it does not hold codes.
    """
    header = read_header(folder, "tokens", COMMAND)
    if "codes" not in header["fields"]:
        raise ValueError(f"{folder} holds latents alone, and codes are needed. Make them: {COMMAND} --out FOLDER")
    grids = [name for name in header["fields"] if name != "latents"]
    clips = CachedTokens(folder, split, header, grids)
    copies = header["copies"][split]
    return collate_clips([clips[ClipRequest(i, epoch)] for epoch in range(copies) for i in range(len(clips))]), header


class TokenDataModule(VideoDataModule):
    """Cached codes or latents instead of pixels: `longtake tokenize` makes them, any prior trains from them.

    Batches hold, instead of `video`, what the model needs (by default, all that the cache has): `codes` int64
    `[B, t, h, w]`, or `latents` float32 `[B, D, t, h, w]`, and for each of its tasks the condition's codes,
    `task/<name>` int64 `[B, t, h, w]`.

    Args:
        root: Folder of the cache.
        num_frames: Pixel frames of a clip; must be what was tokenized.
        resolution: Height and width of the video; must be what was tokenized.
        batch_size: Training clips per batch and process.
        val_batch_size: Validation clips per batch and process, `batch_size` by default.
        num_workers: Worker processes; a clip takes microseconds to read, so 0 is best for codes.
        seed: Key of the data order.

    Raises:
        ValueError: If the cache was made for other clips, with another tokenizer or without what is needed.
    """

    def __init__(
        self,
        root: str,
        num_frames: int = 16,
        resolution: int = 128,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_frames=num_frames,
            resolution=resolution,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(logger=False)
        self.root = Path(root)
        self.tokenizer_digest: str | None = None
        self.grid: Literal["codes", "latents"] | None = None
        self.tasks: Mapping[str, Mapping[str, Any]] | None = None

    def require(
        self, tokenizer_digest: str, grid: Literal["codes", "latents"], tasks: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Say what the model needs: a cache that lacks it is refused.

        Args:
            tokenizer_digest: Of the tokenizer that the model decodes with.
            grid: What it is trained on.
            tasks: Tasks whose conditions' codes it needs, and the settings that each depends on.
        """
        self.tokenizer_digest = tokenizer_digest
        self.grid = grid
        self.tasks = tasks

    def make_dataset(self, split: Split) -> CachedTokens:
        """Open a split of the cache."""
        header = read_header(self.root, "tokens", COMMAND)
        for name, value in (("num_frames", self.num_frames), ("resolution", self.resolution)):
            if header[name] != value:
                raise ValueError(f"{self.root} holds tokens for {name}={header[name]}, not {value} (--data.{name}).")
        if self.tokenizer_digest not in (None, header["tokenizer_digest"]):
            raise ValueError(
                f"{self.root} was made by tokenizer {header['tokenizer_digest'][:12]}, the model uses "
                f"{str(self.tokenizer_digest)[:12]}. Tokenize again, or give that tokenizer (--model.tokenizer)."
            )
        grids = [name for name in ("codes", "latents") if name in header["fields"] and self.grid in (None, name)]
        if not grids:
            latents = " --latents=bf16" if self.grid == "latents" else ""
            raise ValueError(
                f"{self.root} holds no {self.grid}, which the model is trained on. Tokenize again: {COMMAND}{latents}"
            )
        found = header["tasks"]
        tasks = found if self.tasks is None else self.tasks
        if missing := [task for task in tasks if task not in found]:
            raise ValueError(
                f"{self.root} has no condition codes of {', '.join(missing)}, which the model trains (--model.tasks); "
                f"its tasks: {', '.join(found) or 'none'}. Tokenize again with this experiment, which keeps those of "
                "all its tasks (--tasks=null), or train from pixels."
            )
        if differing := [
            f"{task}: {found[task]}, not {dict(tasks[task])}" for task in tasks if found[task] != tasks[task]
        ]:
            raise ValueError(
                f"{self.root} holds conditions that were made with other settings than the model's: "
                f"{'; '.join(differing)}. Tokenize again, or give those (--model.past_frames)."
            )
        return CachedTokens(self.root, split, header, [*grids, *(f"task/{task}" for task in tasks)])

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation `[D]` of each channel of the training latents, float32.

        Only of a cache that holds latents.
        """
        statistics = json.loads((self.root / "statistics.json").read_text())
        return torch.tensor(statistics["mean"]), torch.tensor(statistics["std"])
