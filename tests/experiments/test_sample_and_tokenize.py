"""The commands that run a trained prior or its tokenizer: what they write, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from probes import read_ledger
from tiny_experiments import read_video

from datamodules.tokens import read_codes
from experiments.cli import main
from experiments.lightning_cli import run
from models.weights import load_tokenizer, state_digest


@pytest.fixture
def sample(tiny: Path, mebt_run: Path):
    def command(*words: str, checkpoint: Path = mebt_run / "checkpoints/last.ckpt") -> None:
        main(["sample", "--config=mebt.yaml", f"--ckpt_path={checkpoint}", *words])

    return command


def test_sample_writes_a_video_for_each_seed_a_sheet_and_what_they_are(sample, mebt_run: Path) -> None:
    sample("--num_samples=3", "--batch_size=2", "--first_seed=7", "--out=made", "--fps=5")
    made = Path("made")
    assert sorted(path.name for path in made.iterdir()) == [
        "contact_sheet.png",
        "grid.mp4",
        "samples.json",
        "seed=000007.mp4",
        "seed=000008.mp4",
        "seed=000009.mp4",
    ]
    videos = [read_video(made / f"seed={seed:06d}.mp4") for seed in (7, 8, 9)]
    assert {video.shape for video in videos} == {(16, 32, 32, 3)}  # the video itself, without a frame around it
    assert np.abs(videos[0].astype(float) - videos[1]).mean() > 1  # seeds differ
    assert read_video(made / "grid.mp4").shape[0] == 16
    with Image.open(made / "contact_sheet.png") as sheet:
        assert sheet.height > 3 * 32
    about = json.loads((made / "samples.json").read_text())
    assert about.pop("seconds_per_video") > 0
    assert about.pop("sampling")["num_steps"] == 3
    assert about == {
        "checkpoint": str(mebt_run / "checkpoints/last.ckpt"),
        "num_frames": 16,
        "task": None,
        "label": None,
        "text": None,
        "input": None,
        "mask": None,
        "seeds": [7, 8, 9],
    }


def test_a_seed_is_a_video_whatever_its_batch(sample) -> None:
    sample("--num_samples=4", "--batch_size=4", "--out=together")
    sample("--num_samples=1", "--first_seed=2", "--out=alone")
    together, alone = (read_video(Path(folder) / "seed=000002.mp4") for folder in ("together", "alone"))
    assert np.abs(together.astype(float) - alone).mean() < 0.5  # rounding, seen through the codec


def test_samples_lie_beside_their_checkpoint_unless_told_otherwise(sample, mebt_run: Path) -> None:
    shutil.copytree(mebt_run, "moved", symlinks=True)
    sample("--num_samples=1", checkpoint=Path("moved/checkpoints/step=4.ckpt"))
    assert Path("moved/samples-step=4/seed=000000.mp4").is_file()


def test_sampling_may_differ_from_the_checkpoints(sample) -> None:
    sample("--num_samples=1", "--num_frames=8", "--model.sampling.num_steps=2", "--out=made")
    assert read_video(Path("made/seed=000000.mp4")).shape[0] == 8
    assert json.loads(Path("made/samples.json").read_text())["sampling"]["num_steps"] == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--num_samples=0", r"num_samples=0 is too small: at least 1 \(--num_samples\)"),
        ("--batch_size=0", "batch_size=0 is too small"),
        ("--first_seed=-1", "first_seed=-1 is too small: at least 0"),
        ("--fps=0", "fps=0 is too small"),
        ("--num_frames=10", "num_frames=10 cannot be generated: this model makes multiples of 4"),
    ],
)
def test_samples_that_cannot_be_made_are_refused(sample, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(word, "--out=made")
    assert not Path("made").exists()


def test_a_tokenizer_cannot_be_sampled(tiny: Path, tokenizer_run: Path) -> None:
    with pytest.raises(ValueError, match="VQGAN3DModule generates no videos"):
        main(["sample", "--config=tokenizer.yaml", f"--ckpt_path={tokenizer_run / 'checkpoints/last.ckpt'}"])


# Codes, computed once


@pytest.fixture(scope="session")
def codes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "codes"
    main(["tokenize", f"--config={world / 'mebt.yaml'}", f"--out={folder}"])
    return folder


def test_tokenize_keeps_the_codes_of_every_clip(tiny: Path, codes: Path, world: Path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    data = run(["fit", f"--config={world / 'mebt.yaml'}", "--trainer.fast_dev_run=1"]).datamodule
    for split, count in (("train", 8), ("val", 4)):
        tensors, about = read_codes(codes, split)
        assert tensors["index"].tolist() == list(range(count))
        assert about["tokenizer_digest"] == state_digest(tokenizer.state_dict())
        assert (about["codebook_size"], about["downsample"], about["fields"]) == (16, [4, 8, 8], {"codes": "uint8"})
        batches = list(data.ordered_dataloader(split))
        expected = torch.cat([tokenizer.encode(batch["video"]).codes for batch in batches])
        assert torch.equal(tensors["codes"], expected)
        assert torch.equal(tensors["label"], torch.cat([batch["label"] for batch in batches]))
        assert len(expected.unique()) > 8


def test_a_prior_trains_from_cached_codes_as_from_pixels(tiny: Path, codes: Path, mebt_run: Path) -> None:
    """The same clips, windows, masks and codes, so the same weights in the end."""
    trainer = run(["fit", "--config=mebt.yaml", "--data=TokenDataModule", f"--data.root={codes}"]).trainer
    cached = Path(str(trainer.log_dir))
    assert read_ledger(cached) == read_ledger(mebt_run)
    one, other = (torch.load(run_folder / "end.0.pt", weights_only=True) for run_folder in (cached, mebt_run))
    for name, tensor in other["state"].items():
        assert torch.equal(one["state"][name], tensor), name
    assert one["metrics"]["val/loss"] == other["metrics"]["val/loss"]


def test_codes_of_another_tokenizer_are_refused(tiny: Path, codes: Path, world: Path) -> None:
    words = ["--data=TokenDataModule", f"--data.root={codes}", f"--model.tokenizer={world / 'exported'}"]
    own, other = (state_digest(load_tokenizer(world / name).state_dict())[:12] for name in ("tokenizer", "exported"))
    with pytest.raises(ValueError, match=f"codes was made by tokenizer {own}, the model uses {other}"):
        main(["fit", "--config=mebt.yaml", *words])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--data.num_frames=32", r"holds tokens for num_frames=16, not 32 \(--data.num_frames\)"),
        ("--data.resolution=64", r"holds tokens for resolution=32, not 64 \(--data.resolution\)"),
    ],
)
def test_codes_of_another_geometry_are_refused(tiny: Path, codes: Path, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config=mebt.yaml", "--data=TokenDataModule", f"--data.root={codes}", word])


def test_missing_codes_are_named_with_the_command_that_makes_them(tiny: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No tokens at nowhere/cache.json.*longtake tokenize --config"):
        main(["fit", "--config=mebt.yaml", "--data=TokenDataModule", "--data.root=nowhere"])


def test_tokenize_refuses_to_overwrite(tiny: Path, codes: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in codes.rglob("*")}
    with pytest.raises(FileExistsError, match=r"codes exists already. Remove it, or choose another .*--out"):
        main(["tokenize", "--config=mebt.yaml", f"--out={codes}"])
    assert {path: path.stat().st_mtime_ns for path in codes.rglob("*")} == before


def test_tokenize_goes_on_with_what_is_there(tiny: Path, codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(codes, "codes")
    for name in ("train/index.json", "val/index.json", "val/chunk-0-0.bin"):
        Path("codes", name).unlink()
    kept = Path("codes/train/chunk-0-0.bin").stat().st_mtime_ns
    main(["tokenize", "--config=mebt.yaml", "--out=codes"])
    assert Path("codes/train/chunk-0-0.bin").stat().st_mtime_ns == kept
    for split in ("train", "val"):
        assert torch.equal(read_codes(Path("codes"), split)[0]["codes"], read_codes(codes, split)[0]["codes"])
    assert "Tokenizing" not in capsys.readouterr().err  # no bar where there is no terminal


def test_several_copies_can_be_kept(tiny: Path) -> None:
    main(["tokenize", "--config=mebt.yaml", "--out=codes", "--copies=2", "--shard_items=5", "--data.num_train=4"])
    assert len(read_codes(Path("codes"), "train")[0]["codes"]) == 8
    assert len(list(Path("codes/train").glob("*.bin"))) == 2  # 8 clips in shards of 5


def test_latents_of_a_tokenizer_that_decodes_its_entries_alone_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="The decoder of a VectorQuantizer has learned from its entries alone"):
        main(["tokenize", "--config=mebt.yaml", "--out=latents", "--latents=bf16"])


@pytest.mark.parametrize("experiment", ["mebt", "tokenizer"])
def test_tokenize_needs_a_generator_and_a_place(tiny: Path, experiment: str) -> None:
    words = [] if experiment == "mebt" else ["--out=codes"]
    with pytest.raises(ValueError, match="Give the experiment of a generator, and --out FOLDER"):
        main(["tokenize", f"--config={experiment}.yaml", *words])
    assert not Path("codes").exists()


def test_images_among_videos_are_refused_before_a_model_trains_on_black_frames(tiny: Path) -> None:
    parts = [
        f"--data.{part}{option}"
        for part, frames in (("videos", 16), ("images", 1))
        for option in ("=MovingShapesDataModule", f".num_frames={frames}", ".resolution=32")
    ]
    with pytest.raises(ValueError, match="MeBTModule, as it is set up, does not tell images from videos"):
        main(["fit", "--config=mebt.yaml", "--data=MixedDataModule", *parts, "--curriculum.schedule=longest"])


def test_a_bundle_samples_what_its_checkpoint_does(tiny: Path, mebt_run: Path) -> None:
    """Without the experiment's file, and with the tokenizer that it holds."""
    checkpoint = mebt_run / "checkpoints/last.ckpt"
    main(["export", str(checkpoint), "bundle"])
    main(["sample", "--config=mebt.yaml", f"--ckpt_path={checkpoint}", "--num_samples=1", "--out=one"])
    Path("mebt.yaml").unlink()
    main(["sample", "--bundle=bundle", "--num_samples=1", "--out=other"])
    one, other = (Path(folder, "seed=000000.mp4").read_bytes() for folder in ("one", "other"))
    assert one == other
    with pytest.raises(FileNotFoundError, match="nowhere is no bundle of a generator"):
        main(["sample", "--bundle=nowhere"])
