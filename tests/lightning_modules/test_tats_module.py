"""TATS' training, validation and sampling: what is a target, which class is meant, and what a sample depends on."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules import TATSModule
from lightning_modules.generator import Condition
from models.priors.autoregressive import AutoregressiveSampling
from models.random import keyed_generator

TOY = {
    "num_frames": 16,
    "resolution": 32,
    "codebook_size": 16,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "sampling": AutoregressiveSampling(top_k=None, top_p=None),
    "seed": 3,
}


def make_module(tokenizer_bundle: Path, **changes: Any) -> TATSModule:
    """A toy TATS whose weights are large enough for its predictions to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TATSModule(str(tokenizer_bundle), **(TOY | changes))
        for parameter in module.network.parameters():
            if parameter.ndim > 1:  # biases stay 0: the tokens are to decide, not the norms
                nn.init.normal_(parameter, std=0.5)
    module.load_tokenizer()
    module._trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=0, estimated_stepping_batches=10)
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, torch.as_tensor(value).item())
    module.logged = logged
    return module.eval()


def random_codes(batch_size: int = 2, frames: int = 4) -> Tensor:
    return torch.randint(16, (batch_size, frames, 4, 4), generator=keyed_generator(8))


@pytest.fixture
def module(tokenizer_bundle: Path) -> TATSModule:
    return make_module(tokenizer_bundle)


@pytest.fixture
def class_module(tokenizer_bundle: Path) -> TATSModule:
    return make_module(tokenizer_bundle, num_classes=5)


# Training


def test_the_loss_is_the_cross_entropy_of_all_codes_after_their_class(class_module: TATSModule) -> None:
    codes, label = random_codes(), torch.tensor([3, 1])
    loss = class_module.training_step({"codes": codes, "label": label}, 0)
    inputs = torch.cat([label[:, None], codes.flatten(1) + 5], dim=1)[:, :-1]
    expected = F.cross_entropy(class_module.network(inputs).flatten(0, 1), codes.flatten() + 5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert class_module.logged == {"train/loss": pytest.approx(loss.item())}
    assert class_module.tokens_per_batch == 2 * 64
    assert class_module.training_step({"codes": codes, "label": label.flip(0)}, 0) != loss


def test_pixels_and_cached_codes_give_the_same_loss(module: TATSModule) -> None:
    video = torch.rand(2, 3, 16, 32, 32, generator=keyed_generator(5)) * 2 - 1
    codes = module.encode_video(video)
    assert module.training_step({"video": video}, 0) == module.training_step({"codes": codes}, 0)


def test_key_frames_are_every_fourth_latent_frame(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_frames=56, latent_stride=4)  # 14 latent frames: 0, 4, 8, 12
    assert module.network.num_frames == 4
    codes = random_codes(frames=14)
    loss = module.training_step({"codes": codes}, 0)
    assert module.tokens_per_batch == 2 * 64
    between = codes.clone()
    between[:, [1, 2, 3, 5, 13]] = 0
    assert module.training_step({"codes": between}, 0) == loss
    keys = codes.clone()
    keys[:, 12] = (keys[:, 12] + 1) % 16
    assert module.training_step({"codes": keys}, 0) != loss


def test_a_window_of_a_curriculum_stands_at_the_first_positions(module: TATSModule) -> None:
    codes = random_codes()
    batch = {"codes": codes, "window_start": 32, "window_frames": 8, "margin_before": 4}
    assert module.training_step(batch, 0) == module.training_step({"codes": codes[:, 1:3]}, 0)


def test_validation_says_what_the_loss_is_without_the_codes_that_the_mask_gives_away(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_frames=20, mask="closed_boundaries")
    codes = random_codes(frames=5)
    module.validation_step({"codes": codes}, 0)
    logits = module.network.code_logits(codes.flatten(1))
    nll = F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none")  # [2, 80]
    assert module.logged["val/loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    real = torch.cat([nll[:, 16:64], nll[:, 79:]], dim=1)  # three frames between, and the very last code
    assert module.logged["val/nll"] == pytest.approx(real.mean().item(), rel=1e-5)


def test_a_causal_model_has_nothing_given_away(module: TATSModule) -> None:
    module.validation_step({"codes": random_codes()}, 0)
    assert module.logged["val/nll"] == pytest.approx(module.logged["val/loss"], rel=1e-6)
    assert module.logged["val/loss"] != pytest.approx(math.log(16), rel=1e-3)


def test_only_weights_of_linear_layers_decay(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, lr=0.25, betas=(0.5, 0.6), weight_decay=0.125)
    decayed, rest = module.configure_optimizers()["optimizer"].param_groups
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == linear
    assert len(decayed["params"]) + len(rest["params"]) == len(list(module.parameters()))
    assert {id(p) for p in rest["params"]} >= {
        id(module.network.position_embedding),
        id(module.network.token_embedding.weight),
    }
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.125, 0.0)
    assert {(group["lr"], tuple(group["betas"])) for group in (decayed, rest)} == {(0.25, (0.5, 0.6))}


# Generation


def test_generated_videos_are_a_function_of_their_seeds(module: TATSModule) -> None:
    seeds = torch.tensor([5, 6])
    video = module.generate(Condition(), 16, seeds)
    torch.rand(3)
    assert torch.equal(module.generate(Condition(), 16, seeds), video)
    assert video.shape == (2, 3, 16, 32, 32)
    assert not torch.equal(video[0], video[1])


@pytest.mark.parametrize("num_frames", [4, 16, 28])
def test_a_sample_does_not_depend_on_its_batch(module: TATSModule, num_frames: int) -> None:
    together = module.generate_codes(Condition(), num_frames, torch.tensor([5, 6, 7]))
    assert together.shape == (3, num_frames // 4, 4, 4)
    assert torch.equal(module.generate_codes(Condition(), num_frames, torch.tensor([7, 5])), together[[2, 0]])


def test_the_class_matters(class_module: TATSModule) -> None:
    seeds = torch.tensor([5, 5])
    codes = class_module.generate_codes(Condition(label=torch.tensor([0, 4])), 16, seeds)
    assert not torch.equal(codes[0], codes[1])


def test_classes_take_turns_along_the_seeds(class_module: TATSModule) -> None:
    made = class_module.predict_step({"seeds": torch.tensor([6, 10]), "num_frames": 4}, 0)["video"]
    expected = class_module.generate(Condition(label=torch.tensor([1, 0])), 4, torch.tensor([6, 10]))
    assert torch.equal(made, expected)


def test_samples_of_training_have_the_classes_of_the_batch(class_module: TATSModule) -> None:
    seeds = torch.tensor([8, 9])
    shown = class_module.sample_videos({"label": torch.tensor([4, 2, 0])}, seeds)
    assert torch.equal(shown, class_module.generate(Condition(label=torch.tensor([4, 2])), 16, seeds))


def test_the_model_between_key_frames_shows_the_batch_with_new_frames_between(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_frames=20, mask="closed_boundaries")
    codes = random_codes(frames=5)
    filled: list[Tensor] = []
    module.decode_codes = filled.append
    module.sample_videos({"codes": codes}, torch.tensor([1, 2]))
    assert filled[0].shape == codes.shape
    assert torch.equal(filled[0][:, [0, 4]], codes[:, [0, 4]])
    assert not torch.equal(filled[0], codes)


@pytest.mark.parametrize("num_frames", [0, -4, 6])
def test_a_length_that_is_no_multiple_is_refused(module: TATSModule, num_frames: int) -> None:
    with pytest.raises(ValueError, match=f"num_frames={num_frames} cannot be generated: .* multiples of 4"):
        module.generate(Condition(), num_frames, torch.tensor([1]))


@pytest.mark.parametrize("label", [None, torch.tensor([5]), torch.tensor([-1]), torch.tensor([1, 2])])
def test_a_label_that_does_not_fit_is_refused(class_module: TATSModule, label: Tensor | None) -> None:
    with pytest.raises(ValueError, match="expected 1 of the classes 0 to 4"):
        class_module.generate(Condition(label=label), 16, torch.tensor([1]))


def test_an_unconditional_model_refuses_a_label(module: TATSModule) -> None:
    with pytest.raises(ValueError, match="unconditional"):
        module.generate(Condition(label=torch.tensor([1])), 16, torch.tensor([1]))


def test_a_stride_does_not_go_with_a_mask(tokenizer_bundle: Path) -> None:
    with pytest.raises(ValueError, match="latent_stride=2 does not fit mask='closed_boundaries'"):
        make_module(tokenizer_bundle, latent_stride=2, mask="closed_boundaries")


# Checkpoints


def saved(module: TATSModule, path: Path, frames: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", enable_model_summary=False, **quiet)
    loader = DataLoader([{"codes": random_codes(frames=frames)}], batch_size=None)
    del module.log
    module.train()
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(path)


def test_key_frames_and_frames_between_make_one_video(tokenizer_bundle: Path, tmp_path: Path) -> None:
    between = make_module(tokenizer_bundle, num_frames=20, mask="closed_boundaries")
    saved(between, tmp_path / "between.ckpt", 5)
    assert TATSModule.load_from_checkpoint(tmp_path / "between.ckpt").sampling == TOY["sampling"]
    sampling = AutoregressiveSampling(top_k=None, top_p=None, interpolation=str(tmp_path / "between.ckpt"))
    keys = make_module(tokenizer_bundle, num_frames=32, latent_stride=4, sampling=sampling)
    together = keys.generate_codes(Condition(), 44, torch.tensor([3, 4]))  # 11 latent frames: keys 0, 4, 8 and 12
    assert together.shape == (2, 11, 4, 4)
    assert torch.equal(keys.generate_codes(Condition(), 44, torch.tensor([4]))[0], together[1])
    longer = keys.generate_codes(Condition(), 52, torch.tensor([3, 4]))  # the same four keys, all of the last gap
    assert torch.equal(longer[:, :11], together)
    keys_alone = keys.sample_videos({}, torch.tensor([3]))
    assert keys_alone.shape == (1, 3, 8, 32, 32)  # two key frames, one after the other
