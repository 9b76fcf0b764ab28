"""One reading process serves the whole file: starting it is what takes time."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numbered_video import read_numbers

from datamodules.decoding import UnreadableVideoError
from datamodules.index import index_entries
from datamodules.reader import ReaderProcess, own_reader


@pytest.fixture(scope="module")
def reader() -> Iterator[ReaderProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReaderProcess, "script", Path(__file__).with_name("stub_reader.py"))
        patch.setattr("datamodules.reader._readers", threading.local())  # an earlier test's may be the real one
        yield ReaderProcess()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, small_avi: bytes) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name in ("good", "slow", "deadly"):
        (folder / f"{name}.avi").write_bytes(small_avi)
    (folder / "broken.avi").write_bytes(b"no video")
    return {path.stem: path for path in folder.iterdir()}


def frames(reader: ReaderProcess, path: Path, timeout: float = 60.0) -> list[int]:
    return read_numbers(np.stack(list(reader.call(path, timeout, "pyav", 3, 4, 2, (0,)))))


def test_a_child_gives_the_frames_and_stays_for_the_next_call(reader: ReaderProcess, files: dict[str, Path]) -> None:
    assert frames(reader, files["good"]) == [3, 5, 7, 9]
    child = reader.process
    assert child is not None
    assert child.pid != os.getpid()
    assert frames(reader, files["good"]) == [3, 5, 7, 9]
    assert reader.process is child


def test_errors_of_files_are_the_callers_and_the_child_goes_on(reader: ReaderProcess, files: dict[str, Path]) -> None:
    frames(reader, files["good"])
    child = reader.process
    with pytest.raises(UnreadableVideoError, match=r"broken\.avi: "):
        frames(reader, files["broken"])
    assert reader.process is child


def test_a_file_that_takes_too_long_is_given_up_and_the_child_killed(
    reader: ReaderProcess, files: dict[str, Path]
) -> None:
    frames(reader, files["good"])
    child = reader.process
    assert child is not None
    before = time.monotonic()
    with pytest.raises(UnreadableVideoError, match=r"slow\.avi: not read within 0\.2 seconds \(--data\.read_timeout\)"):
        frames(reader, files["slow"], timeout=0.2)
    assert time.monotonic() - before < 30
    assert child.poll() is not None
    assert frames(reader, files["good"]) == [3, 5, 7, 9]  # a new child


def test_a_file_that_kills_the_decoder_kills_the_child_alone(reader: ReaderProcess, files: dict[str, Path]) -> None:
    with pytest.raises(UnreadableVideoError, match=r"deadly\.avi: the process that read it has died"):
        frames(reader, files["deadly"])
    assert frames(reader, files["good"]) == [3, 5, 7, 9]


def test_an_answer_that_nobody_wants_to_the_end_does_not_mix_with_the_next(
    reader: ReaderProcess, files: dict[str, Path]
) -> None:
    answer = reader.call(files["good"], 60.0, "pyav", 0, 20, 1, (0,))
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert frames(reader, files["good"]) == [3, 5, 7, 9]


def test_indexing_gives_up_slow_files_too(reader: ReaderProcess, files: dict[str, Path], tmp_path: Path) -> None:
    root = files["good"].parent
    entries = index_entries([files["slow"], files["good"]], root, tmp_path, read_timeout=2.0)
    assert "slow.avi: not read within 2 seconds" in entries[files["slow"]].error
    assert entries[files["good"]].info is not None


def test_a_child_ends_with_its_reader_and_starts_anew_in_each_thread_and_process(files: dict[str, Path]) -> None:
    reader = ReaderProcess()
    frames(reader, files["good"])  # the real one
    child = reader.process
    assert isinstance(child, subprocess.Popen)
    del reader
    assert child.poll() is not None
    assert own_reader() is own_reader()


def test_a_child_that_cannot_start_is_an_error_that_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(ReaderProcess, "script", tmp_path / "broken.py")
    with pytest.raises(RuntimeError, match=r"--data\.read_timeout\) cannot be started: .*broken\.py"):
        frames(ReaderProcess(), files["good"])
