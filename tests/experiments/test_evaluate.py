"""Evaluations: protocols as data, what is kept with a number, what goes on after a kill, and what is never mixed."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn

import datamodules
import experiments.evaluate
from datamodules import MovingShapesDataModule
from experiments.cli import main
from experiments.evaluate import (
    Examined,
    PartClips,
    Plan,
    begin,
    generated_frames,
    leak,
    left_out,
    load_detectors,
    protocol_data,
)
from experiments.protocol import FOLDER, Protocol, known_protocols, read_protocol
from lightning_modules import MeBTModule, VQGAN3DModule
from lightning_modules.generator import Condition
from models.metrics import Detector, DetectorCard, FrechetDistance, Preprocessing, frame_psnr
from models.shapes_world import CLASS_NAMES

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


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A quick detector, and parts of four videos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.evaluate, "random_i3d", toy_detector)
        patch.setattr(experiments.evaluate, "PART", 4)
        yield


def evaluate(experiment: Path, run_folder: Path, out: Path, real: Path | None = None, **changes: Any) -> dict[str, Any]:
    """The command, under a protocol that differs from `TINY` as it is told."""
    out.parent.mkdir(exist_ok=True)
    protocol = out.parent / "tiny.yaml"
    protocol.write_text(yaml.safe_dump(TINY | changes))
    place = [f"--config={experiment}", f"--ckpt_path={run_folder / 'checkpoints/last.ckpt'}", f"--out={out}"]
    shared = [] if real is None else [f"--real={real}"]
    main(["evaluate", *place, f"--protocol={protocol}", "--batch_size=3", *shared])
    return json.loads((out / "results.json").read_text())


@dataclass(frozen=True)
class Whole:
    """An evaluation that nobody has disturbed."""

    folder: Path
    result: dict[str, Any]
    seeds: Tensor
    videos: Tensor


@pytest.fixture(scope="module")
def whole(world: Path, mebt_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    made: list[tuple[Tensor, Tensor]] = []
    generate = MeBTModule.generate

    def recorded(self: MeBTModule, condition: Condition, num_frames: int, seeds: Tensor) -> Tensor:
        made.append((seeds, generate(self, condition, num_frames, seeds)))
        return made[-1][1]

    folder = tmp_path_factory.mktemp("whole") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeBTModule, "generate", recorded)
        result = evaluate(world / "mebt.yaml", mebt_run, folder)
    seeds, videos = (torch.cat(parts) for parts in zip(*made, strict=True))
    return Whole(folder, result, seeds, videos)


def test_a_number_comes_with_all_that_it_depends_on(whole: Whole) -> None:
    result, folder = whole.result, whole.folder
    assert "| run | given | frechet_random_toy |" in (folder / "results.md").read_text()
    assert result["protocol"]["name"] == "tiny"
    assert result["protocol"]["hash"] == read_protocol(str(folder.parent / "tiny.yaml")).digest
    assert len(result["checkpoint"]["sha256"]) == 64
    assert (result["run"], result["conditions"], result["leak"]) == ("mebt/version_0", "none", None)
    assert result["sampling"]["num_steps"] == 3
    assert result["detectors"] == {"main": {"name": "random_toy", "weights": "random, none"}}
    assert result["seconds_per_sample"] > 0
    assert result["code"]
    assert {"frechet_random_toy", "kernel_random_toy", "shapes_overall", "nll_0.50"} <= result["scores"].keys()
    assert "shapes_class_accuracy" not in result["scores"]  # nobody asked for a class
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.height > 6 * 64


def test_the_distance_is_that_of_the_samples_to_the_real_clips(whole: Whole) -> None:
    assert whole.seeds.unique().numel() == 12  # each repeat has samples of its own
    data = MovingShapesDataModule(**TINY["data"]["init_args"])
    data.setup("validate")
    detector = toy_detector()
    metric = FrechetDistance(detector)
    metric.update(detector(torch.stack([data.datasets["val"].render(i) for i in range(5)])), real=True)
    distances = []
    for videos in whole.videos.clamp(-1, 1).split(6):
        metric.reset_generated()
        metric.update(detector(videos), real=False)
        distances.append(float(metric.compute()))
    score = whole.result["scores"]["frechet_random_toy"]
    assert score["values"] == pytest.approx(distances, rel=1e-6)
    assert (score["mean"], score["std"]) == (
        pytest.approx(statistics.fmean(distances), rel=1e-6),
        pytest.approx(statistics.stdev(distances), rel=1e-5),
    )


def test_what_was_killed_goes_on_with_the_missing_parts(
    whole: Whole, tiny: Path, mebt_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL leaves whole parts, and at most a partial file under another name."""
    step = experiments.evaluate.Examined.predict_step
    done: list[int] = []

    def dies(self: Any, batch: dict[str, Any], batch_idx: int) -> int:
        if len(done) == 3:
            raise RuntimeError("the power is gone")
        done.append(batch["part"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(experiments.evaluate.Examined, "predict_step", dies)
    parts = tiny / "made/parts"
    with pytest.raises(RuntimeError, match="the power is gone"):
        evaluate(tiny / "mebt.yaml", mebt_run, tiny / "made")
    assert not (tiny / "made/results.json").exists()
    assert len(list(parts.iterdir())) == 3  # of five: one of real clips, two of each repeat
    (parts / ".generated-1-0000004.safetensors.17").write_bytes(b"half a part")
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*")}

    monkeypatch.setattr(experiments.evaluate.Examined, "predict_step", lambda *args: done.append(9) or step(*args))
    result = evaluate(tiny / "mebt.yaml", mebt_run, tiny / "made")
    assert done.count(9) == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("frechet_random_toy", "kernel_random_toy", "shapes_overall"):
        assert result["scores"][name] == whole.result["scores"][name]
    assert "━" not in capsys.readouterr().err  # no bar where there is no terminal


def test_evaluations_share_what_the_detectors_see_of_real_clips(whole: Whole, tiny: Path, mebt_run: Path) -> None:
    real = tiny / "real"
    evaluate(tiny / "mebt.yaml", mebt_run, tiny / "first", real=real)
    assert [path.name for path in (real / "parts").iterdir()] == ["real-0-0000000.safetensors"]
    assert not list((tiny / "first/parts").glob("real*"))
    written = (real / "parts/real-0-0000000.safetensors").stat().st_mtime_ns
    result = evaluate(tiny / "mebt.yaml", mebt_run, tiny / "second", real=real)
    assert (real / "parts/real-0-0000000.safetensors").stat().st_mtime_ns == written
    for name in ("frechet_random_toy", "kernel_random_toy"):
        assert result["scores"][name] == whole.result["scores"][name]
    other = {**TINY["data"], "init_args": {**TINY["data"]["init_args"], "seed": 7}}
    with pytest.raises(ValueError, match=r"real holds an evaluation with another protocol, transform.*--real"):
        evaluate(tiny / "mebt.yaml", mebt_run, tiny / "third", real=real, data=other)


def test_another_evaluation_does_not_go_on_in_the_same_folder(whole: Whole, tmp_path: Path) -> None:
    about = json.loads((whole.folder / "evaluation.json").read_text())
    begin(whole.folder, about)
    with pytest.raises(ValueError, match=r"evaluation with another sampling.*--out"):
        begin(whole.folder, about | {"sampling": {}})
    with pytest.raises(ValueError, match="evaluation with another protocol, code"):
        begin(whole.folder, about | {"protocol": {}, "code": "another"})
    with pytest.raises(ValueError, match="evaluation of other weights"):
        begin(whole.folder, about | {"checkpoint": {"sha256": "another"}})
    (tmp_path / "diary.txt").touch()
    with pytest.raises(ValueError, match="something else"):
        begin(tmp_path, about)


def test_reconstructions_of_a_tokenizer_are_compared_with_their_inputs(
    tiny: Path, tokenizer_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    sample_videos = VQGAN3DModule.sample_videos

    def recorded(self: VQGAN3DModule, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        made.append(sample_videos(self, batch, seeds))
        return made[-1]

    monkeypatch.setattr(VQGAN3DModule, "sample_videos", recorded)
    changes = {"scores": ["frechet", "oracle"], "repeats": 1}
    result = evaluate(tiny / "tokenizer.yaml", tokenizer_run, tiny / "made", **changes)
    assert (result["conditions"], result["samples"], result["real_clips"]) == ("reconstruction", 5, 5)
    scores = result["scores"]
    assert {"reconstruction_frechet_random_toy", "psnr", "ssim", "shapes_class_accuracy"} <= scores.keys()
    original, reconstruction = torch.cat(made).chunk(2, dim=3)
    expected = frame_psnr(reconstruction.clamp(-1, 1), original).mean()
    assert scores["psnr"]["mean"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["shapes_16", "shapes_64", "shapes_128", "shapes_demo"])
def test_the_race_takes_place_in_the_world_that_the_demo_learns(name: str) -> None:
    learnt = yaml.safe_load((FOLDER.parent / "_base/demo.yaml").read_text())["data"]["init_args"]
    asked = read_protocol(name).data["init_args"]
    shared = learnt.keys() & asked.keys() - {"num_frames", "num_val"}
    assert shared == {"resolution", "min_objects", "max_objects", "size", "speed", "texture", "shade"}
    assert {key: asked[key] for key in shared} == {key: learnt[key] for key in shared}


def test_a_leak_is_named(tiny: Path, mebt_run: Path) -> None:
    changes = {"split": "train", "order": "drawn", "real": 4, "repeats": 1, "samples": 4, "scores": ["frechet"]}
    with pytest.warns(UserWarning, match=r"LEAK: .* MAGVIT and TATS do just that"):
        result = evaluate(tiny / "mebt.yaml", mebt_run, tiny / "made", used_by=["MAGVIT", "TATS"], **changes)
    assert "LEAK" in result["leak"]
    assert "of the split that it was trained on" in (tiny / "made/results.md").read_text()
    protocol = read_protocol(str(tiny / "tiny.yaml"))
    assert leak(protocol, {"config": {"data": {"class_path": "datamodules.UCF101DataModule"}}}, None) is None
    assert (
        leak(read_protocol("shapes_16"), {"config": {"data": {"class_path": "MovingShapesDataModule"}}}, None) is None
    )


def test_windows_of_long_videos_are_compared_with_short_clips(tiny: Path, mebt_run: Path) -> None:
    data = {"class_path": "MovingShapesDataModule", "init_args": TINY["data"]["init_args"] | {"num_frames": 8}}
    windows = {"frames": 8, "stride": 4, "include_last": False}
    changes = {"data": data, "windows": windows, "scores": ["frechet"], "repeats": 1}
    result = evaluate(tiny / "mebt.yaml", mebt_run, tiny / "made", **changes)
    assert list(result["scores"]) == ["frechet_random_toy_from_frame_0", "frechet_random_toy_from_frame_4"]


def test_a_protocol_that_is_not_there_is_refused_before_anything_is_made(tiny: Path, mebt_run: Path) -> None:
    words = ["--config=mebt.yaml", f"--ckpt_path={mebt_run / 'checkpoints/last.ckpt'}", "--out=made"]
    with pytest.raises(FileNotFoundError, match=r"There is no protocol nope.*ucf101_magvit"):
        main(["evaluate", *words, "--protocol=nope"])
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("ucf101_magvit", {}, r"needs the weights of its detector \(--weights FILE\).*sha256 bec6519f"),
        ("ucf101_magvit", {"weights": "nowhere.pt"}, "No detector weights at nowhere.pt"),
        ("imagenet256_walt", {}, "measures FID"),
        ("shapes_16", {"weights": "i3d.pt"}, "reads no weights"),
        ("shapes_16", {"c3d": "c3d.npz"}, "has no inception score"),
    ],
)
def test_detectors_that_do_not_fit_are_refused(protocol: str, options: dict[str, str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        load_detectors(read_protocol(protocol), **options)


def test_the_data_lie_where_the_experiment_or_the_user_says() -> None:
    experiment = datamodules.UCF101DataModule("here", num_workers=3, random_crop=False)
    data = protocol_data(read_protocol("ucf101_magvit"), experiment, None)
    assert (data.root, data.num_workers, data.random_crop) == ("here", 3, True)
    assert protocol_data(read_protocol("sky_tats"), experiment, None).root is None
    assert protocol_data(read_protocol("sky_tats"), experiment, "there").root == "there"
    with pytest.raises(ValueError, match="has no files"):
        protocol_data(read_protocol("shapes_16"), None, "there")


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


def test_a_model_of_whole_latent_frames_makes_more_frames_than_are_scored() -> None:
    diffusion = SimpleNamespace(causal=True, downsample=(4, 8, 8), num_frames=17, new_frames=12)
    assert [generated_frames(diffusion, frames) for frames in (16, 17, 18, 64, 128)] == [17, 17, 29, 65, 137]
    causal = SimpleNamespace(causal=True, downsample=(4, 8, 8))
    assert [generated_frames(causal, frames) for frames in (1, 16, 17, 18)] == [1, 17, 17, 21]
    agnostic = SimpleNamespace(causal=False, downsample=(4, 8, 8))
    assert [generated_frames(agnostic, frames) for frames in (16, 17)] == [16, 20]
    assert generated_frames(SimpleNamespace(), 63) == 63


def test_inception_score_of_videos_is_left_out_with_a_note() -> None:
    notes = left_out(read_protocol("ucf101_magvit"), {}, None)
    assert notes == ["inception_score: needs C3D (--c3d FILE --c3d_sha256 ...)"]


class Knowing(LightningModule):
    """Makes true clips of the classes that it is asked for, and remembers what it was asked."""

    class_conditional, num_classes = True, 12

    def __init__(self) -> None:
        super().__init__()
        self.data = MovingShapesDataModule(num_val=300, num_frames=16, resolution=32, max_objects=1, texture=0.0)
        self.data.setup("validate")
        self.asked: list[Condition] = []

    def generate(self, condition: Condition, num_frames: int, seeds: Tensor) -> Tensor:
        self.asked.append(condition)
        clips = self.data.datasets["val"]
        labels = condition.label.tolist()
        found = [next(i for i in range(300) if clips.ground_truth(i).label == label) for label in labels]
        return torch.stack([clips.render(i) for i in found])


def examined(model: LightningModule, **changes: Any) -> Examined:
    work = plan(clips=5, **({"order": "listed", "real": None, "scores": ("oracle",)} | changes))
    return Examined(
        model, work, {"main": toy_detector()}, None, Path("nowhere"), Path("nowhere"), 16, 4, list(CLASS_NAMES)
    )


def clips_of(work: Examined, kind: str, number: int = 0) -> dict[str, Any]:
    data = MovingShapesDataModule(**TINY["data"]["init_args"])
    data.setup("validate")
    clips = PartClips(work.parts, work.plan, data.datasets["val"], work.reads)
    return clips[[part.kind for part in work.parts].index(kind) + number]


@pytest.mark.parametrize("labels", ["even", "clips"])
def test_samples_are_held_to_the_classes_that_were_asked_for(labels: str) -> None:
    model = Knowing()
    work = examined(model, labels=labels)
    assert (work.conditions, work.reads) == ("class", {"even": "nothing", "clips": "label"}[labels])
    batch = clips_of(work, "generated")
    kept = work._generated(work.parts[batch["part"]], 0, 4, batch)
    assert kept["shapes_class_accuracy"].tolist() == [1.0] * 4
    if labels == "clips":
        truth = MovingShapesDataModule(**TINY["data"]["init_args"]).make_dataset("val")
        expected = [truth.ground_truth(clip).label for clip in kept["clip"].tolist()]
        assert model.asked[0].label.tolist() == expected
        assert batch["video"].shape[2] == 1  # no more is read than the label takes


def test_known_pixels_are_those_of_the_clip_that_a_sample_is_compared_with() -> None:
    class Continuing(Knowing):
        class_conditional = False

        def generate(self, condition: Condition, num_frames: int, seeds: Tensor) -> Tensor:
            self.asked.append(condition)
            return condition.video[:, :, :1].expand(-1, -1, num_frames, -1, -1)

    model = Continuing()
    work = examined(model, given_frames=5, scores=("psnr_ssim",))
    assert (work.conditions, work.reads) == ("pixels", "pixels")
    batch = clips_of(work, "generated")
    kept = work._generated(work.parts[batch["part"]], 0, 4, batch)
    assert torch.equal(model.asked[0].video, batch["video"][:4, :, :5])
    still = batch["video"][:4, :, :1].expand(-1, -1, 16, -1, -1)
    assert torch.allclose(kept["psnr"], frame_psnr(still, batch["video"][:4]).mean(1))
    assert kept["clip"].tolist() == batch["index"][:4].tolist()


def test_of_several_futures_the_best_counts() -> None:
    work = examined(Knowing(), scores=("psnr_ssim",), samples=4)
    made = {"clip": torch.tensor([0, 1, 0, 1]), "psnr": torch.tensor([10.0, 20.0, 30.0, 5.0])}
    assert work._means(made) == {"psnr": 25.0}


def test_a_model_that_reads_no_text_cannot_be_asked_by_text() -> None:
    with pytest.raises(ValueError, match="asks for videos by text; Knowing reads none"):
        examined(Knowing(), texts={"Archery": "An archer"})


def test_a_model_of_several_tasks_is_told_no_more_than_the_protocol_gives() -> None:
    class Versatile(Knowing):
        tasks = ("frame_prediction", "class_conditional")

        def checked_task(self, task: str | None) -> str | None:
            return task

    assert examined(Versatile()).conditions == "class"
    assert examined(Versatile(), task="frame_prediction").conditions == "pixels"
