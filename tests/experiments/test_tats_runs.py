"""TATS through the command line: it learns, it samples, and key frames find what fills the frames between them."""

import json
from pathlib import Path

import pytest
import torch
from tiny_experiments import EVERY_RUN, read_video, write_experiment

from experiments.cli import ROOT, main
from experiments.lightning_cli import run

TOY = {"codebook_size": 16, "dim": 16, "depth": 2, "num_heads": 2}


def toy_flags(tokenizer: Path) -> list[str]:
    flags = {
        "model.tokenizer": tokenizer,
        "model.codebook_size": 16,
        "model.dim": 32,
        "model.depth": 2,
        "model.num_heads": 2,
        "model.warmup_steps": 0,
        "data.resolution": 32,
        "data.num_train": 8,
        "data.num_val": 4,
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 30,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "checkpoint.every_n_train_steps": 30,
        "samples.at_validation": "false",
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def test_the_demo_learns_at_toy_size(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = f"--config={ROOT / 'experiments/demo_tats.yaml'}"
    losses: list[float] = []
    step = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, closure):
        loss = step(self, closure)
        losses.append(float(loss))
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    run(["fit", config, *toy_flags(world / "tokenizer")])
    assert len(losses) == 30
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


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


def test_classes_take_turns_in_samples_longer_than_the_window(tiny: Path, world: Path) -> None:
    tats_experiment(tiny / "tats.yaml", world / "tokenizer", 16, num_classes=12)
    main(["fit", "--config=tats.yaml"])
    checkpoint = "--ckpt_path=runs/tats/version_0/checkpoints/last.ckpt"
    main(["sample", "--config=tats.yaml", checkpoint, "--num_samples=2", "--num_frames=24", "--out=made"])
    assert read_video(Path("made/seed=000000.mp4")).shape == (24, 32, 32, 3)
