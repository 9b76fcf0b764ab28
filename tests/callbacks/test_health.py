"""What goes wrong with tokenizers, brought about on purpose, and found within 50 steps."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.health import TokenizerHealth
from lightning_modules.vqgan3d import VQGAN3DModule
from models.random import keyed_generator
from models.tokenizers import (
    VQGAN3D,
    FiniteScalarQuantizer,
    GradientVectorQuantizer,
    Quantizer,
    TimeAgnosticDecoder,
    TimeAgnosticEncoder,
    VectorQuantizer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]


def module(quantizer: Quantizer | None = None, **options: Any) -> VQGAN3DModule:
    torch.manual_seed(0)
    tokenizer = VQGAN3D(
        TimeAgnosticEncoder(base_channels=2, downsample=(2, 2, 2)),
        quantizer or VectorQuantizer(8, 3),
        TimeAgnosticDecoder(base_channels=2, downsample=(2, 2, 2)),
    )
    toy = {"perceptual_weight": 0.0, "image_gan_weight": 0.0, "video_gan_weight": 0.0, "lr": 1e-3}
    return VQGAN3DModule(tokenizer, **(toy | options))


def video(key: int) -> Tensor:
    return torch.rand(2, 3, 4, 8, 8, generator=keyed_generator(key)) * 2 - 1


def loader(videos: list[Tensor]) -> DataLoader:
    return DataLoader([{"video": v, "index": torch.arange(2)} for v in videos], batch_size=None)


class Recorder(Callback):
    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.steps: list[int] = []
        self.logged: list[set[str]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.states.append(copy.deepcopy(module.state_dict()))
        self.steps.append(trainer.global_step)
        self.logged.append(set(trainer.callback_metrics))


def trainer(*callbacks: Callback, max_steps: int = 50) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        max_steps=max_steps, callbacks=list(callbacks), accelerator="cpu", enable_model_summary=False, **quiet
    )


def fit(tokenizer: VQGAN3DModule, videos: list[Tensor], max_steps: int = 50, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer(TokenizerHealth(**options), recorder, max_steps=max_steps).fit(tokenizer, loader(videos))
    return recorder


def healthy() -> list[Tensor]:
    return [video(key) for key in range(50)]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "callbacks.health")
    return caplog


def messages(warnings: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in warnings.records if record.name == "callbacks.health"]


def test_a_healthy_training_is_left_in_peace(warnings: pytest.LogCaptureFixture) -> None:
    watched, alone = module(), module()
    recorder = fit(watched, healthy(), every_n_steps=2)
    trainer(max_steps=50).fit(alone, loader(healthy()))
    assert messages(warnings) == []
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in watched.state_dict().items())
    assert {"train/window_perplexity", "train/window_usage", "train/dead_codes"} <= recorder.logged[-1]


def test_pixels_up_to_255_are_told_at_the_first_batch(warnings: pytest.LogCaptureFixture) -> None:
    fit(module(), [(v + 1) * 127.5 for v in healthy()][:1])
    assert any("values reach from" in text and "not from -1 to 1" in text for text in messages(warnings))


def test_videos_without_negative_values_are_suspicious(warnings: pytest.LogCaptureFixture) -> None:
    fit(module(), [v.abs() for v in healthy()])
    (message,) = messages(warnings)
    assert "are they in [0, 1] instead of [-1, 1]?" in message


def with_nan(*where: int) -> list[Tensor]:
    videos = healthy()
    for i in where:
        videos[i][0, 0, 0, 0, 0] = torch.nan
    return videos


def test_a_batch_of_nan_is_found_though_no_look_was_due(warnings: pytest.LogCaptureFixture) -> None:
    fit(module(), with_nan(13), max_steps=20)
    (message,) = messages(warnings)  # once, not at each look
    assert "Not finite:" in message
    assert "grad_norm" in message
    assert "--health.on_bad_step=skip" in message


def test_a_bad_step_can_be_skipped_as_if_it_had_not_been(warnings: pytest.LogCaptureFixture) -> None:
    tokenizer = module(image_gan_weight=1.0, discriminator_start_step=0, discriminator_channels=2)
    recorder = fit(tokenizer, with_nan(0, 2), max_steps=4, on_bad_step="skip")
    assert recorder.steps == [0, 1, 1, 2, 3, 4]
    before, after = recorder.states[1:3]
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # codebook and batch norm, too
    assert all(torch.isfinite(value.float()).all() for value in recorder.states[-1].values())
    assert recorder.states[1]["tokenizer.quantizer.initialized"]  # from the first batch that was sound
    assert not recorder.states[0]["tokenizer.quantizer.initialized"]
    assert "Step 1 is skipped: not finite, or a spike: loss is nan, grad_norm_disc is nan" in messages(warnings)[-1]


def test_accumulated_batches_are_skipped_together() -> None:
    tokenizer = module(accumulate_grad_batches=2)
    recorder = fit(tokenizer, with_nan(3), max_steps=3, on_bad_step="skip")
    assert recorder.steps == [0, 1, 1, 1, 1, 2, 2, 3]
    assert all(torch.equal(value, recorder.states[3][name]) for name, value in recorder.states[1].items())


def test_too_many_bad_steps_stop_the_run() -> None:
    tokenizer = module()
    with pytest.raises(RuntimeError, match=r"3 steps in a row had gradients .*\(--health.max_bad_steps\)"):
        fit(tokenizer, with_nan(1, 3, 4, 5), on_bad_step="skip", max_bad_steps=3)
    assert all(torch.isfinite(value.float()).all() for value in tokenizer.state_dict().values())


def collapsed(quantizer: Quantizer) -> VQGAN3DModule:
    """All entries but one are out of reach."""
    tokenizer = module(quantizer)
    quantizer.embeddings.data[1:] = 1000.0
    if isinstance(quantizer, VectorQuantizer):
        quantizer.z_avg.copy_(quantizer.embeddings)
        quantizer.N.fill_(1.0)
        quantizer.initialized.fill_(True)
    return tokenizer


def test_a_collapsed_codebook_is_found(warnings: pytest.LogCaptureFixture) -> None:
    fit(collapsed(VectorQuantizer(8, 3)), healthy())
    (message,) = messages(warnings)
    assert "The codebook has collapsed: 12.5% of 8 codes in use, with a perplexity of 1 over 640 codes" in message


@pytest.mark.parametrize("quantizer", [VectorQuantizer, GradientVectorQuantizer])
def test_dead_codes_can_be_revived(quantizer: type[VectorQuantizer], warnings: pytest.LogCaptureFixture) -> None:
    tokenizer = collapsed(quantizer(8, 3))
    fit(tokenizer, healthy(), max_steps=20, on_dead_codes="revive", every_n_steps=5)
    assert messages(warnings) == []  # after the first look they live, before it is two looks in a row
    assert (tokenizer.tokenizer.quantizer.embeddings.abs() < 100).all()
    codes = tokenizer.tokenizer.eval().encode(video(0)).codes
    assert len(codes.unique()) > 1


def test_what_has_no_codebook_cannot_be_revived() -> None:
    with pytest.raises(ValueError, match="FiniteScalarQuantizer has no codebook whose entries could be revived"):
        fit(module(FiniteScalarQuantizer((4, 3))), healthy(), on_dead_codes="revive")


class Clairvoyant(torch.nn.Module):
    """Tells real from reconstructed at once: only the noise of the real videos reaches so far."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.scale * torch.where(x.flatten(1).std(1) > 0.25, 5.0, -5.0), []


def outwitted() -> VQGAN3DModule:
    tokenizer = module(
        video_gan_weight=1.0,
        video_discriminator=Clairvoyant(),
        discriminator_start_step=0,
        feature_matching_weight=0.0,
        gan_loss="vanilla",  # which is never content
    )
    tokenizer.tokenizer.decoder.conv_last.conv.weight.data.zero_()
    return tokenizer


def test_a_discriminator_that_wins_at_once_is_found(warnings: pytest.LogCaptureFixture) -> None:
    fit(outwitted(), healthy())
    (message,) = messages(warnings)
    assert "The discriminator wins: it tells 100% of real and reconstructed patches, by a margin of 10" in message
    assert "--model.discriminator_start_step" in message


def test_a_discriminator_that_wins_can_rest(warnings: pytest.LogCaptureFixture) -> None:
    recorder = fit(outwitted(), healthy(), on_winning_discriminator="delay", delay_steps=15, every_n_steps=5)
    scale = [state["video_discriminator.scale"].item() for state in recorder.states]
    assert scale[9] != scale[8]
    assert scale[9] == scale[24]  # found at step 10, patience 2
    assert scale[25] != scale[24]
    assert [text.rpartition(". ")[2] for text in messages(warnings)] == ["It rests for 15 steps."] * 2  # at 10, 35


def test_a_discriminator_that_wins_can_be_damped_again_and_again(warnings: pytest.LogCaptureFixture) -> None:
    tokenizer = outwitted()
    fit(tokenizer, healthy(), on_winning_discriminator="damp", max_steps=40)
    assert tokenizer.discriminator_lr_factor == 0.25
    assert [text.rpartition(". ")[2] for text in messages(warnings)] == [
        "Its learning rate is 0.5 of what it was.",
        "Its learning rate is 0.25 of what it was.",
    ]
    optimizer = tokenizer.optimizers()[1]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.25 * 2)  # of the last step before


def test_exploding_gradients_are_found(warnings: pytest.LogCaptureFixture) -> None:
    class Explodes(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            module.l1_weight = 4.0 if trainer.global_step < 25 else 4e4

    trainer(Explodes(), TokenizerHealth(every_n_steps=5)).fit(module(), loader(healthy()))
    assert "The gradients explode: their norm is" in messages(warnings)[0]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_what_was_seen_and_done_is_resumed(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    half = trainer(TokenizerHealth(on_winning_discriminator="damp", every_n_steps=5), max_steps=12)
    half.fit(outwitted(), loader(healthy()))
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert len(messages(warnings)) == 1
    tokenizer = outwitted()
    health = TokenizerHealth(on_winning_discriminator="damp", every_n_steps=5)
    run = trainer(health, max_steps=13)
    run.fit(tokenizer, loader(healthy()), ckpt_path=tmp_path / "half.ckpt")
    assert tokenizer.discriminator_lr_factor == 0.5
    assert len(messages(warnings)) == 1
    assert health.state_dict()["counts"].sum() == 3 * 64  # of steps 11 to 13


def test_other_modules_are_left_alone() -> None:
    class Other(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch["video"].view(-1, 1)).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer(TokenizerHealth(every_n_steps=1), max_steps=2)
    run.fit(Other(), loader(healthy()))
    assert run.global_step == 2


@pytest.mark.parametrize("name", ["patience", "max_bad_steps", "delay_steps"])
def test_numbers_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=0 must be at least 1 \(--health.{name}\)"):
        TokenizerHealth(**{name: 0})
