"""W.A.L.T's experiments: published sizes, a falling loss at toy size, and the commands on a run of theirs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_experiments import EVERY_RUN, MEBT_MODULE, TOKENIZER, read_video, write_experiment

from datamodules import TokenDataModule
from datamodules.tokens import read_codes
from experiments.cli import ROOT, main
from lightning_modules import WALTModule
from models.weights import build, load_tokenizer, save_bundle

FILES = {file.stem: file for file in sorted((ROOT / "experiments").glob("*walt*.yaml")) if "vqgan" not in file.stem}
FILES = {name: file for name, file in FILES.items() if "tokenizer" not in name}


def merged(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        into[key] = merged(into[key], value) if isinstance(value, dict) and isinstance(into.get(key), dict) else value
    return into


def content(name: str) -> dict[str, Any]:
    """An experiment with what it inherits; read from the files alone, since not every data module is installed."""
    files = [FILES[name]]
    while base := yaml.safe_load(files[0].read_text()).get("base"):
        files.insert(0, files[0].parent / base)
    whole: dict[str, Any] = {}
    for file in files:
        merged(whole, yaml.safe_load(file.read_text()))
    return whole


def curve(run_folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def test_all_experiments_are_found() -> None:
    assert FILES.keys() == {
        "demo_walt",
        "demo_walt_sr",
        "walt_3b_text",
        "walt_3b_text_9x16",
        "walt_imagenet256",
        "walt_l_k600",
        "walt_l_text",
        "walt_l_ucf101",
        "walt_text_2x",
        "walt_text_4x",
        "walt_xl_ucf101",
    }


@pytest.mark.parametrize(
    ("name", "parameters", "reported", "tokens"),
    [
        ("walt_l_ucf101", 313_238_408, 313e6, 1280),
        ("walt_xl_ucf101", 460_019_080, 460e6, 1280),
        ("walt_l_k600", 313_143_176, 313e6, 1280),
        ("walt_imagenet256", 459_815_304, 460e6, 1024),
        ("walt_l_text", 419_302_280, 419e6, 1280),
        ("walt_3b_text", 3_101_118_024, 3.09e9, 1280),
        ("walt_3b_text_9x16", 3_102_445_512, 3.09e9, 2240),
        ("walt_text_2x", 1_302_582_464, 1.3e9, 2240),
        ("walt_text_4x", 421_758_496, 419e6, 2240),
    ],
)
def test_network_has_the_published_size(name: str, parameters: int, reported: float, tokens: int) -> None:
    config = content(name)
    data = config["data"]["init_args"]
    with torch.device("meta"):
        module = WALTModule(
            **config["model"]["init_args"], num_frames=data["num_frames"], resolution=data["resolution"]
        )
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == parameters
    assert f"{parameters:,}" in FILES[name].read_text() or name.endswith("9x16")
    assert count == pytest.approx(reported, rel=0.01)
    assert module.network.num_tokens == tokens
    windows = {(1, 16, 28), (5, 8, 14)} if tokens == 2240 else {(1, 16, 16), (5, 8, 8)}
    if name != "walt_imagenet256":
        assert {layer.window for layer in module.network.layers} == windows


@pytest.mark.parametrize(
    ("name", "steps", "batch", "optimizer", "lr", "schedule", "decay"),
    [
        ("walt_imagenet256", 437_000, 1024, "adamw", 5e-4, "cosine", True),
        ("walt_xl_ucf101", 60_000, 256, "adamw", 5e-4, "cosine", True),
        ("walt_l_k600", 270_000, 512, "adamw", 5e-4, "cosine", True),
        ("walt_l_text", 550_000, 512, "adafactor", 2e-4, "cosine", False),
        ("walt_3b_text", 550_000, 512, "adafactor", 2e-4, "cosine", False),
        ("walt_text_2x", 675_000, 512, "adafactor", 5e-4, "cosine", False),
        ("walt_text_4x", 275_000, 512, "adafactor", 5e-4, "cosine", False),
        ("walt_3b_text_9x16", 250_000, 512, "adafactor", 5e-5, "constant", False),
    ],
)
def test_training_has_the_published_numbers(
    name: str, steps: int, batch: int, optimizer: str, lr: float, schedule: str, decay: bool
) -> None:
    """Tables 6 and 8; self-conditioning and rank are the module's defaults."""
    config = content(name)
    model = config["model"]["init_args"]
    assert config["trainer"]["max_steps"] == steps
    assert batch % config["data"]["init_args"]["batch_size"] == 0
    assert (model.get("optimizer", "adamw"), model["lr"], model.get("lr_schedule", "cosine")) == (
        optimizer,
        lr,
        schedule,
    )
    assert ("ema" in config) == decay
    assert model.get("adaln_rank", 2) == (None if name == "walt_imagenet256" else 2)
    assert "self_conditioning" not in model


TOY_DATA = {"resolution": 32, "batch_size": 4, "num_train": 64, "num_val": 16, "texture": 0.0}
TOY_MODEL = {
    "latent_dim": 12,
    "depth": 2,
    "dim": 32,
    "num_heads": 4,
    "mlp_dim": 64,
    "spatiotemporal_window": [2, 2],
    "lr": 3e-3,  # so that the first step does not do it all
    "warmup_steps": 0,
    "statistics_clips": 16,
    "downsample": [4, 8, 8],
    "sampling": {"num_steps": 2},
}


def toy_size(name: str, tokenizer: Path) -> dict[str, Any]:
    """What makes an experiment run on the embedded shapes, with everything else as it is."""
    config = content(name)
    data, model = config["data"], config["model"]["init_args"]
    wide = {"width": 64} if "width" in model else {}
    frames = min(data["init_args"]["num_frames"], 9)
    shapes = {
        "class_path": "wide_shapes.WideShapesDataModule" if wide else "MovingShapesDataModule",
        "init_args": {**TOY_DATA, **wide, "num_frames": frames, "captions": "text" in model},
    }
    if data["class_path"] == "MixedDataModule":
        stills = {**shapes["init_args"], "num_frames": 1, "stills": True}
        parts = {"videos": shapes, "images": {**shapes, "init_args": stills}}
        mixed = {"num_frames": frames, "images_per_stack": 3, "resolution": 32, "batch_size": 4, "num_workers": 0}
        shapes = {"class_path": "MixedDataModule", "init_args": {**mixed, **parts}}
    changes = {**TOY_MODEL, **wide, "tokenizer": str(tokenizer)}
    if "text" in model:
        changes |= {"text": "bytes", "text_dim": 32, "text_tokens": 24, "sampling": {"num_steps": 2}}
    if "low_res_tokenizer" in model:
        changes |= {"low_res_tokenizer": str(tokenizer), "patch_size": 2, "spatiotemporal_window": [1, 2]}
    trainer = {**EVERY_RUN["trainer"], "max_steps": 20, "val_check_interval": 1, "strategy": "auto"}
    return {
        "data": shapes,
        "model": {"init_args": changes},
        "trainer": trainer | {"precision": "32-true", "limit_val_batches": 1, "callbacks": None},
        "checkpoint": {"every_n_train_steps": 20},
        "samples": {"every_n_steps": 0, "at_validation": False, "num_videos": 1},
        "ema": {"decay": 0.0},  # of 20 steps, an average would remember the beginning alone
    }


def train(name: str, toy: dict[str, Any]) -> Path:
    Path("toy.yaml").write_text(yaml.safe_dump(toy))
    main(["fit", f"--config={FILES[name]}", "--config=toy.yaml"])
    return Path("runs") / name / "version_0"


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_experiment_learns_at_toy_size(
    name: str, continuous_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toy = toy_size(name, continuous_tokenizer)
    if "init_from" in content(name)["model"]["init_args"]:
        run = train("walt_3b_text", toy_size("walt_3b_text", continuous_tokenizer))
        toy["model"]["init_args"]["init_from"] = str(run / "checkpoints/last.ckpt")
    run = train(name, toy)
    losses = curve(run, "train/loss")
    assert len(losses) == 20
    if "init_from" not in toy["model"]["init_args"]:
        assert losses[0] == pytest.approx(1, abs=0.4)  # the untrained network predicts nothing
    validation = curve(run, "val/loss")  # the same noise each time, unlike training's
    assert min(validation[-3:]) < 0.99 * validation[0], validation


# The commands


@pytest.fixture
def walt(continuous_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `walt.yaml`, six steps of a W.A.L.T for classes and known frames."""
    monkeypatch.chdir(tmp_path)
    init_args = {**TOY_MODEL, "tokenizer": str(continuous_tokenizer), "num_classes": 12, "frame_prediction": 0.5}
    data = {**EVERY_RUN["data"], "init_args": {**EVERY_RUN["data"]["init_args"], "num_frames": 9}}
    model = {"class_path": "WALTModule", "init_args": {**init_args, "dim": 16}}
    write_experiment(tmp_path / "walt.yaml", EVERY_RUN, data=data, model=model, samples={"at_validation": False})
    return tmp_path


def test_a_resumed_run_is_the_uninterrupted_one_and_its_samples_follow_from_their_seeds(walt: Path) -> None:
    main(["fit", "--config=walt.yaml"])
    straight = walt / "runs/walt/version_0"
    assert {path.name for path in (straight / "checkpoints").iterdir()} >= {"step=4.ckpt", "step=6.ckpt"}
    main(["fit", "--config=walt.yaml", f"--ckpt_path={straight / 'checkpoints/step=4.ckpt'}"])
    ours, theirs = (
        torch.load(walt / f"runs/walt/version_{version}/checkpoints/step=6.ckpt", weights_only=True)
        for version in (0, 1)
    )
    assert ours["state_dict"].keys() == theirs["state_dict"].keys() >= {"latent_mean", "latent_std"}
    for name, tensor in ours["state_dict"].items():
        assert torch.equal(tensor, theirs["state_dict"][name]), name

    checkpoint = f"--ckpt_path={straight / 'checkpoints/step=6.ckpt'}"
    sample = ["sample", "--config=walt.yaml", checkpoint, "--num_frames=13"]
    main([*sample, "--out=all", "--num_samples=3", "--batch_size=2", "--first_seed=5"])
    main([*sample, "--out=one", "--num_samples=1", "--first_seed=6"])
    video = read_video(walt / "all/seed=000006.mp4")
    assert video.shape == (13, 32, 32, 3)
    difference = video.astype(int) - read_video(walt / "one/seed=000006.mp4")
    assert abs(difference).max() <= 8  # matrix products round differently in other batches, and the codec adds to it
    about = json.loads((walt / "all/samples.json").read_text())
    assert about["sampling"]["num_steps"] == 2
    assert about["seeds"] == [5, 6, 7]


def test_one_tokenizer_and_one_cache_serve_models_of_codes_and_of_what_is_rounded_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = {
        "encoder": {"time_placement": "causal", "base_channels": 4},
        "decoder": {"time_placement": "causal", "base_channels": 4},
        "quantizer": {"levels": [5, 5, 5]},
    }
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer["init_args"]["quantizer"]["class_path"] = "models.tokenizers.FiniteScalarQuantizer"
    tokenizer["init_args"]["quantizer"]["init_args"] = {}
    for part, arguments in parts.items():
        tokenizer["init_args"][part]["init_args"] |= arguments
    save_bundle(tmp_path / "tokenizer", build(tokenizer).eval(), tokenizer, {"source": "a test"})
    data = {**EVERY_RUN["data"], "init_args": {**EVERY_RUN["data"]["init_args"], "num_frames": 9}}
    mebt = {**MEBT_MODULE["init_args"], "codebook_size": 125, "tokenizer": "tokenizer"}
    walt = {**TOY_MODEL, "tokenizer": "tokenizer", "latent_dim": 3, "unrounded": True}
    for name, arguments in (("MeBT", mebt), ("WALT", walt)):
        model = {"class_path": f"{name}Module", "init_args": arguments}
        write_experiment(tmp_path / f"{name}.yaml", EVERY_RUN, data=data, model=model)
    main(["tokenize", "--config=MeBT.yaml", "--out=tokens", "--latents=fp32"])
    for name in ("MeBT", "WALT"):
        main(["fit", f"--config={name}.yaml", "--data=TokenDataModule", "--data.root=tokens"])
    checkpoint = Path("runs/WALT/version_0/checkpoints/last.ckpt")
    main(["sample", "--config=WALT.yaml", f"--ckpt_path={checkpoint}", "--num_samples=2", "--out=samples"])
    assert read_video(Path("samples/seed=000000.mp4")).shape == (9, 32, 32, 3)

    codes, _ = read_codes(Path("tokens"), "train")
    cached = TokenDataModule("tokens", num_frames=9, resolution=32, batch_size=8)
    cached.setup("fit")
    latents = next(iter(cached.ordered_dataloader("train")))["latents"]
    frozen = load_tokenizer(Path("tokenizer"))
    assert torch.equal(frozen.latents_to_codes(latents), codes["codes"])
    assert not torch.equal(frozen.codes_to_latents(codes["codes"]), latents)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.testing.assert_close(state["latent_mean"], latents.mean(dim=(0, 2, 3, 4)))

    with pytest.raises(ValueError, match=r"is not continuous: it has 125 codes.*--model.unrounded=true"):
        main(["fit", "--config=WALT.yaml", "--model.unrounded=false"])

    enlarger = WALTModule(num_frames=9, resolution=32, **(walt | {"low_res_tokenizer": "tokenizer", "sampling": {}}))
    enlarger.load_tokenizer()
    assert enlarger.tokenizer.codebook_size is enlarger.low_res_tokenizer.codebook_size is None

    mebt = ["sample", "--config=MeBT.yaml", "--ckpt_path=runs/MeBT/version_0/checkpoints/last.ckpt", "--out=more"]
    with pytest.raises(ValueError, match=r"num_frames=13 cannot be generated: on a causal.* 1 \+ 4k frames, 9 at most"):
        main([*mebt, "--num_frames=13"])
    with pytest.raises(ValueError, match="The task central_inpainting needs a time-agnostic tokenizer"):
        main([*mebt, "--task=central_inpainting"])
    main([*mebt, "--num_frames=5", "--num_samples=1"])
    assert read_video(Path("more/seed=000000.mp4")).shape == (5, 32, 32, 3)


def test_a_clip_length_that_does_not_fit_is_one_message(walt: Path) -> None:
    with pytest.raises(ValueError, match=r"num_frames=16 does not fit a causal tokenizer: it takes 1 \+ 4k frames"):
        main(["fit", "--config=walt.yaml", "--data.num_frames=16"])


def test_guidance_without_condition_dropout_is_one_message(walt: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a model without condition"):
        main(["fit", "--config=walt.yaml", "--model.sampling.guidance_scale=2", "--model.condition_dropout=0"])


def test_one_command_runs_a_cascade_from_checkpoints(
    continuous_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = []
    for name, resolution in (("demo_walt", 32), ("demo_walt_sr", 64)):
        toy = toy_size(name, continuous_tokenizer)
        toy["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
        toy["data"]["init_args"]["resolution"] = resolution
        checkpoints.append(str(train(name, toy) / "checkpoints/last.ckpt"))
    command = ["cascade", *checkpoints, "--num_samples=3", "--batch_size=2", "--num_frames=13", "--first_seed=4"]
    main([*command, "--out=made", "--label=3"])
    assert [read_video(tmp_path / f"made/seed=00000{seed}.mp4").shape for seed in (4, 5, 6)] == [(13, 64, 64, 3)] * 3
    assert {path.name for path in Path("made").glob("*.png")} == {"stage_0.png", "stage_1.png"}
    assert json.loads(Path("made/samples.json").read_text())["checkpoints"] == checkpoints
    for arguments, message in (
        (checkpoints[:1], "at least one super-resolution stage: give two checkpoints"),
        (checkpoints[::-1], "is a super-resolution stage: give the base model first"),
        ([*checkpoints, "--tokenizers", "one"], "2 checkpoints have as many tokenizers, not 1"),
        ([*checkpoints, "--text=a cat"], "No stage reads text"),
        ([*checkpoints, "--label=12"], "this model has 12 classes, from 0 on"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["cascade", *arguments, "--out=made"])
