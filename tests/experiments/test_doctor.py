"""`longtake doctor`: the counts, the problems, and the exit code."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pytest
from PIL import Image

from datamodules import FramesDataModule
from experiments.cli import ROOT, main
from experiments.doctor import files_data_module
from experiments.make_layouts import main as make_layouts


def write_video(path: Path, num_frames: int, brightness: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(num_frames):
            image = np.full((32, 48, 3), (brightness + 5 * number) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, three healthy videos for training and one to validate on; the working directory is empty."""
    for number, name in enumerate(("train/walk/a", "train/walk/b", "train/run/c", "val/run/d")):
        write_video(tmp_path / "data" / f"{name}.avi", 12 + number, brightness=10 * number)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "data"


def doctor(root: Path, *words: str, code: int) -> dict[str, Any]:
    """Run the command and return its report."""
    words = ("--data=FramesDataModule", f"--data.root={root}", "--data.num_frames=8", "--out=out", *words)
    if code:
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", *words])
        assert stopped.value.code == code
    else:
        main(["doctor", *words])
    return json.loads(Path("out/report.json").read_text())


def test_a_healthy_data_set_is_counted_and_the_exit_is_clean(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor(root, code=0)
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert (train["videos"], train["usable"], train["frames"], val["usable"]) == (3, 3, 12 + 13 + 14, 1)
    assert train["clips"] == 5 + 6 + 7  # starts that fit
    assert train["hours"] == pytest.approx(39 / 25 / 3600)
    assert train["classes"] == {"run": {"videos": 1, "usable": 1}, "walk": {"videos": 2, "usable": 2}}
    assert not report["wrong"]
    estimates = report["estimates"]
    assert estimates["gigabytes_as_raw_frames"] == pytest.approx((39 + 15) * 3 * 128**2 / 1e9)
    assert estimates["hours_per_epoch_and_worker"] == pytest.approx(estimates["seconds_per_clip_and_worker"] * 3 / 3600)
    out = capsys.readouterr().out
    assert Path("out/report.txt").read_text() in out
    rows = [line.split() for line in out.splitlines()]
    assert ["long", "enough", "and", "readable", "3", "1"] in rows
    assert ["walk", "2", "of", "2", "0", "of", "0"] in rows
    assert "Nothing is wrong." in out


def test_everything_that_is_wrong_is_counted_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = root / "train"
    whole = (train / "walk/a.avi").read_bytes()
    (train / "run/leak.avi").write_bytes((root / "val/run/d.avi").read_bytes())
    (train / "run/twin.avi").write_bytes((train / "run/c.avi").read_bytes())
    (train / "walk/page.avi").write_text("<html>")
    with av.open(str(train / "walk/a.avi")) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    (train / "walk/cut.avi").write_bytes(whole[: places[6]])
    (train / "walk/dangling.avi").symlink_to(root / "nowhere.avi")
    os.mkfifo(train / "walk/pipe.avi")
    write_video(train / "walk/short.avi", 7, brightness=99)
    report = doctor(root, code=1)
    found, problems = report["splits"]["train"], report["problems"]
    assert (found["videos"], found["usable"], found["too_short"]) == (10, 5, 1)
    assert (found["corrupt"], found["truncated"], found["missing"]) == (2, 1, 1)
    assert {Path(path).name for path in problems["corrupt"]} == {"page.avi", "pipe.avi"}
    assert "is a pipe" in problems["corrupt"][str(train / "walk/pipe.avi")]
    assert [Path(path).name for path in problems["truncated"]] == ["cut.avi"]
    assert [Path(path).name for path in problems["missing"]] == ["dangling.avi"]
    assert problems["duplicate"] == [{"train": [str(train / "run/c.avi"), str(train / "run/twin.avi")]}]
    assert problems["leaking"] == [{"train": [str(train / "run/leak.avi")], "val": [str(root / "val/run/d.avi")]}]
    out = capsys.readouterr().out
    assert f"  {train}/run/leak.avi (train) = {root}/val/run/d.avi (val)" in out
    assert "corrupt (2):" in out
    assert "Something is wrong, see above." in out


def test_short_videos_are_no_fault_but_a_class_or_split_without_any_other_is(root: Path) -> None:
    assert doctor(root, "--data.num_frames=13", code=0)["splits"]["train"]["too_short"] == 1
    report = doctor(root, "--data.frame_stride=2", code=1)  # spans 15 frames
    assert report["problems"]["empty"][0] == "train: no video is long enough"
    assert "train: no usable video of class walk" in report["problems"]["empty"]
    assert report["estimates"] == {}


def test_files_in_quarantine_are_named_with_their_reason(root: Path) -> None:
    data = FramesDataModule(str(root))
    data.quarantine().add(root / "train/walk/a.avi", "a.avi: not read within 3 seconds")
    report = doctor(root, code=1)
    assert report["problems"]["quarantined"] == {str(root / "train/walk/a.avi"): "a.avi: not read within 3 seconds"}
    assert (report["splits"]["train"]["usable"], report["splits"]["train"]["quarantined"]) == (2, 1)


def test_the_quick_look_reads_headers_alone(root: Path) -> None:
    (root / "train/run/twin.avi").write_bytes((root / "train/run/c.avi").read_bytes())
    report = doctor(root, "--quick", code=0)  # twins are found by their content
    assert (report["level"], report["splits"]["train"]["usable"], report["estimates"]) == ("quick", 4, {})
    assert '"level": "full"' not in (root / ".longtake/index.jsonl").read_text()


def test_failures_are_looked_at_again_when_asked(root: Path) -> None:
    index = root / ".longtake" / "index.jsonl"
    doctor(root, code=0)
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for line in lines:  # as if a disk had been away
        if line["path"] == "train/walk/a.avi":
            line |= {"info": None, "error": "a.avi: not read within 3 seconds"}
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert doctor(root, code=1)["splits"]["train"]["corrupt"] == 1
    assert doctor(root, "--again", code=0)["splits"]["train"]["corrupt"] == 0


def test_folders_of_frames_are_examined_too(root: Path) -> None:
    folder = root / "train/run/frames"
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    report = doctor(root, code=0)
    assert (report["splits"]["train"]["usable"], report["splits"]["train"]["frames"]) == (4, 39 + 9)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of three clips each as small data sets in the official layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, level in (("one", 0), ("other", 60)):
        write_video(folder / f"clips/{name}.avi", 90, brightness=level)
    names = [layout for layout, *_ in TestEveryDataModule.SOUND.values()]
    make_layouts([str(folder / "clips"), str(folder / "out"), "--frames=30", "--layouts", *names])
    return folder / "out"


class TestEveryDataModule:
    SOUND: ClassVar = {  # videos for training and to validate on, frames of each, classes
        "UCF101DataModule": ("ucf101", 4, 2, 30, 2),
        "BAIRDataModule": ("bair", 4, 2, 30, 1),
        "K600DataModule": ("k600", 4, 2, 30, 2),
        "SSV2DataModule": ("ssv2", 4, 2, 30, 2),
        "FramesDataModule": ("frames", 4, 2, 30, 2),
    }

    @staticmethod
    def run(name: str, root: Path, out: Path, *words: str) -> tuple[int, dict[str, Any]]:
        try:
            main(["doctor", f"--data={name}", f"--data.root={root}", f"--out={out}", *words])
            code = 0
        except SystemExit as stopped:
            code = int(str(stopped.code))
        return code, json.loads((out / "report.json").read_text())

    @pytest.mark.parametrize("name", SOUND)
    def test_a_sound_data_set_is_counted(self, layouts: Path, tmp_path: Path, name: str) -> None:
        layout, train, val, frames, classes = self.SOUND[name]
        code, report = self.run(name, layouts / layout, tmp_path)
        found = {split: report["splits"][split] for split in ("train", "val")}
        assert code == 0, report["problems"]
        assert (
            [found[split]["videos"] for split in found] == [found[split]["usable"] for split in found] == [train, val]
        )
        assert [found[split]["frames"] for split in found] == [train * frames, val * frames]
        assert found["train"]["clips"] == train * (frames - 15)
        assert len(found["train"]["classes"]) == classes
        assert report["estimates"]["seconds_per_clip_and_worker"] > 0

    @pytest.mark.parametrize("name", SOUND)
    def test_what_is_damaged_is_named_and_fails(self, layouts: Path, tmp_path: Path, name: str) -> None:
        root = tmp_path / "data"
        shutil.copytree(layouts / self.SOUND[name][0], root, ignore=shutil.ignore_patterns(".longtake"))
        data = files_data_module(name, [f"--data.root={root}"])
        file = next(iter(data.listing()["train"]))
        if file.is_dir():
            min(file.iterdir()).write_bytes(b"<html>")
        else:
            content = bytearray(file.read_bytes())
            file.write_bytes(content[: len(content) // 2 + 9])  # inside of a record
        code, report = self.run(name, root, tmp_path / "out")
        assert code == 1
        problems = report["problems"]["corrupt"] | report["problems"]["truncated"]
        assert list(problems) == [str(file)]
        if name == "BAIRDataModule":  # the rest of the records is used
            assert list(report["problems"]["truncated"]) == [str(file)]
            assert 0 < report["splits"]["train"]["usable"] < 4
        else:
            assert report["splits"]["train"]["usable"] == 3

    def test_images_and_captions_are_examined_too(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
            (root / split / "dog").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(root / split / "dog" / f"{name}.png")
            line = {"path": f"{split}/dog/{name}.png", "text": "a dog"}
            (root / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
        (root / "train/dog/b.png").write_text("<html>")
        code, report = self.run("ImageFolderDataModule", root, tmp_path / "out")
        assert (code, list(report["problems"]["corrupt"])) == (1, [str(root / "train/dog/b.png")])
        assert [report["splits"][split]["usable"] for split in ("train", "val")] == [1, 1]
        with (root / "val.jsonl").open("a") as file:
            file.write('{"path": "val/gone.png", "text": "nothing"}\n')
        code, report = self.run("CaptionedDataModule", root, tmp_path / "out", "--data.num_frames=1")
        assert (code, list(report["problems"]["missing"])) == (1, [str(root / "val/gone.png")])
        assert list(report["problems"]["corrupt"]) == [str(root / "train/dog/b.png")]

    @pytest.mark.parametrize("name", ["UCF101DataModule", "K600DataModule", "SSV2DataModule"])
    def test_what_a_list_names_and_is_not_there_is_missing(self, layouts: Path, tmp_path: Path, name: str) -> None:
        root = tmp_path / "data"
        shutil.copytree(layouts / self.SOUND[name][0], root)
        file = next(iter(files_data_module(name, [f"--data.root={root}"]).listing()["val"]))
        file.unlink()
        code, report = self.run(name, root, tmp_path / "out", "--quick")
        assert (code, list(report["problems"]["missing"])) == (1, [str(file)])

    def test_a_record_in_quarantine_is_named_alone(self, layouts: Path, tmp_path: Path) -> None:
        root = tmp_path / "data"
        shutil.copytree(layouts / "bair", root)
        data = files_data_module("BAIRDataModule", [f"--data.root={root}"])
        file = next(iter(data.listing()["train"]))
        data.quarantine().add(file / "1", "record 1: no 30 frames")
        code, report = self.run("BAIRDataModule", root, tmp_path / "out")
        assert (code, report["problems"]["quarantined"]) == (1, {str(file / "1"): "record 1: no 30 frames"})
        assert (report["splits"]["train"]["usable"], report["splits"]["train"]["quarantined"]) == (3, 1)


class TestWhatIsExamined:
    def test_an_experiment_file_says_it_with_its_bases_and_options_win(self, root: Path) -> None:
        Path("parent.yaml").write_text(
            "data: {class_path: FramesDataModule, init_args: {num_frames: 4, resolution: 32}}\nmodel: {class_path: X}\n"
        )
        Path("child.yaml").write_text("base: parent.yaml\ndata: {init_args: {num_frames: 6}}\n")
        data = files_data_module("child.yaml", [f"--data.root={root}", "--data.frame_stride=2"])
        assert isinstance(data, FramesDataModule)
        assert (data.num_frames, data.frame_stride, data.resolution, data.root) == (6, 2, 32, str(root))

    def test_a_file_without_data_is_refused(self, root: Path) -> None:
        Path("none.yaml").write_text("trainer: {}\n")
        with pytest.raises(ValueError, match=r"none.yaml has no `data` section"):
            files_data_module("none.yaml", [])

    def test_a_data_module_without_files_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"MovingShapesDataModule reads no files that could be examined"):
            files_data_module("MovingShapesDataModule", [])

    def test_an_unknown_option_is_refused_by_name(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            files_data_module("FramesDataModule", [f"--data.root={root}", "--data.nume_frames=3"])
        assert "nume_frames" in capsys.readouterr().err


def test_help_answers_within_a_second_of_processor_time() -> None:
    program = "import sys; from experiments.cli import main; main(['doctor', '--help'])"
    code = f"import time\ntry:\n    {program.replace('; ', chr(10) + '    ')}\nexcept SystemExit:\n    pass\n"
    code += "print('modules', 'torch' in sys.modules, 'lightning' in sys.modules, time.process_time() < 1)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "modules False False True", result.stderr
    assert "--data CLASS|FILE" in result.stdout
    assert time.monotonic() - began < 60
