"""Evaluations: protocols as data, what is kept with a number, what goes on after a kill, and what is never mixed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import datamodules
import experiments.evaluate
from datamodules import MovingShapesDataModule
from experiments.cli import main
from experiments.evaluate import Plan, generated_frames, leak, load_detectors
from experiments.lightning_cli import run
from experiments.protocol import FOLDER, Protocol, known_protocols, read_protocol
from models.metrics import Detector, DetectorCard, FrechetDistance, Preprocessing

TINY = {
    "title": "A tiny world",
    "source": "a test",
    "data": {
        "class_path": "MovingShapesDataModule",
        "init_args": {"num_frames": 16, "resolution": 32, "num_train": 5, "num_val": 5, "seed": 42},
    },
    "split": "val",
    "order": "listed",
    "frames": 16,
    "samples": 6,
    "repeats": 2,
    "detector": "random_i3d",
    "scores": ["frechet", "kernel", "oracle", "nll"],
}


def toy_detector(name: str = "random_toy") -> Detector:
    """Three means of colour, their change and a deviation: fast, and no I3D."""

    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
            change = video.diff(dim=2).abs().mean((1, 2, 3, 4))
            features = torch.cat([video.mean((2, 3, 4)), change[:, None]], dim=1) * self.scale
            return features, features

    return Detector(Means(), DetectorCard(name, "random, none", 4, 4, Preprocessing(32, "half_pixel")))


@pytest.fixture(autouse=True)
def quick_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments.evaluate, "random_i3d", toy_detector)
    monkeypatch.setattr(experiments.evaluate, "PART", 4)


@pytest.fixture
def evaluate(tiny: Path, mebt_run: Path, tokenizer_run: Path):
    """The command, under a protocol that differs from `TINY` as it is told."""

    def command(*words: str, experiment: str = "mebt", **changes: Any) -> dict[str, Any]:
        Path("tiny.yaml").write_text(yaml.safe_dump(TINY | changes))
        folder = mebt_run if experiment == "mebt" else tokenizer_run
        checkpoint = folder / "checkpoints/last.ckpt"
        place = [f"--config={experiment}.yaml", f"--ckpt_path={checkpoint}", "--out=made"]
        main(["evaluate", *place, "--protocol=tiny.yaml", "--batch_size=3", *words])
        return json.loads(Path("made/results.json").read_text())

    return command


def test_a_number_comes_with_all_that_it_depends_on(evaluate, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate()
    captured = capsys.readouterr()
    assert "━" not in captured.err  # no bar where there is no terminal
    assert "| run | given | frechet_random_toy |" in Path("made/results.md").read_text()
    assert result["protocol"]["name"] == "tiny"
    assert result["protocol"]["hash"] == read_protocol("tiny.yaml").digest
    assert len(result["checkpoint"]["sha256"]) == 64
    assert (result["run"], result["conditions"], result["leak"]) == ("mebt/version_0", "none", None)
    assert result["sampling"]["num_steps"] == 3
    assert result["detectors"] == {"main": {"name": "random_toy", "weights": "random, none"}}
    assert result["seconds_per_sample"] > 0
    assert result["code"]
    scores = result["scores"]
    assert {"frechet_random_toy", "kernel_random_toy", "shapes_overall", "nll_0.50"} <= scores.keys()
    assert "shapes_class_accuracy" not in scores  # nobody asked for a class
    distances = scores["frechet_random_toy"]["values"]
    assert len(distances) == 2
    assert distances[0] != distances[1]  # other samples
    assert scores["frechet_random_toy"]["std"] > 0
    with Image.open("made/contact_sheet.png") as sheet:
        assert sheet.height > 6 * 64

    # the distance is that of the samples and the real clips themselves
    module = run(["validate", "--config=mebt.yaml", f"--ckpt_path={result['checkpoint']['path']}"]).model
    plan = Plan(read_protocol("tiny.yaml"), 5, pairs=False)
    made = module.generate(
        experiments.evaluate.Condition(), 16, torch.tensor([sample_seed(plan, 0, i) for i in range(6)])
    )
    data = MovingShapesDataModule(**TINY["data"]["init_args"])
    data.setup("validate")
    metric = FrechetDistance(toy_detector())
    metric.update(toy_detector()(torch.stack([data.datasets["val"].render(i) for i in range(5)])), real=True)
    metric.update(toy_detector()(made.clamp(-1, 1)), real=False)
    assert distances[0] == pytest.approx(float(metric.compute()), rel=1e-4)


def sample_seed(plan: Plan, repeat: int, i: int) -> int:
    return experiments.evaluate.keyed_seed(plan.protocol.seed, experiments.evaluate._SAMPLE, repeat, i)


def test_what_was_killed_goes_on_with_the_missing_parts(evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate()
    shutil.move("made", "whole")
    step = experiments.evaluate.Examined.predict_step
    done: list[int] = []

    def dies(self: Any, batch: dict[str, Any], batch_idx: int) -> int:
        if len(done) == 3:
            raise RuntimeError("the power is gone")
        number = step(self, batch, batch_idx)
        done.append(number)
        return number

    monkeypatch.setattr(experiments.evaluate.Examined, "predict_step", dies)
    with pytest.raises(RuntimeError, match="the power is gone"):
        evaluate()
    assert not Path("made/results.json").exists()
    assert len(list(Path("made/parts").iterdir())) == 3
    (Path("made/parts") / ".generated-1-0000004.safetensors.17").write_bytes(b"half a part")
    kept = {path: path.stat().st_mtime_ns for path in Path("made/parts").glob("*.safetensors")}

    done.clear()
    monkeypatch.setattr(experiments.evaluate.Examined, "predict_step", lambda *args: done.append(1) or step(*args))
    result = evaluate()
    assert len(done) == 2  # of five: one of real clips, two of each repeat
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert result["scores"]["frechet_random_toy"] == expected["scores"]["frechet_random_toy"]

    with pytest.raises(ValueError, match=r"evaluation with another sampling.*--out"):
        evaluate("--model.sampling.num_steps=2")
    with pytest.raises(ValueError, match="evaluation with another protocol"):
        evaluate(samples=7)


def test_reconstructions_of_a_tokenizer_are_compared_with_their_inputs(evaluate, tokenizer_run: Path) -> None:
    result = evaluate(experiment="tokenizer", scores=["frechet", "oracle"], repeats=1)
    assert (result["conditions"], result["samples"], result["real_clips"]) == ("reconstruction", 5, 5)
    scores = result["scores"]
    assert {"reconstruction_frechet_random_toy", "psnr", "ssim", "shapes_class_accuracy"} <= scores.keys()
    words = ["--config=tokenizer.yaml", f"--ckpt_path={tokenizer_run / 'checkpoints/last.ckpt'}", "--data.num_val=5"]
    cli = run(["validate", *words])
    video = torch.stack([cli.datamodule.datasets["val"].render(i) for i in range(5)])
    both = cli.model.sample_videos({"video": video}, torch.arange(5))
    per_frame = experiments.evaluate.frame_psnr(both[:, :, :, 32:].clamp(-1, 1), both[:, :, :, :32])
    assert scores["psnr"]["mean"] == pytest.approx(float(per_frame.mean()), abs=1e-3)


def test_a_leak_is_named(evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"LEAK: .* MAGVIT and TATS do just that"):
        result = evaluate(split="train", order="drawn", real=4, repeats=1, samples=4, used_by=["MAGVIT", "TATS"])
    assert "LEAK" in result["leak"]
    assert "of the split that it was trained on" in Path("made/results.md").read_text()
    protocol = read_protocol("tiny.yaml")
    other = {"config": {"data": {"class_path": "datamodules.UCF101DataModule"}}}
    assert leak(protocol, other, None) is None
    assert (
        leak(read_protocol("shapes_16"), {"config": {"data": {"class_path": "MovingShapesDataModule"}}}, None) is None
    )


def test_windows_of_long_videos_are_compared_with_short_clips(evaluate) -> None:
    data = {"class_path": "MovingShapesDataModule", "init_args": TINY["data"]["init_args"] | {"num_frames": 8}}
    result = evaluate(
        data=data, windows={"frames": 8, "stride": 4, "include_last": False}, scores=["frechet"], repeats=1
    )
    assert list(result["scores"]) == ["frechet_random_toy_from_frame_0", "frechet_random_toy_from_frame_4"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--protocol=nope", "There is no protocol nope.*ucf101_magvit"),
        ("--protocol=ucf101_magvit", r"needs the weights of its detector \(--weights FILE\).*bec6519f"),
        ("--weights=i3d.pt", "reads no weights"),
        ("--c3d=c3d.npz", "has no inception score"),
        ("--task=frame_prediction", "has no tasks to choose from"),
        ("--batch_size=0", "batch_size=0 is too small"),
        ("--root=elsewhere", "has no files"),
    ],
)
def test_what_cannot_be_measured_is_refused(evaluate, word: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        evaluate(word)
    assert not Path("made/results.json").exists()


# Protocols


@pytest.mark.parametrize("name", known_protocols())
def test_protocols_can_be_read_and_their_data_made(name: str) -> None:
    protocol = read_protocol(name)
    assert protocol.source
    kind = getattr(datamodules, protocol.data["class_path"])
    data = kind(root="nowhere", **protocol.data["init_args"]) if kind is not MovingShapesDataModule else None
    windows = protocol.windows
    if data is not None:
        assert data.num_frames >= (windows.frames if windows else protocol.frames)
    assert bool(protocol.used_by) == (protocol.split == "train")
    for task in protocol.tasks:
        assert read_protocol(name, task).name == f"{name}/{task}"
    hashes = [read_protocol(name, task).digest for task in protocol.tasks]
    assert len(set(hashes)) == len(hashes)


def test_protocols_differ_by_what_they_say() -> None:
    hashes = {name: read_protocol(name).digest for name in known_protocols()}
    assert len(set(hashes.values())) == len(hashes)
    assert len(read_protocol("ucf101_zero_shot").texts) == 101


def test_published_numbers_are_of_known_protocols_and_quantities() -> None:
    names = {
        read_protocol(name, task).name for name in known_protocols() for task in read_protocol(name).tasks or [None]
    }
    for entry in yaml.safe_load((FOLDER / "published/numbers.yaml").read_text()):
        assert entry["protocol"] in names
        assert entry["source"]
        protocol = read_protocol(*entry["protocol"].split("/"))
        suffix = "_videogpt" if protocol.profile == "videogpt" else ""
        known = {f"fvd{suffix}", f"kvd{suffix}", f"rfvd{suffix}", "inception_score", "psnr", "ssim", "lpips_vgg"}
        known |= {"fid", "image_inception_score"} if protocol.detector == "inception" else set()
        assert entry["scores"].keys() <= known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "samples=1"),
        ({"profile": "tf"}, "profile=tf"),
        ({"scores": ["beauty"]}, "beauty"),
        ({"colour": "red"}, "does not say colour"),
        ({"split": None}, "split=None"),
        ({"given_frames": 16}, "given_frames=16: 0 to 15"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(ValueError, match=message):
        read_protocol(str(tmp_path / "own.yaml"))


def plan(clips: int, pairs: bool = False, **changes: Any) -> Plan:
    content = TINY | {"scores": ("frechet",), "name": "own", "order": "drawn", "real": 5} | changes
    return Plan(Protocol(**content), clips, pairs)


def test_each_clip_is_drawn_once_before_any_comes_again() -> None:
    drawn = plan(clips=3, samples=5)
    first, second = ([drawn.real_clip(repeat, i) for i in range(5)] for repeat in range(2))
    assert sorted(request.index for request in first[:3]) == [0, 1, 2]
    assert [request.epoch for request in first] == [0, 0, 0, 1, 1]  # another window and crop
    assert [request.epoch for request in second] == [2, 2, 2, 3, 3]
    assert [drawn.condition(0, i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_every_listed_clip_has_as_many_futures() -> None:
    listed = plan(clips=4, order="listed", real=None, samples=12)
    conditions = [listed.condition(0, i) for i in range(12)]
    assert sorted(conditions) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert conditions != [listed.condition(1, i) for i in range(12)]
    assert [listed.real_clip(7, i).index for i in range(4)] == [0, 1, 2, 3]


def test_even_labels_are_even() -> None:
    labels = plan(clips=3, labels="even", samples=24).labels(0, 12)
    assert sorted(labels) == sorted([*range(12)] * 2)
    assert labels != sorted(labels)


def test_a_causal_model_makes_more_frames_than_are_scored() -> None:
    class Causal:
        num_frames, new_frames = 17, 12

    assert [generated_frames(Causal(), frames) for frames in (16, 17, 18, 64, 128)] == [17, 17, 29, 65, 137]
    assert generated_frames(object(), 64) == 64


def test_inception_score_of_videos_is_left_out_with_a_note() -> None:
    protocol = read_protocol("ucf101_magvit")
    assert experiments.evaluate.left_out(protocol, {}, None) == [
        "inception_score: needs C3D (--c3d FILE --c3d_sha256 ...)"
    ]
    with pytest.raises(FileNotFoundError, match=r"FID.*--weights"):
        load_detectors(read_protocol("imagenet256_walt"))
