"""The folders of runs: which checkpoint to go on with, and whose turn it is."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from models.weights import check_whole, read_checkpoint


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The run's newest checkpoint that is whole; damaged ones are named, and left where they are.

    Raises:
        ValueError: If there are checkpoints, and all are damaged: whoever wants to begin again says so.
    """
    files = {path.resolve() for path in run_folder.glob("checkpoints/*.ckpt") if path.exists()}
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check_whole(path)
            read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"Left out: {error}")
        else:
            return path
    if files:
        raise ValueError(
            f"None of the {len(files)} checkpoints of {run_folder} is whole. They are left as they are; --resume never "
            "begins a new run."
        )
    return None


def newest_run(root: Path, name: str) -> Path | None:
    """The run of this name that wrote a checkpoint last, whole or not."""
    files = (root / name).glob("*/checkpoints/*.ckpt")
    newest = max((path for path in files if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.parent if newest else None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder: the system lets go of it when the process ends, however it ends.

    Raises:
        OSError: If it cannot be written to.
        ValueError: If another run is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise OSError(
            f"Nothing can be written to {folder} ({error.strerror}). Give another folder (--run_root), or make it "
            "writable. Nothing was changed."
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: two runs in one folder would "
                "spoil each other. Wait for it to end, or begin another run (--resume never)."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
