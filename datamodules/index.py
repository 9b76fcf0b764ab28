"""What is known of the files of a data set, kept beside them: each file is examined once, until it changes.

There are two levels. `quick` opens a file and reads its header: hundreds of files a second, enough for an overview.
`full` reads all of it: counts packets, finds key frames, decodes the first and the last frame, sees whether the end is
missing, and hashes the content. Training takes `full`, since headers lie. Of a TFRecord file, `quick` walks from record
to record, and `full` also compares them with their checksums.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest, sha256
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.decoders import IMAGE_SUFFIXES, frame_files, iter_images
from datamodules.decoding import (
    Header,
    TruncatedVideoError,
    UnreadableVideoError,
    VideoInfo,
    bytes_are_missing,
    probe,
    read_header,
    require_regular_file,
)
from datamodules.reader import own_reader
from datamodules.tfrecord import find_records

Level = Literal["quick", "full"]

_VERSION = 2
_SAVE_EVERY = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What is known of a file, or of a folder of frames.

    A TFRecord file may have sound records and, because of others, an error.

    Args:
        file: size in bytes (number of frames for a folder) and time of the last change in ns; () if it is not there.
        level: how closely it was looked at.
        header: what it declares; None if it cannot be opened, and for folders.
        info: what reading needs; None at level `quick`, and if it cannot be read.
        digest: hash of the content, at level `full`; for a folder, of its first and last frame and their number.
        error: why it cannot be read; empty if it can.
        is_truncated: whether that is because its end is missing.
        records: of a TFRecord file, number, offset and length of each sound record.
    """

    file: tuple[int, ...]
    level: Level
    header: Header | None = None
    info: VideoInfo | None = None
    digest: str = ""
    error: str = ""
    is_truncated: bool = False
    records: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_videos(self) -> int:
        """How many videos it holds: the sound records of a TFRecord file, otherwise one."""
        return len(self.records) or 1


def examine(path: Path, level: Level) -> dict[str, Any]:
    """Look at a file, or at a folder of frames: the fields of its `Entry`, as plain types."""
    found: dict[str, Any] = {}
    try:
        if path.is_dir():
            found |= _examine_images(path)
        else:
            if path.suffix == ".tfrecords":
                found |= _examine_records(path, level)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                found |= _examine_image(path, level)
            else:
                found["header"] = asdict(read_header(path))
                if level == "full":
                    found["info"] = asdict(probe(path))
            if level == "full":
                with open(path, "rb") as file:
                    found["digest"] = file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        found["error"] = str(error)
        found["is_truncated"] = isinstance(error, TruncatedVideoError) or (path.is_file() and bytes_are_missing(path))
    return found


def _examine_records(path: Path, level: Level) -> dict[str, Any]:
    records, errors = find_records(path, verify=level == "full")
    return {
        "records": [(record.number, record.offset, record.length) for record in records],
        "error": "; ".join(map(str, errors)),
        "is_truncated": any(isinstance(error, TruncatedVideoError) for error in errors),
    }


def _examine_image(path: Path, level: Level) -> dict[str, Any]:
    require_regular_file(path)
    try:
        with Image.open(path) as image:
            if level == "full":
                image.load()
            width, height = image.size
    # Pillow raises SyntaxError for a broken PNG, and an error of its own for absurd sizes
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableVideoError(f"{path}: {error}") from error
    return {"info": asdict(VideoInfo(1, width, height, 0, container="images", codec=path.suffix.lower()[1:]))}


def _examine_images(folder: Path) -> dict[str, Any]:
    files = frame_files(folder)
    if not files:
        raise UnreadableVideoError(f"{folder}: holds no images.")
    hashed = blake2b(str(len(files)).encode(), digest_size=16)
    for number in {0: None, len(files) - 1: None}:
        (frame,) = iter_images(folder, number, 1)
        hashed.update(files[number].read_bytes())
    height, width = frame.shape[:2]
    info = VideoInfo(len(files), width, height, 0, container="images", codec=files[0].suffix.lower()[1:])
    return {"info": asdict(info), "digest": hashed.hexdigest()}


def index_entries(
    paths: Sequence[Path],
    root: Path,
    cache_dir: Path | None = None,
    level: Level = "full",
    read_timeout: float | None = None,
    show_progress: bool = False,
    again: bool = False,
) -> dict[Path, Entry]:
    """Examine files and folders of frames, each one once; what is found is kept, and used until the file changes.

    It is appended to `index.jsonl` in `<root>/.longtake` (see `LinesFile`) as it comes, so that nothing is lost when
    the process is stopped in between.

    Args:
        paths: the files, below `root`.
        root: folder of the data set.
        cache_dir: where to keep the index instead.
        level: how closely to look; what was found at level `full` also serves for `quick`.
        read_timeout: seconds after which a file is given up; None waits for ever.
        show_progress: whether to draw a bar, if there is a terminal.
        again: whether to look once more at those that could not be read: a dead disk may have come back.

    Returns:
        What is known of each file.
    """
    file = LinesFile("index", root, cache_dir)
    known = _load(file)
    stamps = {path: file_stamp(path) for path in paths}
    names = {path: os.path.relpath(path, root) for path in paths}
    levels = ("full",) if level == "full" else ("quick", "full")

    def is_known(path: Path) -> bool:
        entry = known.get(names[path])
        if entry is None or entry.file != stamps[path] or (again and entry.error):
            return False
        return entry.level in levels

    changed = [path for path in paths if stamps[path] and not is_known(path)]
    fresh: dict[str, Entry] = {}
    unsaved: list[dict[str, Any]] = []
    if changed:
        _log.info("Indexing %d of %d files below %s (%s).", len(changed), len(paths), root, level)
    try:
        for path, found in _examined(changed, level, read_timeout, show_progress):
            line = {"path": names[path], "file": stamps[path], "level": level, **found}
            fresh[names[path]] = _entry(line)
            unsaved.append(line)
            if len(unsaved) >= _SAVE_EVERY:
                file.append(unsaved)
                unsaved = []
    finally:
        file.append(unsaved)
    entries = known | fresh
    return {
        path: entries[name] if stamps[path] else Entry((), level, error=f"{path}: is not there.")
        for path, name in names.items()
    }


def index_videos(
    paths: Sequence[Path],
    root: Path,
    cache_dir: Path | None = None,
    read_timeout: float | None = None,
    show_progress: bool = False,
) -> dict[Path, VideoInfo | str]:
    """Return what training needs to know of each file: a `VideoInfo`, or the reason why it cannot be read.

    The arguments are those of `index_entries`, whose level `full` this is.
    """
    entries = index_entries(paths, root, cache_dir, "full", read_timeout, show_progress)
    return {path: entry.info or entry.error for path, entry in entries.items()}


def _examined(
    paths: Sequence[Path], level: Level, read_timeout: float | None, show_progress: bool
) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Yield what is found, as it comes: a slow file holds up no others."""

    def look(path: Path) -> dict[str, Any]:
        if read_timeout is None:
            return examine(path, level)
        try:
            (found,) = own_reader().call(path, read_timeout, "examine", level)
        except UnreadableVideoError as error:
            return {"error": str(error)}
        return found

    console = Console(stderr=True)
    columns = (TextColumn(f"Indexing ({level})"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show_progress and paths and console.is_terminal)) as progress:
        task = progress.add_task("", total=len(paths))
        pool = ThreadPoolExecutor(thread_name_prefix="index")
        try:
            futures = {pool.submit(look, path): path for path in paths}
            for future in as_completed(futures):
                progress.advance(task)
                yield futures.pop(future), future.result()
        finally:  # when stopped in between, the rest is not waited for
            pool.shutdown(cancel_futures=True)


def file_stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file or a folder of frames changes; () if it is not there."""
    try:
        status = path.stat()
        return (len(frame_files(path)) if path.is_dir() else status.st_size, status.st_mtime_ns)
    except OSError:
        return ()


def _entry(line: Mapping[str, Any]) -> Entry:
    fields = {key: value for key, value in line.items() if key != "path"}
    if header := fields.get("header"):
        fields["header"] = Header(**header)
    if info := fields.get("info"):
        fields["info"] = VideoInfo(**{**info, "key_frames": tuple(info["key_frames"])})
    records = tuple(map(tuple, fields.get("records", ())))
    return Entry(**{**fields, "file": tuple(fields["file"]), "records": records})


def _load(file: "LinesFile") -> dict[str, Entry]:
    """Return the entries; where lines have been superseded by later ones, the file is written anew without them."""
    lines = file.load()
    latest = {line["path"]: line for line in lines}
    if len(lines) > 2 * len(latest):
        file.replace(list(latest.values()))
    return {name: _entry(line) for name, line in latest.items()}


class LinesFile:
    """JSON objects, one a line, that any number of processes append to: in the data set's folder, or elsewhere.

    The file is `<name>.jsonl` in `<root>/.longtake`, or one named after the root in `cache_dir`. If it cannot be
    written, `~/.cache/longtake` takes its place. A line that another version wrote, or that was cut off when a process
    was killed, is left out.

    Args:
        name: what it holds.
        root: folder of the data set.
        cache_dir: folder to keep it in instead.
    """

    def __init__(self, name: str, root: Path, cache_dir: Path | None = None) -> None:
        own_name = f"{name}-{sha256(str(root.resolve()).encode()).hexdigest()[:16]}.jsonl"
        self.place = root / ".longtake" / f"{name}.jsonl" if cache_dir is None else cache_dir / own_name
        self.fallback = Path.home() / ".cache" / "longtake" / own_name

    def load(self) -> list[dict[str, Any]]:
        """Return all lines, those of the file that is to be written last."""
        found = []
        for file in (self.fallback, self.place):
            try:
                text = file.read_text(errors="replace")
            except OSError:  # not there
                continue
            for line in text.splitlines():
                try:
                    content = json.loads(line)
                except ValueError:
                    continue
                if isinstance(content, dict) and content.pop("version", None) == _VERSION:
                    found.append(content)
        return found

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines, in one go: lines of different processes do not mix."""
        if lines:
            self._write(lambda file: _append(file, _text(lines)))

    def replace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the file anew: whole or not at all."""
        self._write(lambda file: _replace(file, _text(lines)))

    def size(self) -> int:
        """Return the number of bytes, which grows with each line."""
        return sum(file.stat().st_size for file in (self.fallback, self.place) if file.is_file())

    def _write(self, write: Callable[[Path], None]) -> None:
        try:
            write(self.place)
        except OSError as error:
            if self.place == self.fallback:
                raise
            _log.warning(
                "%s cannot be written (%s); %s takes its place. Choose a folder with --data.cache_dir.",
                self.place, error.strerror, self.fallback,
            )  # fmt: skip
            self.place = self.fallback
            write(self.fallback)


def _text(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps({"version": _VERSION, **line}) + "\n" for line in lines).encode()


def _append(file: Path, text: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+", buffering=0) as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":  # a line that was cut off would swallow the next one
                text = b"\n" + text
        out.write(text)


def _replace(file: Path, text: bytes) -> None:
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_bytes(text)
    os.replace(scratch, file)
