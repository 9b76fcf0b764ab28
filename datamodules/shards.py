"""Caches: what was computed once for each sample of a data set, in shards that are written whole and read by number.

A cache is a folder:

    cache.json               what made it: written first, so that the same command goes on with it and no other does
    train/chunk-0-<k>.bin    shard k: items [k S, (k + 1) S), in litdata's chunk format
    train/config.json        litdata's description of the items, of whichever shard was last
    train/index.json         litdata's index of all shards; it appears when the split is complete
    val/...                  likewise

litdata writes the bytes, and its `StreamingDataset` reads a split, also from object storage. The plan is ours: its own
`optimize` numbers chunks by worker, so that the order of the items depends on how many there were. Here shard k holds
the same items whoever writes it, so that any number of processes can go on with what others have begun. Reading is ours
too: litdata's reader is made for streams, with a thread that fetches and windows that it decodes at once. `ShardReader`
maps the files into memory and takes one item out: a cache may be larger than memory, and any order is as good as any.
"""

import json
import mmap
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

FORMAT_VERSION = 1
SPLITS = ("train", "val")


# The header


def begin(folder: Path, header: dict[str, Any]) -> None:
    """Start a cache, or go on with one that the same command has left unfinished.

    Raises:
        FileExistsError: if the folder holds a complete cache, or something else.
        ValueError: if the unfinished cache was begun with other settings.
    """
    header = json.loads(json.dumps(header))  # as it will be read back: tuples become lists
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cache.json", header)
        return
    file = folder / "cache.json"
    if not file.is_file() or not _unfinished(folder):
        raise FileExistsError(f"{folder} exists already. Remove it, or choose another destination (--out).")
    begun = json.loads(file.read_text())
    differing = [
        f"  {name}: {begun.get(name)} there, {header.get(name)} now"
        for name in sorted(begun.keys() | header.keys())
        if begun.get(name) != header.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds an unfinished cache that was begun with other settings:\n" + "\n".join(differing) + "\n"
            "Give those, or remove it, or choose another destination (--out)."
        )


def read_header(folder: Path, kind: str, command: str) -> dict[str, Any]:
    """Return the header of a complete cache.

    Args:
        folder: the cache.
        kind: what it must hold: `tokens` or `frames`.
        command: what makes such a cache, for errors.

    Raises:
        FileNotFoundError: if there is no cache, or it is not complete.
        ValueError: if it holds something else.
    """
    file = folder / "cache.json"
    if not file.is_file():
        raise FileNotFoundError(f"No {kind} at {file} (--data.root). Make them: {command} --out {folder}")
    header: dict[str, Any] = json.loads(file.read_text())
    if header.get("format_version") != FORMAT_VERSION or header.get("kind") != kind:
        raise ValueError(
            f"{folder} (--data.root) holds {header.get('kind')} in format {header.get('format_version')}, but "
            f"{kind} in format {FORMAT_VERSION} are needed. Make them: {command} --out FOLDER"
        )
    if unfinished := _unfinished(folder):
        raise FileNotFoundError(
            f"{folder} (--data.root) is not complete: {' and '.join(unfinished)}. The command that began it goes on "
            f"where it stopped: {command} --out {folder}"
        )
    return header


def _unfinished(folder: Path) -> list[str]:
    return [split for split in SPLITS if not (folder / split / "index.json").is_file()]


def write_json(file: Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    scratch = file.with_name(f".{file.name}.part")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, file)


# Writing


@dataclass(frozen=True)
class ShardPlan:
    """Which items of a split are in which shard: nothing but a division, so that all processes agree.

    Args:
        folder: of the split.
        num_items: all items.
        shard_items: items of a shard; the last one may hold fewer.
    """

    folder: Path
    num_items: int
    shard_items: int

    def items(self, shard: int) -> range:
        """Return the numbers of a shard's items."""
        first = shard * self.shard_items
        return range(first, min(first + self.shard_items, self.num_items))

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the shards that this process has to write: a share of all, without those that are there."""
        shards = range(rank, self.num_shards, world_size)
        return [shard for shard in shards if not self._file(shard).is_file()]

    def write(self, shard: int, items: Sequence[dict[str, Any]]) -> None:
        """Write a shard; it appears whole or not at all.

        Args:
            shard: its number.
            items: dictionaries with the same keys, of integers, bytes and numpy arrays.

        Raises:
            ValueError: if they are not as many as the plan says, or more than a shard can hold.
        """
        from litdata.streaming.writer import BinaryWriter  # a second to import, and readers do not need it

        if len(items) != len(self.items(shard)):
            raise ValueError(f"Shard {shard} of {self.folder} holds {len(self.items(shard))} items, got {len(items)}.")
        size = sum(np.asarray(value).nbytes for item in items for value in item.values())
        if size >= 2**31:
            raise ValueError(
                f"Shard {shard} of {self.folder} would have {size / 2**30:.1f} GiB, more than the format's 2 GiB. "
                f"Put fewer than {self.shard_items} items into one (--shard_items)."
            )
        scratch = self.folder / f".shard-{shard}"
        shutil.rmtree(scratch, ignore_errors=True)
        writer = BinaryWriter(str(scratch), chunk_size=self.shard_items)
        for number, item in enumerate(items):
            writer[number] = item
        writer.done()
        (index,), (chunk,) = scratch.glob("*.index.json"), scratch.glob("*.bin")
        os.replace(index, self.folder / "config.json")  # the same for all shards
        os.replace(chunk, self._file(shard))  # last: from now on the shard is there
        shutil.rmtree(scratch)

    def index(self) -> dict[str, Any]:
        """Return litdata's index of all shards.

        Raises:
            RuntimeError: if some are missing.
        """
        if missing := self.missing():
            raise RuntimeError(f"{len(missing)} shards of {self.folder} are missing, the first is {missing[0]}.")
        files = [self._file(shard) for shard in range(self.num_shards)]
        chunks = [
            {
                "filename": file.name,
                "chunk_bytes": file.stat().st_size,
                "chunk_size": len(self.items(shard)),
                "dim": None,
            }
            for shard, file in enumerate(files)
        ]
        return {"chunks": chunks, "config": json.loads((self.folder / "config.json").read_text())["config"]}

    def close(self) -> None:
        """Write the index, which makes the split complete. Call it once all processes have written their share."""
        index = self.index()
        for left in self.folder.glob(".shard-*"):  # of processes that were killed
            shutil.rmtree(left)
        write_json(self.folder / "index.json", index)

    @property
    def num_shards(self) -> int:
        """All shards of the split."""
        return -(-self.num_items // self.shard_items)

    def _file(self, shard: int) -> Path:
        return self.folder / f"chunk-0-{shard}.bin"


class CountSpeed(ProgressColumn):
    """How many are done in a second."""

    def render(self, task: Task) -> Text:
        """Return the speed of late."""
        return Text("" if task.speed is None else f"{task.speed:.1f} clips/s")


def progress_bar() -> Progress:
    """A bar with the number of clips, their speed and the time left; silent where nobody looks at a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), CountSpeed(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


# Reading


class ShardReader:
    """Items of a split by their number, out of memory-mapped files.

    Files are opened at the first look into them, in each process for itself; the reader is small to pickle.

    Args:
        folder: of the split.
        index: of a split that is not closed yet; by default the one in the folder.
    """

    def __init__(self, folder: Path, index: dict[str, Any] | None = None) -> None:
        index = index or json.loads((folder / "index.json").read_text())
        self.folder = folder
        self.files = [chunk["filename"] for chunk in index["chunks"]]
        self.ends = list(accumulate(chunk["chunk_size"] for chunk in index["chunks"]))
        # litdata's description of an item: a dictionary's keys in their order, and how each value was written
        self.names: list[str] = json.loads(json.loads(index["config"]["data_spec"])[1]["context"])
        self.formats: list[str] = [name.split(":")[0] for name in index["config"]["data_format"]]
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    def __len__(self) -> int:
        return self.ends[-1]

    def leaves(self, number: int) -> dict[str, np.ndarray]:
        """Return the bytes of each value of an item, uint8, as they lie in the file: nothing is read yet."""
        shard = bisect_right(self.ends, number)
        if not 0 <= number < len(self):
            raise IndexError(f"{self.folder} has {len(self)} items, there is no number {number}.")
        content, offsets = self._shard(shard)
        row = number - (self.ends[shard - 1] if shard else 0)
        item = content[offsets[row] : offsets[row + 1]]
        header = 4 * len(self.names)
        ends = header + np.cumsum(item[:header].view("<u4"), dtype=np.int64)
        return {name: item[start:end] for name, start, end in zip(self.names, (header, *ends[:-1]), ends, strict=True)}

    def integer(self, leaf: np.ndarray) -> int:
        """Return the value of an integer."""
        return int(leaf.view("<i8")[0])

    def array(self, leaf: np.ndarray, dtype: str) -> np.ndarray:
        """Return an array of two or more axes, as a view of the file."""
        num_axes = int(leaf[4:8].view("<u4")[0])
        start = 8 + 4 * num_axes
        return leaf[start:].view(dtype).reshape(leaf[8:start].view("<u4"))

    def check(self, number: int, checksum: int, expected: int) -> None:
        """Compare the checksum of what was read of an item with what was written.

        Raises:
            ValueError: if it is another one.
        """
        if checksum != expected:
            file = self.folder / self.files[bisect_right(self.ends, number)]
            raise ValueError(
                f"{file} is damaged: the checksum of item {number} does not match. Remove it and index.json beside "
                "it, and run the command that made the cache again: it makes what is missing."
            )

    def _shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._shards:
            with (self.folder / self.files[shard]).open("rb") as file:
                content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            num_items = int(content[:4].view("<u4")[0])
            # a copy: otherwise each look at the table would touch the file
            self._shards[shard] = content, content[4 : 4 * (num_items + 2)].view("<u4").astype(np.int64)
        return self._shards[shard]
