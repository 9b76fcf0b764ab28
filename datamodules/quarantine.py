"""The videos that failed while they were read: a list that all processes of all runs share."""

import logging
import os
from collections.abc import Container, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.index import LinesFile, file_stamp

_log = logging.getLogger(__name__)


class Places(Container[Path]):
    """A set of paths, kept as their hashes at 8 bytes each: data sets have millions, and each worker has a copy.

    Args:
        paths: which; relative ones are taken from the working directory.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._hashes = np.unique(np.fromiter(map(_hash, paths), np.uint64))

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, path: object) -> bool:
        assert isinstance(path, Path)
        hashed = _hash(path)
        place = int(np.searchsorted(self._hashes, hashed))
        return place < len(self._hashes) and bool(self._hashes[place] == hashed)


def _hash(path: Path) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(os.fsencode(path.absolute()), digest_size=8).digest(), "little"))


class Quarantine:
    """Videos that failed while they were read, with the reason; when their file changes they leave the list.

    Videos are known by the absolute paths of their files, records of a TFRecord file as `<file>/<number>`.

    Args:
        root: folder of the data set. The list is kept in `quarantine.jsonl` below it (see `LinesFile`), and its entries
            can be removed by hand; with None it is kept in memory, for this process alone.
        cache_dir: folder to keep it in instead.
    """

    def __init__(self, root: Path | None = None, cache_dir: Path | None = None) -> None:
        self.file = None if root is None else LinesFile("quarantine", root, cache_dir)
        self._reasons: dict[Path, str] = {}
        self._size = 0

    def reasons(self, paths: Container[Path]) -> Mapping[Path, str]:
        """Return those of these videos that are on the list, with their reasons, as all processes know them by now.

        Args:
            paths: absolute paths.
        """
        if self.file is not None and self.file.size() != self._size:
            self._size = self.file.size()
            for line in self.file.load():
                path = Path(line["path"])
                if path not in self._reasons and tuple(line["file"]) == _stamp(path):
                    self._reasons[path] = line["reason"]
        return {path: reason for path, reason in self._reasons.items() if path in paths}

    def add(self, path: Path, reason: str) -> None:
        """Put a video on the list."""
        if path in self:
            return
        self._reasons[path.absolute()] = reason
        line: dict[str, Any] = {"path": str(path.absolute()), "file": _stamp(path), "reason": reason}
        if self.file is not None:
            try:
                self.file.append([line])
            except OSError as error:  # a full disk: no reason to stop
                _log.warning("The quarantine list cannot be written: %s", error)

    def __contains__(self, path: Path) -> bool:
        return path.absolute() in self._reasons

    def __str__(self) -> str:
        return "in memory" if self.file is None else str(self.file.place)


def _stamp(path: Path) -> tuple[int, ...]:
    return file_stamp(path.parent if path.parent.is_file() else path)
