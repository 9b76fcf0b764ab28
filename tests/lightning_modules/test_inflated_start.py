"""A 3D run that starts from a 2D tokenizer: new runs do, runs that go on do not."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules import VQGAN3DModule
from models.random import keyed_generator
from models.tokenizers import StyleGANDiscriminator
from models.tokenizers.inflation import Inflation, inflate
from models.weights import build, save_bundle

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended"),
]


def config(is_2d: bool) -> dict[str, Any]:
    part = {"base_channels": 2, "downsample": [1 if is_2d else 2, 2, 2], "is_2d": is_2d}
    return {
        "class_path": "models.tokenizers.VQGAN3D",
        "init_args": {
            "encoder": {"class_path": "models.tokenizers.TimeAgnosticEncoder", "init_args": part},
            "quantizer": {
                "class_path": "models.tokenizers.GradientVectorQuantizer",
                "init_args": {"codebook_size": 8, "dim": 3},
            },
            "decoder": {"class_path": "models.tokenizers.TimeAgnosticDecoder", "init_args": part},
        },
    }


def module(is_2d: bool, seed: int, **options: Any) -> VQGAN3DModule:
    torch.manual_seed(seed)
    frames = 1 if is_2d else 4
    discriminator = StyleGANDiscriminator(frames, 8, base_channels=2, channel_multipliers=(2, 2), is_2d=is_2d)
    toy = {"perceptual_weight": 0.0, "image_gan_weight": 0.0, "discriminator_start_step": 0, "lr": 1e-2}
    built = VQGAN3DModule(build(config(is_2d)), video_discriminator=discriminator, **toy, **options)
    built.hparams["tokenizer"] = config(is_2d)  # as the command line records it
    return built


class Start(Callback):
    """Keeps the weights that an average of the weights would begin with."""

    state: dict[str, Tensor]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = copy.deepcopy(pl_module.state_dict())


def fit(
    model: VQGAN3DModule, max_steps: int = 1, frames: int = 4, ckpt_path: Path | None = None
) -> tuple[Trainer, Start]:
    start = Start()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**quiet, max_steps=max_steps, accelerator="cpu", enable_model_summary=False, callbacks=[start])
    batches = [{"video": torch.rand(2, 3, frames, 8, 8, generator=keyed_generator(i)) * 2 - 1} for i in range(4)]
    trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer, start


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "vqgan2d"
    save_bundle(folder, module(True, 1).tokenizer, config(True), {"source": "a test"})
    return folder


@pytest.mark.parametrize("inflation", ["central", "last"])
def test_a_new_run_starts_from_the_bundle(bundle: Path, inflation: Inflation) -> None:
    model = module(False, 2, inflate_from=str(bundle), inflation=inflation)
    expected = copy.deepcopy(model.tokenizer)
    inflate(expected, module(True, 1).tokenizer.state_dict(), inflation)
    scratch = {name: tensor.clone() for name, tensor in model.video_discriminator.state_dict().items()}
    _, start = fit(model)
    assert all(torch.equal(start.state[f"tokenizer.{name}"], value) for name, value in expected.state_dict().items())
    assert all(torch.equal(start.state[f"video_discriminator.{name}"], value) for name, value in scratch.items())


@pytest.mark.parametrize("inflation", ["central", "last"])
def test_a_checkpoint_brings_its_discriminator_along(tmp_path: Path, inflation: Inflation) -> None:
    images = module(True, 1)
    fit(images, frames=1)[0].save_checkpoint(tmp_path / "images.ckpt")
    _, start = fit(module(False, 2, inflate_from=str(tmp_path / "images.ckpt"), inflation=inflation))
    started = start.state["video_discriminator.conv_first.conv.weight"][:, :, 1]
    ours = images.video_discriminator.conv_first.conv.weight[:, :, 0]
    assert torch.equal(started, ours) == (inflation == "central")  # MAGVIT-v2 trains it from scratch


def test_a_run_that_goes_on_has_no_need_of_the_2d_tokenizer(bundle: Path, tmp_path: Path) -> None:
    model = module(False, 2, inflate_from=str(bundle))
    run, _ = fit(model)
    run.save_checkpoint(tmp_path / "run.ckpt")
    for source in (bundle, tmp_path / "gone"):
        resumed = module(False, 3, inflate_from=str(source))
        _, start = fit(resumed, max_steps=2, ckpt_path=tmp_path / "run.ckpt")
        assert resumed.global_step == 2
        assert all(torch.equal(start.state[name], value) for name, value in model.state_dict().items())


def test_a_new_run_without_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No 2D tokenizer at .*gone \(--model\.inflate_from\)"):
        fit(module(False, 2, inflate_from=str(tmp_path / "gone")))


def test_what_starts_from_scratch_is_named(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = module(False, 2, inflate_from=str(bundle))
    model.tokenizer.decoder.conv_last.extra = torch.nn.Parameter(torch.zeros(1))
    with caplog.at_level(logging.WARNING):
        fit(model)
    assert "holds nothing for decoder.conv_last.extra: they start from scratch" in caplog.text
