"""TATS through the command line: it learns, it samples, and key frames find what fills the frames between them."""

import contextlib
import copy
import functools
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_experiments import EVERY_RUN, TOKENIZER, read_video, write_experiment

from datamodules import AudioFramesDataModule, SpectrogramDataModule
from datamodules.sampler import ClipRequest
from datamodules.shapes import MovingShapes
from experiments.cli import ROOT, main
from lightning_modules import TATSModule, VQGAN3DModule
from lightning_modules.tats import TATSCondition
from models.optim import Muon
from models.random import keyed_generator
from models.weights import build, save_bundle

TOY = {"codebook_size": 16, "dim": 16, "depth": 2, "num_heads": 2}


FILES = {
    file.stem: file
    for file in sorted((ROOT / "experiments").glob("*.yaml"))
    if file.stem.startswith(("tats_", "demo_tats"))
}


@functools.cache
def resolved(name: str) -> dict[str, Any]:
    """What `longtake fit --print_config` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        main(["fit", f"--config={FILES[name]}", "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(out.getvalue())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tats_ucf101", 337_121_280),
        ("tats_ucf101_uncond", 336_914_432),
        ("tats_sky", 336_914_432),
        ("tats_taichi", 336_914_432),
        ("tats_sky_keys", 336_914_432),
        ("tats_sky_interpolation", 337_176_576),
        ("tats_taichi_keys", 336_914_432),
        ("tats_taichi_interpolation", 337_176_576),
        ("tats_mugen", 438_364_160),
    ],
)
def test_prior_has_the_published_size(name: str, parameters: int) -> None:
    config = resolved(name)
    assert config["run_name"] == name
    data = config["data"]["init_args"]
    with torch.device("meta"):
        module = TATSModule(
            **config["model"]["init_args"], num_frames=data["num_frames"], resolution=data["resolution"]
        )
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


@pytest.fixture(scope="session")
def stft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of spectrograms that was not trained, but whose codes are in use."""
    config = copy.deepcopy(TOKENIZER)
    config["init_args"]["encoder"]["init_args"] |= {"in_channels": 1, "downsample": [4, 16, 8]}
    config["init_args"]["decoder"]["init_args"] |= {"out_channels": 1, "downsample": [4, 16, 8]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build(config).eval()
    with torch.no_grad():
        clips = MovingShapes("train", 4, 16, resolution=32, audio=True)
        audio = torch.stack([clips[ClipRequest(index)]["audio"] for index in range(4)])
        vectors = tokenizer.pre_vq_conv(tokenizer.encoder(tokenizer.to_native(audio))).movedim(1, -1).flatten(0, -2)
        tokenizer.quantizer.embeddings.copy_(vectors[torch.randperm(len(vectors), generator=keyed_generator(0))[:16]])
    folder = tmp_path_factory.mktemp("sound") / "stft"
    save_bundle(folder, tokenizer, config, {"source": "a test"})
    return folder


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of each step from now on."""
    values: list[float] = []

    def count(optimizer: type[torch.optim.Optimizer]) -> None:
        step = optimizer.step

        def counted(self, closure):
            loss = step(self, closure)
            values.append(float(loss))
            return loss

        monkeypatch.setattr(optimizer, "step", counted)

    count(torch.optim.AdamW)
    count(Muon)
    return values


TOY_RUN = {
    "accelerator": "cpu",
    "devices": 1,
    "strategy": "auto",
    "precision": "32-true",
    "max_steps": 20,
    "limit_val_batches": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_experiment_learns_in_20_steps_at_toy_size(
    name: str, world: Path, stft: Path, losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolved(name)
    data = {
        "resolution": 32,
        "batch_size": 4,
        "num_train": 8,
        "num_val": 4,
        "num_workers": 0,
        "num_frames": min(config["data"]["init_args"]["num_frames"], 32),
        "captions": name == "tats_mugen",
        "audio": name == "tats_drums",
    }
    model = TOY | {"tokenizer": str(world / "tokenizer"), "dim": 32, "lr": 1e-2, "warmup_steps": 0, "init_std": 0.02}
    model["downsample"] = [4, 8, 8]
    if name == "tats_mugen":
        model |= {"text_tokenizer": "bytes", "text_length": 16, "block_size": None}
    if name == "tats_drums":
        model |= {"audio_tokenizer": str(stft), "audio_downsample": [4, 16, 8], "audio_codebook_size": 16}
    toy = {
        "data": {"class_path": "MovingShapesDataModule", "init_args": data},
        "model": {"init_args": model},
        "trainer": TOY_RUN,
        "checkpoint": {"every_n_train_steps": 20, "dirpath": "checkpoints"},
        "samples": {"every_n_steps": 0, "at_validation": False},
    }
    Path("toy.yaml").write_text(yaml.safe_dump(toy))
    main(["fit", f"--config={FILES[name]}", "--config=toy.yaml"])
    assert len(losses) == 20
    expected = math.log(16 + {"tats_mugen": 49_408, "tats_drums": 16}.get(name, model_classes(config)))
    assert losses[0] == pytest.approx(expected, rel=0.15)  # it begins by knowing nothing
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


def model_classes(config: dict[str, Any]) -> int:
    return config["model"]["init_args"]["num_classes"]


def test_the_tokenizer_of_sound_learns_in_20_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SpectrogramDataModule, "prepare_data", lambda self: None)
    sounds = {split: MovingShapes(split, 8, 8, resolution=32, audio=True) for split in ("train", "val")}
    monkeypatch.setattr(AudioFramesDataModule, "make_dataset", lambda self, split: sounds[split])
    logged: list[float] = []
    training_step = VQGAN3DModule.training_step

    def watched(self: VQGAN3DModule, batch: dict[str, Any], batch_idx: int) -> object:
        assert batch["video"].shape[1:] == (1, 8, 64, 16)
        assert "audio" not in batch
        with torch.no_grad():
            reconstruction = self.tokenizer.decode(self.tokenizer.encode(batch["video"]).latents)
            logged.append((reconstruction - batch["video"]).abs().mean().item())
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(VQGAN3DModule, "training_step", watched)
    small = {"init_args": {"base_channels": 4}}
    parts = {"encoder": small, "decoder": small, "quantizer": {"init_args": {"codebook_size": 16, "dim": 8}}}
    toy = {
        "data": {"init_args": {"root": str(tmp_path), "num_frames": 8, "batch_size": 2, "num_workers": 0}},
        "model": {"init_args": {"tokenizer": {"init_args": parts}, "lr": 3e-3, "accumulate_grad_batches": 1}},
        "trainer": TOY_RUN | {"limit_val_batches": 1, "val_check_interval": 20, "num_sanity_val_steps": 0},
        "checkpoint": {"every_n_train_steps": 20, "dirpath": "checkpoints"},
    }
    Path("toy.yaml").write_text(yaml.safe_dump(toy))
    main(["fit", f"--config={ROOT / 'experiments/vqgan3d_stft.yaml'}", "--config=toy.yaml"])
    assert len(logged) == 20
    assert sum(logged[-4:]) < 0.95 * sum(logged[:4])  # the same eight clips, in the first and the last epoch


def tats_experiment(path: Path, tokenizer: Path, num_frames: int, **arguments: object) -> None:
    data = {**EVERY_RUN["data"], "init_args": {**EVERY_RUN["data"]["init_args"], "num_frames": num_frames}}
    trainer = {**EVERY_RUN["trainer"], "max_steps": 2, "val_check_interval": 2}
    model = {"class_path": "TATSModule", "init_args": {**TOY, "tokenizer": str(tokenizer), **arguments}}
    write_experiment(path, EVERY_RUN, data=data, trainer=trainer, model=model, checkpoint={"every_n_train_steps": 2})


def test_key_frames_and_what_fills_them_make_videos_of_any_length(tiny: Path, world: Path) -> None:
    tats_experiment(tiny / "keys.yaml", world / "tokenizer", 32, latent_stride=4)
    tats_experiment(tiny / "between.yaml", world / "tokenizer", 20, mask="closed_boundaries")
    for name in ("keys", "between"):
        main(["fit", f"--config={name}.yaml"])  # shows samples at its validation
        assert list(Path("runs", name, "version_0/samples").glob("*.mp4"))
    keys, between = (f"runs/{name}/version_0/checkpoints/last.ckpt" for name in ("keys", "between"))
    words = ["sample", "--config=keys.yaml", f"--ckpt_path={keys}", "--num_samples=2", "--num_frames=28", "--out=made"]
    with pytest.raises(FileNotFoundError, match=r"key frames, 4 latent frames apart.*--model\.sampling\.interpolation"):
        main(words)
    main([*words, f"--model.sampling.interpolation={between}"])
    assert read_video(Path("made/seed=000001.mp4")).shape == (28, 32, 32, 3)
    assert json.loads(Path("made/samples.json").read_text())["sampling"]["interpolation"] == between
    with pytest.raises(ValueError, match="does not fill 3 latent frames between two"):
        main([*words[:-1], "--out=other", f"--model.sampling.interpolation={keys}"])
    with pytest.raises(ValueError, match="fills frames between key frames"):
        main(["sample", "--config=between.yaml", f"--ckpt_path={between}", "--out=other"])


def test_samples_take_captions_and_sounds_of_validation_clips(
    tiny: Path, world: Path, stft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two videos, of the first two clips."""
    asked: list[TATSCondition] = []
    generate = TATSModule.iter_generate

    def watched(self: TATSModule, condition: TATSCondition, *rest: Any) -> Iterator[torch.Tensor]:
        asked.append(condition)
        return generate(self, condition, *rest)

    monkeypatch.setattr(TATSModule, "iter_generate", watched)
    heard = {"audio_tokenizer": str(stft), "audio_downsample": [4, 16, 8], "audio_codebook_size": 16}
    read = {"text_tokenizer": "bytes", "text_vocabulary": 257, "text_length": 12}
    for name, arguments, kind in (("reads", read, "captions"), ("hears", heard, "audio")):
        tats_experiment(tiny / f"{name}.yaml", world / "tokenizer", 16, **arguments)
        words = [f"--config={name}.yaml", f"--data.{kind}=true"]
        main(["fit", *words])  # shows samples at its validation
        checkpoint = f"--ckpt_path=runs/{name}/version_0/checkpoints/last.ckpt"
        asked.clear()
        main(["sample", *words, checkpoint, "--num_samples=2", f"--out=made-{name}"])
        clips = MovingShapes("val", 4, 16, resolution=32, seed=42, captions=True, audio=True)
        items = [clips[ClipRequest(index)] for index in (0, 1)]
        if name == "reads":
            assert asked[0].text == [item["text"] for item in items]
        else:
            assert torch.equal(asked[0].audio, torch.stack([item["audio"] for item in items]))
        assert read_video(Path(f"made-{name}/seed=000001.mp4")).shape == (16, 32, 32, 3)


def test_classes_take_turns_in_samples_longer_than_the_window(tiny: Path, world: Path) -> None:
    tats_experiment(tiny / "tats.yaml", world / "tokenizer", 16, num_classes=12)
    main(["fit", "--config=tats.yaml"])
    checkpoint = "--ckpt_path=runs/tats/version_0/checkpoints/last.ckpt"
    main(["sample", "--config=tats.yaml", checkpoint, "--num_samples=2", "--num_frames=24", "--out=made"])
    assert read_video(Path("made/seed=000000.mp4")).shape == (24, 32, 32, 3)
