"""Every published experiment: it parses, has the published size, and makes a step at toy size."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml

import lightning_modules
from callbacks import ShortToLongCurriculum
from experiments.cli import ROOT, main
from experiments.lightning_cli import run
from lightning_modules import VQGAN3DModule
from models.tokenizers import LPIPS, StyleGANDiscriminator
from models.tokenizers.inflation import inflate
from models.weights import build

# COMMIT's, TATS' and W.A.L.T's have test files of their own
FILES = {
    file.stem: file
    for file in sorted((ROOT / "experiments").glob("*.yaml"))
    if not file.stem.startswith(("commit_", "demo_commit", "walt_", "demo_walt", "tats_", "demo_tats", "vqgan3d_stft"))
}
UCF101_FRAMES = 36


@functools.cache
def resolved(name: str, *overrides: str) -> dict[str, Any]:
    """What `longtake fit --print_config` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        main(["fit", f"--config={FILES[name]}", *overrides, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(out.getvalue())


@pytest.fixture(scope="session")
def ucf101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few seconds of noise in the folders and lists of UCF-101."""
    root = tmp_path_factory.mktemp("ucf101")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    names = [f"Archery/v_Archery_g0{group}_c01.avi" for group in (1, 2, 3)]
    (lists / "classInd.txt").write_text("1 Archery\n")
    (lists / "trainlist01.txt").write_text(f"{names[0]} 1\n{names[1]} 1\n")
    (lists / "testlist01.txt").write_text(f"{names[2]}\n")
    (root / "UCF-101/Archery").mkdir(parents=True)
    for name in names:
        with av.open(str(root / "UCF-101" / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(UCF101_FRAMES):
                image = np.full((48, 64, 3), 5 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    return root


@pytest.fixture(scope="session")
def bair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records of BAIR's for each split, grey."""
    from datamodules.bair import NUM_FRAMES
    from datamodules.tfrecord import write_records
    from experiments.make_layouts import bair_record

    root = tmp_path_factory.mktemp("bair")
    record = bair_record(np.full((NUM_FRAMES, 64, 64, 3), 100, np.uint8))
    for split in ("train", "test"):
        folder = root / "softmotion30_44k" / split
        folder.mkdir(parents=True)
        write_records(folder / "traj_0_to_1.tfrecords", [record] * 2)
    return root


def toy_size(config: dict[str, Any], tokenizer: Path, data_root: Path) -> list[str]:
    """Flags that shrink an experiment, and leave its kind of model, data, curriculum and precision as they are."""
    data, model = last_name(config["data"]), last_name(config["model"])
    flags = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.fast_dev_run": "true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "data.resolution": 32,
        "data.batch_size": 2,
        "data.num_frames": min(config["data"]["init_args"]["num_frames"], 32),
    }
    flags |= {
        "UCF101DataModule": {"data.root": data_root, "data.num_workers": 0},
        "FramesDataModule": {
            "data.root": data_root / "UCF-101/Archery",
            "data.num_workers": 0,
            "data.frame_stride": 1,
            "data.train_folder": "train",  # there is none: the names decide which of the videos validate
            "data.val_folder": "null",
        },
        "MovingShapesDataModule": {"data.num_train": 4, "data.num_val": 2},
        "BAIRDataModule": {"data.root": data_root, "data.num_workers": 0},
    }[data]
    flags |= {
        "MeBTModule": {
            "model.tokenizer": tokenizer,
            "model.codebook_size": 16,
            "model.dim": 16,
            "model.num_heads": 2,
            "model.num_latents": 4,
            "model.sampling.num_steps": 2,
            "model.sampling.bootstrap_passes": 0,
            "model.sampling.revise_rounds": 0,
        },
        "VQGAN3DModule": toy_tokenizer_size(config),
    }[model]
    return [f"--{key}={value}" for key, value in flags.items()]


def last_name(section: dict[str, Any]) -> str:
    """Of a section's class."""
    return section["class_path"].split(".")[-1]


def toy_tokenizer_size(config: dict[str, Any]) -> dict[str, Any]:
    """Those flags of a tokenizer; it keeps its downsampling, its dimensions and its kinds of quantizer and losses."""
    if last_name(config["model"]) != "VQGAN3DModule":
        return {}
    parts = config["model"]["init_args"]["tokenizer"]["init_args"]
    encoder, quantizer = last_name(parts["encoder"]), last_name(parts["quantizer"])
    frames = config["data"]["init_args"]["num_frames"]
    toy_frames = {1: 1, 17: 5}.get(frames, 8)
    flags: dict[str, Any] = {
        "data.num_frames": toy_frames,
        "model.tokenizer.encoder.base_channels": 4,
        "model.tokenizer.decoder.base_channels": 4,
        "model.discriminator_start_step": 0,
    }
    if quantizer in ("VectorQuantizer", "GradientVectorQuantizer"):
        flags["model.tokenizer.quantizer.codebook_size"] = 16
    if encoder == "TimeAgnosticEncoder":
        dim = {"model.tokenizer.quantizer.dim": 8} if quantizer == "VectorQuantizer" else {}
        return flags | dim | {"model.discriminator_channels": 4}
    for network in ("encoder", "decoder"):
        flags |= {f"model.tokenizer.{network}.{name}": n for name, n in (("norm_groups", 2), ("num_res_blocks", 1))}
    discriminator = {"base_channels": 2, "num_frames": toy_frames, "resolution": 32}
    return flags | {f"model.video_discriminator.{name}": value for name, value in discriminator.items()}


@pytest.mark.parametrize("name", FILES)
def test_experiment_makes_a_step_and_a_validation_at_toy_size(
    name: str, world: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data_root = request.getfixturevalue("bair" if "bair" in name else "ucf101")
    flags = toy_size(resolved(name), world / "tokenizer", data_root)
    trainer = run(["fit", f"--config={FILES[name]}", *flags]).trainer
    assert trainer.global_step == 1
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # a trial leaves nothing behind


# two of a kind: it takes a second each
@pytest.mark.parametrize("name", ["mebt_128f", "mebt_sky_16f"])
def test_experiment_resolves_alike_with_and_without_its_tokenizer(name: str, world: Path) -> None:
    with_it = resolved(name, f"--model.tokenizer={world / 'tokenizer'}")
    without = resolved(name, f"--model.tokenizer={world / 'nowhere'}")
    with_it["model"]["init_args"].pop("tokenizer")
    without["model"]["init_args"].pop("tokenizer")
    assert with_it == without


@pytest.mark.parametrize("name", FILES)
def test_experiment_is_named_after_its_file(name: str) -> None:
    assert resolved(name)["run_name"] == name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mebt_16f", 337_177_600),
        ("mebt_128f", 344_517_632),
        ("mebt_128f_released", 344_517_632),
        ("mebt_sky_16f", 337_177_600),
        ("mebt_sky_128f", 344_517_632),
        ("mebt_taichi_16f", 337_177_600),
        ("mebt_taichi_128f", 344_517_632),
    ],
)
def test_prior_has_the_published_size(name: str, parameters: int) -> None:
    config = resolved(name)
    data = config["data"]["init_args"]
    prior = getattr(lightning_modules, config["model"]["class_path"].split(".")[-1])
    with torch.device("meta"):
        module = prior(**config["model"]["init_args"], num_frames=data["num_frames"], resolution=data["resolution"])
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "tokenizer", "discriminators", "latents"),
    [
        ("vqgan3d_ucf101", 23_652_227, 13_824_386, (4, 16, 16)),
        ("vqgan3d_256", 95_622_275, 13_824_386, (4, 16, 16)),
        ("vqgan3d_magvit_b_ucf101", 40_579_843, 15_339_457, (4, 16, 16)),
        ("vqgan3d_magvit_b_ucf101_released", 40_579_843, 15_339_457, (4, 16, 16)),
        ("vqgan3d_magvit_l_ucf101", 157_811_971, 61_341_569, (4, 16, 16)),
        ("vqgan3d_magvit_b_bair", 36_596_355, 11_734_465, (4, 16, 16)),
        ("vqgan3d_magvit_l_bair", 141_882_371, 46_922_625, (4, 16, 16)),
        ("vqgan2d_magvit_b_ucf101", 13_809_667, 5_972_545, (1, 16, 16)),
        ("vqgan2d_magvit_l_ucf101", 53_104_387, 23_880_833, (1, 16, 16)),
        ("vqgan3d_magvit2_ucf101", 370_547_349, 61_341_569, (5, 16, 16)),
        ("vqgan3d_magvit2_k4_ucf101", 376_003_221, 61_341_569, (5, 16, 16)),
        ("vqgan2d_magvit2_ucf101", 112_021_653, 23_880_833, (1, 16, 16)),
        ("vqgan3d_walt_ucf101", 375_829_131, 61_341_569, (5, 16, 16)),
    ],
)
def test_tokenizer_has_the_published_size(
    name: str, tokenizer: int, discriminators: int, latents: tuple[int, int, int]
) -> None:
    config = resolved(name)
    data, options = config["data"]["init_args"], dict(config["model"]["init_args"])
    with torch.device("meta"):
        for part in ("tokenizer", "image_discriminator", "video_discriminator"):
            options[part] = options[part] and build(options[part])
        module = VQGAN3DModule(**options)
    assert parameters(module.tokenizer) == tokenizer
    assert parameters(module) == tokenizer + discriminators
    assert module.tokenizer.latent_shape(data["num_frames"], data["resolution"], data["resolution"]) == latents
    discriminator = module.video_discriminator
    if isinstance(discriminator, StyleGANDiscriminator):
        assert discriminator.clip_size == (data["num_frames"], data["resolution"], data["resolution"])


def test_tats_trains_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        lpips = LPIPS()
    assert 23_652_227 + 13_824_386 + parameters(lpips) == 52_192_773


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("vqgan2d")])
def test_a_2d_tokenizer_can_be_inflated_to_its_3d_twin(name: str) -> None:
    networks = {}
    for dimensions in ("2d", "3d"):
        config = resolved(name.replace("2d", dimensions))["model"]["init_args"]
        with torch.device("meta"):
            networks[dimensions] = build(config["tokenizer"])
    inflation = config["inflation"]
    assert inflation == ("last" if "magvit2" in name else "central")
    assert inflate(networks["3d"], networks["2d"].state_dict(), inflation) == []


def mean_lengths(name: str, steps: list[int]) -> list[float]:
    """Mean number of latent frames in training at some steps of an experiment."""
    config = resolved(name)
    curriculum = ShortToLongCurriculum(**config["curriculum"])
    num_frames = config["data"]["init_args"]["num_frames"]
    curriculum.bind(config["trainer"]["max_steps"], num_frames, frames_per_latent=4, seed=config["seed_everything"])
    return [curriculum.expected_frames_at(step) / 4 for step in steps]


def test_mebt_128f_trains_on_the_full_length_for_the_last_thirty_percent() -> None:
    steps = resolved("mebt_128f")["trainer"]["max_steps"]
    last = list(range(steps * 7 // 10, steps, steps // 100))
    assert min(mean_lengths("mebt_128f", [*last, steps - 1])) >= 31
    assert max(mean_lengths("mebt_128f", [0, steps // 10])) < 8  # short before


def test_the_released_schedule_never_reaches_the_full_length() -> None:
    assert resolved("mebt_128f_released")["trainer"]["max_steps"] == 2_000_000
    lengths = mean_lengths("mebt_128f_released", [*range(0, 2_000_000, 50_000), 1_999_999])
    assert max(lengths) < 31
    assert lengths[-1] == pytest.approx(21, abs=0.1)
