"""`longtake cache-frames`: the data module of an experiment, without its model."""

from pathlib import Path

import pytest
import torch

from datamodules import FrameCacheDataModule, MovingShapesDataModule
from experiments.cli import main
from experiments.lightning_cli import run


def test_an_experiments_data_is_cached_and_trained_from(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.yaml").write_text("base: mebt.yaml\ndata: {init_args: {num_frames: 8}}\nseed_everything: 7\n")
    main(["cache-frames", "--config=short.yaml", "--out=frames", "--data.num_train=4"])
    assert capsys.readouterr().out == "frames: frames of 32 x 32 pixels, raw\n"
    cached = FrameCacheDataModule("frames", num_frames=8, resolution=32)
    cached.setup("fit")
    pixels = MovingShapesDataModule(num_train=4, num_val=4, num_frames=8, resolution=32, seed=7)
    pixels.setup("fit")
    kept, drawn = (next(iter(data.ordered_dataloader("train"))) for data in (cached, pixels))
    assert torch.equal(kept["label"], drawn["label"])
    assert (kept["video"] - drawn["video"]).abs().max() <= 0.5 / 127.5 + 1e-6
    words = ["--data=FrameCacheDataModule", "--data.root=frames", "--data.num_frames=8", "--trainer.max_steps=1"]
    assert run(["fit", "--config=tokenizer.yaml", *words]).trainer.global_step == 1


def test_a_lossy_cache_is_announced(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache-frames", "--config=mebt.yaml", "--out=frames", "--jpeg=80", "--shard_items=3"])
    assert "JPEG 80, lossy" in capsys.readouterr().out
    assert FrameCacheDataModule("frames").lossy
    assert len(list(Path("frames/train").glob("*.bin"))) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config=nowhere.yaml"], "No experiment file .*nowhere.yaml"),
        (["--config=mebt.yaml", "--data.seed=3"], "--data.seed follows --seed_everything"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny: Path, words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["cache-frames", "--out=frames", *words])


def test_an_unknown_option_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cache-frames", "--config=mebt.yaml", "--out=frames", "--data.colour=red"])
    assert "colour" in capsys.readouterr().err
    assert not Path("frames").exists()
