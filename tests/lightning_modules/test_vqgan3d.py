import copy
import logging
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.vqgan3d import VQGAN3DModule
from models.blocks.norm import SyncBatchNorm
from models.metrics.frames import frame_ssim
from models.random import keyed_generator
from models.tokenizers import (
    LPIPS,
    VQGAN3D,
    ContinuousLatents,
    FiniteScalarQuantizer,
    GaussianLatents,
    LookupFreeQuantizer,
    Quantizer,
    TimeAgnosticDecoder,
    TimeAgnosticEncoder,
    VectorQuantizer,
)

pytestmark = [
    # Lightning 2.6.6 asks of its pytrees what torch 2.15 deprecates
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # most runs here validate nothing, and their loaders need no workers
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def toy_tokenizer(quantizer: Quantizer | None = None, **options: Any) -> VQGAN3D:
    torch.manual_seed(0)
    return VQGAN3D(
        TimeAgnosticEncoder(base_channels=2, downsample=(2, 2, 2)),
        quantizer or VectorQuantizer(8, 3, **options),
        TimeAgnosticDecoder(base_channels=2, downsample=(2, 2, 2)),
    )


def toy_module(tokenizer: VQGAN3D | None = None, **options: Any) -> VQGAN3DModule:
    toy = {"perceptual_weight": 0.0, "discriminator_channels": 2, "discriminator_layers": 2, "lr": 1e-2}
    return VQGAN3DModule(tokenizer or toy_tokenizer(), **(toy | options))


def batch(key: int, size: int = 2) -> dict[str, Any]:
    video = torch.rand(size, 3, 4, 8, 8, generator=keyed_generator(key)) * 2 - 1
    return {"video": video, "label": torch.zeros(size, dtype=torch.int64), "index": torch.arange(size)}


def loader(batches: int = 4, size: int = 2) -> DataLoader:
    return DataLoader([batch(key, size) for key in range(batches)], batch_size=None)


def trainer(max_steps: int = 4, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**(quiet | {"max_steps": max_steps, "accelerator": "cpu", "enable_model_summary": False} | options))


class Recorder(Callback):
    """Keeps what is logged at each training batch, and the weights after it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.states: list[dict[str, Tensor]] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        self.states.append(copy.deepcopy(module.state_dict()))
        self.steps.append(trainer.global_step)


def fit(module: VQGAN3DModule, max_steps: int = 4, data: DataLoader | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer(max_steps, callbacks=[recorder], **options).fit(module, data or loader())
    return recorder


def moved(before: dict[str, Tensor], after: dict[str, Tensor], part: str) -> bool:
    names = [name for name in before if part in name and "num_batches" not in name]
    assert names, part
    return any(not torch.equal(before[name], after[name]) for name in names)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_global_step_counts_batches_although_two_optimizers_step() -> None:
    assert fit(toy_module(discriminator_start_step=0)).steps == [1, 2, 3, 4]


def test_discriminators_are_not_touched_before_they_start() -> None:
    module = toy_module(discriminator_start_step=2)
    initial = copy.deepcopy(module.state_dict())
    recorder = fit(module)
    seen = [initial, *recorder.states]
    for part in ("image_discriminator", "video_discriminator"):
        assert [moved(a, b, part) for a, b in pairwise(seen)] == [False, False, True, True]
        assert recorder.states[1][f"{part}.model1.1.num_batches_tracked"] == 0  # not even run
    adversarial = {"train/gan", "train/feature_matching", "train/disc"}
    assert [adversarial & logged.keys() for logged in recorder.logged] == [set(), set(), adversarial, adversarial]


def test_everything_a_reader_of_curves_expects_is_logged() -> None:
    module = toy_module(discriminator_start_step=0)
    run = trainer(1)
    run.fit(module, loader(), loader(2))
    terms = {"loss", "l1", "commitment", "perplexity", "usage"}
    adversarial = {"gan", "feature_matching", "disc", "logits_real", "logits_fake", "disc_accuracy", "grad_norm_disc"}
    expected = {f"train/{name}" for name in terms | adversarial | {"grad_norm"}}
    run.validate(module, loader(2), verbose=False)
    validated = {f"val/{name}" for name in terms | {"psnr"}}
    assert run.callback_metrics.keys() == validated
    assert fit(toy_module(discriminator_start_step=0), 1).logged[0].keys() == expected


def test_logged_loss_is_the_weighted_sum_of_its_terms() -> None:
    module = toy_module(discriminator_start_step=0, l1_weight=2.0, feature_matching_weight=3.0)
    logged = fit(module, 1).logged[0]
    expected = 2 * logged["train/l1"] + logged["train/commitment"] + logged["train/gan"]
    assert logged["train/loss"] == pytest.approx(expected + 3 * logged["train/feature_matching"], rel=1e-5)


def test_without_gan_weights_there_are_no_discriminators() -> None:
    module = toy_module(image_gan_weight=0.0, video_gan_weight=0.0, discriminator_start_step=0)
    assert not any("discriminator" in name for name, _ in module.named_parameters())
    recorder = fit(module)
    assert recorder.steps == [1, 2, 3, 4]
    assert "train/gan" not in recorder.logged[-1]


@pytest.mark.parametrize(("absent", "present"), [("image", "video"), ("video", "image")])
def test_a_discriminator_of_no_weight_is_not_built(absent: str, present: str) -> None:
    module = toy_module(**{f"{absent}_gan_weight": 0.0}, discriminator_start_step=0)
    before = copy.deepcopy(module.state_dict())
    recorder = fit(module, 1)
    assert not any(f"{absent}_discriminator" in name for name in before)
    assert moved(before, recorder.states[0], f"{present}_discriminator")


def test_the_tokenizer_learns_to_reconstruct() -> None:
    module = toy_module(image_gan_weight=0.0, video_gan_weight=0.0)
    recorder = fit(module, 60, loader(1), max_epochs=-1)
    assert recorder.logged[-1]["train/l1"] < 0.8 * recorder.logged[0]["train/l1"]


def test_each_backward_pass_reaches_one_side_only() -> None:
    module = toy_module(discriminator_start_step=0)
    required: list[bool] = []
    first, last = module.image_discriminator.model0[0], module.tokenizer.decoder.conv_last.conv
    first.register_forward_hook(lambda *_: required.append(first.weight.requires_grad))
    last.register_forward_hook(lambda *_: required.append(last.weight.requires_grad))
    fit(module, 1)
    # the decoder; fake and real for the generator's loss; real and fake for the discriminator's
    assert required == [True, False, False, True, True]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_neither_side_sees_the_other_ones_step() -> None:
    """Both gradients are of the weights before the step, so each update is the same whatever the other's length."""

    def after_a_step(lr: float, discriminator_lr_factor: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(1)
        module = toy_module(lr=lr, discriminator_start_step=0)
        module.discriminator_lr_factor = discriminator_lr_factor
        (state,) = fit(module, 1).states
        sides = [{k: v for k, v in state.items() if k.startswith("tokenizer") == side} for side in (True, False)]
        return sides[0], sides[1]

    tokenizer, discriminators = after_a_step(1e-2, 1.0)
    same, slower = after_a_step(1e-2, 0.5)
    assert equal(tokenizer, same)
    assert not equal(discriminators, slower)
    faster, as_before = after_a_step(2e-2, 0.5)
    assert equal(discriminators, as_before)
    assert not equal(tokenizer, faster)


def test_gradients_are_clipped_for_each_optimizer_by_itself() -> None:
    module = toy_module(discriminator_start_step=0, gradient_clip_norm=1e-3)
    norms: list[float] = []
    original = torch.optim.Adam.step

    class Watched(torch.optim.Adam):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            return original(self, *args, **kwargs)

    optimizers = module.configure_optimizers()
    module.configure_optimizers = lambda: [Watched(o.param_groups[0]["params"], lr=1e-3) for o in optimizers]  # type: ignore[method-assign]
    fit(module, 1)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_two_accumulated_batches_make_one_step_of_their_mean_gradient() -> None:
    """Two halves are the whole where neither batch statistics nor the codebook depend on the batch."""

    def frozen(**options: Any) -> VQGAN3DModule:
        return toy_module(image_gan_weight=0.0, video_gan_weight=0.0, **options).eval()

    two = [batch(0), batch(1)]
    whole = {name: torch.cat([half[name] for half in two]) for name in two[0]}
    accumulated = fit(frozen(accumulate_grad_batches=2), 1, DataLoader(two, batch_size=None), precision="64-true")
    at_once = fit(frozen(), 1, DataLoader([whole], batch_size=None), precision="64-true")
    assert accumulated.steps == [0, 1]
    assert not moved(frozen().double().state_dict(), accumulated.states[0], "tokenizer")
    assert moved(accumulated.states[0], accumulated.states[1], "tokenizer")
    for name, value in at_once.states[0].items():
        assert torch.allclose(accumulated.states[1][name], value, atol=1e-7), name


def test_a_step_of_no_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches=0: expected at least 1"):
        toy_module(accumulate_grad_batches=0)


def test_the_rest_of_an_epoch_makes_a_step_of_its_own() -> None:
    module = toy_module(accumulate_grad_batches=2, discriminator_start_step=0)
    assert fit(module, 4, loader(3)).steps == [0, 1, 2, 2, 3, 4]


def test_each_clip_gets_a_frame_that_depends_on_seed_and_step() -> None:
    draws = {}
    for seed in (0, 1):
        module = toy_module(seed=seed)
        for step in (0, 1):
            module.trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=step)
            draws[seed, step] = module._draw_frames(torch.zeros(64, 3, 8, 4, 4), 0).tolist()
    assert all(set(frames) == set(range(8)) for frames in draws.values())
    assert len({tuple(frames) for frames in draws.values()}) == 4


def test_two_ranks_share_the_frames_that_one_would_draw() -> None:
    module = toy_module()
    drawn = []
    for world_size, rank, size in ((1, 0, 6), (2, 0, 3), (2, 1, 3)):
        module.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, global_step=5)
        drawn.append(module._draw_frames(torch.zeros(size, 3, 8, 4, 4), 0))
    assert torch.equal(drawn[0], torch.cat(drawn[1:]))


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    data = DataLoader([batch(0)], batch_size=None)  # one batch an epoch: every step sees the same data
    options = {"discriminator_start_step": 1, "tokenizer": toy_tokenizer(restart_threshold=0.5)}
    whole = fit(toy_module(**options), 4, data, max_epochs=4)
    options["tokenizer"] = toy_tokenizer(restart_threshold=0.5)
    interrupted = trainer(2, max_epochs=4)
    interrupted.fit(toy_module(**options), data)
    interrupted.save_checkpoint(tmp_path / "half.ckpt")
    options["tokenizer"] = toy_tokenizer(restart_threshold=0.5)
    recorder = Recorder()
    trainer(4, max_epochs=4, callbacks=[recorder]).fit(toy_module(**options), data, ckpt_path=tmp_path / "half.ckpt")
    assert recorder.steps == [3, 4]
    assert equal(recorder.states[-1], whole.states[-1])


def test_a_checkpoint_of_a_module_built_in_python_holds_plain_types(tmp_path: Path) -> None:
    run = trainer(1)
    run.fit(toy_module(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "tokenizer" not in checkpoint["hyper_parameters"]
    module = VQGAN3DModule.load_from_checkpoint(tmp_path / "a.ckpt", tokenizer=toy_tokenizer())
    assert equal(module.state_dict(), checkpoint["state_dict"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of LightningCLI's calls to jsonargparse
@pytest.mark.parametrize(
    "quantizer",
    [
        {"class_path": "models.tokenizers.VectorQuantizer", "init_args": {"codebook_size": 8, "dim": 3}},
        {"class_path": "models.tokenizers.FiniteScalarQuantizer", "init_args": {"levels": [4, 3]}},
        {"class_path": "models.tokenizers.LookupFreeQuantizer", "init_args": {"num_bits": 3}},
        {"class_path": "models.tokenizers.GradientVectorQuantizer", "init_args": {"codebook_size": 8, "dim": 3}},
        {"class_path": "models.tokenizers.ContinuousLatents", "init_args": {"dim": 3}},
        {"class_path": "models.tokenizers.GaussianLatents", "init_args": {"dim": 3}},
    ],
    ids=lambda quantizer: quantizer["class_path"].rpartition(".")[2],
)
def test_a_module_built_from_yaml_is_rebuilt_from_its_checkpoint(
    quantizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["longtake"])  # LightningCLI warns of arguments beside those it is given
    part = {"base_channels": 2, "downsample": [2, 2, 2]}
    tokenizer = {
        "encoder": {"class_path": "models.tokenizers.TimeAgnosticEncoder", "init_args": part | {"padding": "reflect"}},
        "quantizer": quantizer,
        "decoder": {"class_path": "models.tokenizers.TimeAgnosticDecoder", "init_args": part},
        "pixel_range": [0.0, 1.0],
    }
    model = {
        "tokenizer": {"class_path": "models.tokenizers.VQGAN3D", "init_args": tokenizer},
        "perceptual_weight": 0.0,
        "discriminator_channels": 2,
        "gan_loss": "vanilla",
    }
    config = {"model": {"class_path": "lightning_modules.vqgan3d.VQGAN3DModule", "init_args": model}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(
        LightningModule,
        subclass_mode_model=True,
        run=False,
        seed_everything_default=False,
        save_config_callback=None,
        args=["--config", str(tmp_path / "config.yaml"), "--model.lr", "0.5"],
    )
    run = trainer(1)
    run.fit(cli.model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    module = VQGAN3DModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (module.lr, module.gan_loss) == (0.5, "vanilla")
    assert module.tokenizer.encoder.conv_first.padding == "reflect"
    assert module.tokenizer.pixel_range == (0.0, 1.0)
    assert equal(module.state_dict(), cli.model.state_dict())


def test_validation_measures_the_reconstruction_in_the_house_range() -> None:
    module = toy_module()
    run = trainer(1)
    run.fit(module, loader())
    run.validate(module, loader(2), verbose=False)
    module.eval()
    errors, values, codes = [], [], []
    for key in range(2):
        video = batch(key)["video"]
        encoded = module.tokenizer.encode(video)
        reconstruction = module.tokenizer.decode(encoded.latents)
        errors += [(a - b).square().mean() for a, b in zip(video, reconstruction, strict=True)]
        native = module.tokenizer.decode_native(encoded.latents)
        values.append((native - module.tokenizer.to_native(video)).abs().mean())
        codes.append(encoded.codes)
    psnr = torch.stack([10 * torch.log10(2**2 / error) for error in errors]).mean()
    metrics = run.callback_metrics
    assert metrics["val/psnr"].item() == pytest.approx(psnr.item(), rel=1e-5)
    assert metrics["val/l1"].item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    probabilities = torch.bincount(torch.cat(codes).flatten(), minlength=8) / torch.cat(codes).numel()
    entropy = -sum(p * p.log() for p in probabilities if p > 0)
    assert metrics["val/perplexity"].item() == pytest.approx(entropy.exp().item(), rel=1e-4)


def test_an_adaptive_weight_makes_both_gradients_equal_at_the_last_weight() -> None:
    module = toy_module(discriminator_start_step=0, adaptive_weight=True, l1_weight=3.0, feature_matching_weight=0.0)
    module.double().trainer = SimpleNamespace(global_step=5)
    video = batch(0)["video"].double()
    pixels = module.tokenizer.to_native(video)
    reconstruction, encoded = module.tokenizer(video)
    terms = module.generator_losses(pixels, reconstruction, encoded, torch.tensor([0, 1]), adversarial=True)
    assert "feature_matching" not in terms
    factors = module.step_factors(terms)
    last = module.tokenizer.decoder.conv_last.conv.weight
    norms = [torch.autograd.grad(terms[name], last, retain_graph=True)[0].norm() for name in ("l1", "gan")]
    assert torch.allclose(factors["gan"], 3 * norms[0] / (norms[1] + 1e-4))
    assert not factors["gan"].requires_grad
    expected = 3 * terms["l1"] + terms["commitment"] + factors["gan"] * terms["gan"]
    assert torch.allclose(module.generator_loss(terms, factors), expected)
    logged = fit(toy_module(discriminator_start_step=1, adaptive_weight=True), 2).logged
    assert ["train/adaptive_weight" in step for step in logged] == [False, True]


def test_the_adversarial_terms_grow_and_the_entropy_fades_by_step() -> None:
    options = {"discriminator_start_step": 10, "discriminator_warmup_steps": 3, "entropy_boost": 3.0}
    module = toy_module(**options, entropy_boost_steps=2000)
    terms = {"l1": torch.tensor(0.0)}

    def factors(name: str, *steps: int) -> list[float]:
        values = []
        for step in steps:
            module.trainer = SimpleNamespace(global_step=step)
            values.append(module.step_factors(terms)[name].item())
        return values

    assert factors("gan", 10, 11, 12, 13, 500) == [0.25, 0.5, 0.75, 1, 1]
    assert factors("feature_matching", 10, 500) == [0.25, 1]
    assert factors("entropy", 0, 1000, 2000, 9000) == [4, 2.5, 1, 1]


def test_the_entropy_loss_is_boosted_in_training() -> None:
    def first(**options: Any) -> dict[str, float]:
        tokenizer = toy_tokenizer(LookupFreeQuantizer(3, commitment_weight=0.0, entropy_weight=1.0))
        return fit(toy_module(tokenizer, image_gan_weight=0.0, video_gan_weight=0.0, **options), 1).logged[0]

    plain, boosted = first(), first(entropy_boost=3.0)
    difference = boosted["train/loss"] - plain["train/loss"]
    assert difference == pytest.approx(3 * plain["train/entropy"], rel=1e-4)


class Critic(torch.nn.Module):
    """A discriminator without batch norm and without hidden maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv3d(3, 2, 3), torch.nn.Tanh(), torch.nn.Conv3d(2, 1, (2, 6, 6)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.layers(x).flatten(1), []


def magvit_module() -> VQGAN3DModule:
    torch.manual_seed(1)
    return toy_module(
        video_discriminator=Critic(),
        image_gan_weight=0.0,
        gan_loss="non_saturating",
        adversarial_weight=0.1,
        feature_matching_weight=0.0,
        r1_weight=10.0,
        lecam_weight=0.001,
        discriminator_start_step=0,
    )


def test_magvits_losses_train_and_their_averages_are_resumed(tmp_path: Path) -> None:
    data = DataLoader([batch(0)], batch_size=None)
    whole = fit(magvit_module(), 4, data, max_epochs=4)
    logged = whole.logged[0]
    assert {"train/r1", "train/lecam", "train/disc", "train/gan"} <= logged.keys()
    assert logged["train/loss"] == pytest.approx(
        4 * logged["train/l1"] + logged["train/commitment"] + 0.1 * logged["train/gan"], rel=1e-5
    )
    after = whole.states[0]
    assert after["video_lecam.real"].item() == pytest.approx(0.001 * logged["train/logits_real"], rel=1e-4)
    assert after["video_lecam.fake"].item() == pytest.approx(0.001 * logged["train/logits_fake"], rel=1e-4)
    interrupted = trainer(2, max_epochs=4)
    interrupted.fit(magvit_module(), data)
    interrupted.save_checkpoint(tmp_path / "half.ckpt")
    recorder = Recorder()
    trainer(4, max_epochs=4, callbacks=[recorder]).fit(magvit_module(), data, ckpt_path=tmp_path / "half.ckpt")
    assert equal(recorder.states[-1], whole.states[-1])


def test_r1_reaches_the_discriminators_loss() -> None:
    module = magvit_module()
    video, frames = batch(0)["video"], torch.tensor([0, 1])
    terms, judgement = module.discriminator_losses(video, -video, frames)
    expected = terms["disc"] + 10 * terms["r1"] + 0.001 * terms["lecam"]
    assert torch.allclose(module.discriminator_loss(terms), expected)
    real = video.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module.video_discriminator(real)[0].sum(), real)
    assert torch.allclose(terms["r1"], gradient.square().sum() / 2, rtol=1e-4)
    logits = [module.video_discriminator(x)[0] for x in (video, -video)]
    right = ((logits[0] > 0).float().mean() + (logits[1] < 0).float().mean()) / 2
    assert judgement["disc_accuracy"] == right


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_r1_asks_batch_norm_for_second_derivatives(weight: float) -> None:
    """Over several GPUs, torch's layer has none; what the CPU does has, see `penalise` of the two ranks."""
    module = toy_module(r1_weight=weight)
    for network in (module.image_discriminator, module.video_discriminator):
        norms = [layer for layer in network.modules() if isinstance(layer, SyncBatchNorm)]
        assert norms
        assert all(norm.twice_differentiable == (weight > 0) for norm in norms)


def test_a_discriminator_without_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"video_discriminator has no use: video_gan_weight=0\.0"):
        toy_module(video_discriminator=Critic(), video_gan_weight=0.0)


def test_a_gate_can_refuse_a_step() -> None:
    module = toy_module(discriminator_start_step=0, lecam_weight=0.1)
    asked: list[set[str]] = []

    def gate(norms: dict[str, Tensor]) -> bool:
        asked.append(set(norms))
        return len(asked) != 2

    module.step_gate = gate
    recorder = fit(module, 3)
    assert asked == [{"grad_norm", "grad_norm_disc"}] * 4
    assert recorder.steps == [1, 1, 2, 3]
    parameters = [{n: s[n] for n, _ in module.named_parameters()} for s in recorder.states]
    assert equal(parameters[0], parameters[1])
    assert recorder.states[0]["image_lecam.real"] == recorder.states[1]["image_lecam.real"]
    assert not equal(parameters[1], parameters[2])


@pytest.mark.parametrize(
    ("quantizer", "losses", "statistics"),
    [
        (FiniteScalarQuantizer((4, 3)), set(), {"perplexity", "usage"}),
        (ContinuousLatents(3), set(), {"latent_std"}),
        (GaussianLatents(3), {"kl"}, {"latent_std"}),
    ],
)
def test_every_kind_of_latents_trains_and_validates(
    quantizer: Quantizer, losses: set[str], statistics: set[str]
) -> None:
    module = toy_module(toy_tokenizer(quantizer), image_gan_weight=0.0, video_gan_weight=0.0)
    logged = fit(module, 2).logged[-1]
    assert logged.keys() == {f"train/{name}" for name in {"loss", "l1", "grad_norm"} | losses | statistics}
    run = trainer(1)
    run.validate(module, loader(2), verbose=False)
    counted = statistics & {"perplexity", "usage"}
    assert run.callback_metrics.keys() == {f"val/{name}" for name in {"loss", "l1", "psnr"} | losses | counted}


def large_batch(key: int) -> dict[str, Any]:
    video = torch.rand(2, 3, 4, 16, 16, generator=keyed_generator(key)) * 2 - 1
    return {"video": video, "label": torch.zeros(2, dtype=torch.int64), "index": torch.arange(2)}


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_validation_measures_ssim_and_lpips_of_what_is_shown(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x - y).abs().mean() * len(x)

    monkeypatch.setattr(LPIPS, "from_folder", lambda folder: Distance())
    module = toy_module(perceptual_weight=weight)
    run = trainer(1)
    run.validate(module, DataLoader([large_batch(0)], batch_size=None), verbose=False)
    video = large_batch(0)["video"]
    shown = module.eval().tokenizer.decode(module.tokenizer.encode(video).latents)
    metrics = run.callback_metrics
    assert metrics["val/ssim"].item() == pytest.approx(frame_ssim(shown, video).mean().item(), rel=1e-5)
    # all frames, in [-1, 1]; the loss looks at one of each clip, in the native range
    assert metrics["val/lpips"].item() == pytest.approx((shown - video).abs().mean().item() * 8, rel=1e-5)
    assert ("val/perceptual" in metrics) == (weight > 0)


def test_a_curriculum_batch_trains_on_the_video_it_holds() -> None:
    window = batch(0) | {"window_start": 4, "window_frames": 2, "margin_before": 1}
    assert fit(toy_module(), 1, DataLoader([window], batch_size=None)).steps == [1]


def mixed_batch(tail: float) -> dict[str, Any]:
    """A video, and an image with something behind it."""
    video = torch.rand(2, 3, 5, 8, 8, generator=keyed_generator(0)) * 2 - 1
    video[1, :, 1:] = tail
    return {"video": video, "is_image": torch.tensor([False, True])}


def causal_module() -> VQGAN3DModule:
    torch.manual_seed(0)
    options: dict[str, Any] = {"base_channels": 2, "downsample": (2, 2, 2), "time_placement": "causal"}
    tokenizer = VQGAN3D(TimeAgnosticEncoder(**options), VectorQuantizer(8, 3), TimeAgnosticDecoder(**options))
    return toy_module(tokenizer, discriminator_start_step=0)


def test_nothing_behind_an_image_counts() -> None:
    """Neither in a loss or a statistic, nor in a gradient, the codebook or batch norm."""
    runs = []
    for tail in (-1.0, 0.7):
        module = causal_module()
        recorder = fit(module, 2, DataLoader([mixed_batch(tail)] * 2, batch_size=None))
        scores = trainer().validate(module, DataLoader([mixed_batch(tail)], batch_size=None), verbose=False)
        runs.append((recorder.logged, recorder.states, scores))
    assert runs[0][0] == runs[1][0]
    assert runs[0][2] == runs[1][2]
    assert equal(runs[0][1][-1], runs[1][1][-1])


def test_an_image_counts_as_the_still_video_that_it_begins() -> None:
    mixed, still = mixed_batch(-1.0), mixed_batch(-1.0)
    still["video"][1] = still["video"][1, :, :1]
    reconstruction, encoded = causal_module().tokenizer(mixed["video"], is_image=mixed["is_image"])
    plain, _ = causal_module().tokenizer(still["video"])
    assert torch.equal(reconstruction[1], reconstruction[1, :, :1].expand_as(reconstruction[1]))
    assert torch.equal(encoded.codes[1], encoded.codes[1, :1].expand_as(encoded.codes[1]))
    assert not torch.equal(reconstruction[0, :, 0], reconstruction[0, :, 1])
    assert not torch.equal(plain[1], plain[1, :, :1].expand_as(plain[1]))  # it is not by chance that frames are equal


def test_images_besides_videos_need_a_causal_tokenizer() -> None:
    mixed = mixed_batch(0.0)
    with pytest.raises(ValueError, match="TimeAgnosticEncoder is not causal"):
        toy_module().tokenizer(mixed["video"][:, :, :4], is_image=mixed["is_image"])
    toy_module().tokenizer(mixed["video"][:, :, :4], is_image=torch.tensor([False, False]))


def test_float16_is_refused_before_training_starts() -> None:
    module = toy_module()
    # on the CPU, Lightning turns 16-mixed into bfloat16 before a module could see it
    module.trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(ValueError, match=r"--trainer.precision=16-mixed .* Use bf16-mixed or 32-true"):
        module.setup("fit")


def test_bfloat16_trains() -> None:
    recorder = fit(toy_module(discriminator_start_step=0), 2, precision="bf16-mixed")
    assert recorder.states[-1]["tokenizer.quantizer.embeddings"].dtype == torch.float32
    assert all(torch.isfinite(torch.tensor(value)) for value in recorder.logged[-1].values())


def test_missing_perceptual_weights_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = toy_module(perceptual_weight=4.0, perceptual_weights=str(tmp_path))
    with caplog.at_level(logging.WARNING, "lightning_modules.vqgan3d"):
        run = trainer(2)
        run.fit(module, loader(), loader(1))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "--model.perceptual_weights" in message
    assert "https://" in message
    assert "train/perceptual" not in run.callback_metrics


def test_perceptual_loss_looks_at_the_chosen_frames_and_stays_out_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    class Perceptual(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            seen.append(x)
            return (x - y).abs().mean()

    monkeypatch.setattr(LPIPS, "from_folder", lambda folder: Perceptual())
    module = toy_module(perceptual_weight=4.0)
    recorder = fit(module, 1)
    assert seen[0].shape == (2, 3, 8, 8)
    native = batch(0)["video"] * 0.5
    assert all((native[i] == seen[0][i][:, None]).all(0).all((1, 2)).any() for i in range(2))
    logged = recorder.logged[0]
    expected = 4 * logged["train/l1"] + 4 * logged["train/perceptual"] + logged["train/commitment"]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert not any("perceptual" in name for name in module.state_dict())


def test_the_perceptual_loss_can_look_at_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def perceptual(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return (x - y).abs().mean()

    module = toy_module(perceptual_weight=4.0, perceptual_frames="all")
    module.__dict__["perceptual"] = SimpleNamespace(to=lambda device: perceptual)
    fit(module, 1)
    native = batch(0)["video"] * 0.5
    assert torch.equal(seen[0].view(2, 4, 3, 8, 8).transpose(1, 2), native)


def test_a_classifier_of_timm_is_read_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "lightning_modules.vqgan3d.TimmPerceptual", lambda *args: asked.append(args) or torch.nn.Identity()
    )
    module = toy_module(perceptual_weight=0.1, perceptual_network="resnet50", perceptual_weights="here.safetensors")
    module.setup("validate")
    assert asked == [("resnet50", "here.safetensors")]


def test_shown_videos_are_originals_above_reconstructions() -> None:
    module = toy_module()
    fit(module, 1)
    module.train()
    before = copy.deepcopy(module.state_dict())
    shown = module.sample_videos(batch(0, size=3), torch.arange(2))
    assert shown.shape == (2, 3, 4, 16, 8)
    assert torch.equal(shown[:, :, :, :8], batch(0, size=3)["video"][:2])
    assert shown.abs().max() <= 1
    assert not shown.requires_grad
    assert module.tokenizer.encoder.training  # looking neither trains nor stops training
    assert equal(before, module.state_dict())
    module.tokenizer.eval()
    expected = module.tokenizer.decode(module.tokenizer.encode(batch(0, size=3)["video"]).latents)[:2]
    assert torch.allclose(shown[:, :, :, 8:], expected, atol=1e-6)


RANK_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_vqgan3d import ddp_run
ddp_run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
"""


def ddp_run(folder: str, rank: int, ranks: int) -> None:
    """Train in float64; each rank sees its share of every batch of four."""
    torch.set_num_threads(1)
    share = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    batches = [{name: value[share] for name, value in batch(key, size=4).items()} for key in range(8)]
    module = toy_module(
        toy_tokenizer(restart_threshold=0.5),
        discriminator_start_step=1,
        accumulate_grad_batches=2,
        lr=1e-3,
        adaptive_weight=True,
        r1_weight=0.1,
        lecam_weight=0.1,
    )
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 1, "use_distributed_sampler": False}
    if ranks > 1:
        options |= {"strategy": "ddp_find_unused_parameters_true", "devices": ranks}
    run = trainer(4, **options)
    run.fit(module, DataLoader(batches, batch_size=None))
    metrics = run.validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    torch.save({"state": module.state_dict(), "metrics": metrics, "step": run.global_step}, f"{folder}/{rank}.pt")


def test_two_ranks_train_as_one_process_with_both_batches(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", RANK_SCRIPT, str(Path(__file__).parent), str(tmp_path), str(rank), "2"]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    (tmp_path / "one").mkdir()
    ddp_run(str(tmp_path / "one"), 0, 1)
    one = torch.load(tmp_path / "one" / "0.pt")
    assert equal(ranks[0]["state"], ranks[1]["state"])
    for name, value in one["state"].items():
        assert torch.allclose(ranks[0]["state"][name].double(), value.double(), rtol=1e-6, atol=1e-9), name
    assert ranks[0]["step"] == one["step"] == 4
    assert ranks[0]["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
