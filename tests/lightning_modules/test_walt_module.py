"""W.A.L.T's training, validation and sampling: latents, conditions, draws, and what a sample depends on."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import repeat
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import MovingShapesDataModule
from lightning_modules import WALTModule, generator
from lightning_modules.generator import Condition
from models.priors.diffusion import DiffusionSampling, min_snr_weight
from models.random import keyed_generator

TOY: dict[str, Any] = {
    "num_frames": 9,  # 3 x 4 x 4 latents
    "resolution": 32,
    "latent_dim": 12,
    "num_classes": 5,
    "depth": 2,
    "dim": 16,
    "num_heads": 2,
    "sampling": DiffusionSampling(num_steps=3),
    "seed": 3,
}
Make = Callable[..., WALTModule]


@pytest.fixture
def make(continuous_tokenizer: Path) -> Make:
    """Toy modules whose weights are large enough for every condition to matter."""

    def build(**changes: Any) -> WALTModule:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = WALTModule(str(continuous_tokenizer), **(TOY | changes))
            for parameter in module.network.parameters():
                nn.init.normal_(parameter, std=0.2)
        module.load_tokenizer()
        module.latent_mean.fill_(0.1)
        module.latent_std.fill_(0.5)
        return attach(module)

    return build


def attach(module: WALTModule, rank: int = 0, world_size: int = 1, step: int = 0) -> WALTModule:
    """Give the module a stand-in for the Trainer, and keep what it logs in `module.logged`."""
    module._trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, global_step=step, estimated_stepping_batches=10
    )
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, torch.as_tensor(value).item())
    module.logged = logged
    return module


def random_video(rows: int = 2, frames: int = 9, key: int = 0) -> Tensor:
    """Constant in each block of 8 x 8 pixels, so that the tokenizer loses nothing."""
    blocks = torch.rand(rows, 3, frames, 4, 4, generator=keyed_generator(key, 7)) * 2 - 1
    return repeat(blocks, "b c t h w -> b c t (h y) (w x)", y=8, x=8)


def random_batch(rows: int = 2, **more: Any) -> dict[str, Any]:
    return {"video": random_video(rows), "label": torch.arange(rows) % 5, "index": torch.arange(rows), **more}


def calls(module: WALTModule) -> list[dict[str, Any]]:
    """Record what the network is asked from now on."""
    seen: list[dict[str, Any]] = []

    def record(network: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        names = ("noisy", "times", "estimate")
        seen.append({**dict(zip(names, args, strict=False)), **kwargs, "out": out, "grad": torch.is_grad_enabled()})

    module.network.register_forward_hook(record, with_kwargs=True)
    return seen


# Bad input


def test_a_tokenizer_with_codes_is_refused(make: Make, tokenizer_bundle: Path) -> None:
    module = WALTModule(str(tokenizer_bundle), **TOY)
    with pytest.raises(ValueError, match=r"is not continuous: it has 16 codes.*--model.tokenizer"):
        module.load_tokenizer()


def test_a_tokenizer_of_other_channels_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"has 12 latent channels, the model expects 8 \(--model.latent_dim\)"):
        make(latent_dim=8).encode_latents(random_video())


def test_a_tokenizer_that_is_not_causal_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    del module.__dict__["tokenizer"]
    load = generator.load_tokenizer

    def not_causal(path: Path) -> nn.Module:
        tokenizer = load(path)
        tokenizer.latent_shape = lambda *size: (2, 4, 4)
        return tokenizer

    monkeypatch.setattr(generator, "load_tokenizer", not_causal)
    with pytest.raises(ValueError, match=r"makes \(2, 4, 4\) latents of 9 frames.*it is not causal"):
        module.load_tokenizer()


@pytest.mark.parametrize(("frames", "nearest"), [(16, "13 or 17"), (18, "17 or 21"), (2, "1 or 5"), (0, "1 or 5")])
def test_a_clip_that_is_not_one_plus_four_k_frames_is_refused(make: Make, frames: int, nearest: str) -> None:
    message = rf"num_frames={frames} does not fit a causal tokenizer: it takes 1 \+ 4k frames. Nearest: {nearest}"
    with pytest.raises(ValueError, match=message):
        make(num_frames=frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_dropout": 0.0}, "trained with its label alone; set --model.label_dropout above 0"),
        ({"frame_prediction": 1.0}, "always given its first frames; set --model.frame_prediction below 1"),
        ({"num_classes": 0}, "has no condition to guide by"),
    ],
)
def test_guidance_without_dropped_conditions_in_training_is_refused(
    make: Make, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"guidance_scale=2.0 needs a model without condition.*{message}"):
        make(sampling=DiffusionSampling(guidance_scale=2.0), **changes)
    with pytest.raises(ValueError, match=message):  # given for once
        make(**changes).generate_latents(torch.tensor([1]), sampling=DiffusionSampling(guidance_scale=2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_dropout": 1.5}, r"label_dropout=1.5 is a share"),
        ({"frame_prediction": 0.5, "past_latents": (3,)}, r"past_latents=\(3,\): a clip of 3 latent frames"),
        ({"frame_prediction": 0.5, "past_latents": ()}, r"how many latent frames are given"),
        ({"process": "rectified_flow", "min_snr": 5.0}, r"min_snr weighs the levels of process=diffusion alone"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_windows_of_a_curriculum_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"leave --curriculum\.schedule at `longest`"):
        make().training_step(random_batch(window_start=0, window_frames=5, margin_before=0), 0)


# Latents


def test_latents_of_the_measured_clips_have_mean_0_and_deviation_1(make: Make) -> None:
    module = make()
    parts = [module.encode_latents(random_video(key=key)) for key in range(3)]
    module.fit_latent_statistics(parts)
    normalised = module.normalised(torch.cat(parts)).double()
    assert torch.allclose(normalised.mean((0, 2, 3, 4)), torch.zeros(12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(normalised.std((0, 2, 3, 4), correction=0), torch.ones(12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(module.denormalised(module.normalised(parts[0])), parts[0], atol=1e-6)


def test_latents_that_are_constant_are_refused(make: Make) -> None:
    latents = torch.randn(2, 12, 3, 4, 4, generator=keyed_generator(1))
    latents[:, 4] = 0.5
    with pytest.raises(ValueError, match=r"Channels \[4\] .* are constant: it is not trained"):
        make().fit_latent_statistics([latents])


def test_pixels_and_cached_latents_give_the_same_loss(make: Make) -> None:
    module, batch = make(), random_batch()
    cached = {"latents": module.encode_latents(batch["video"]), "label": batch["label"]}
    assert module.training_step(batch, 0) == module.training_step(cached, 0)


def test_a_sample_before_training_is_refused(make: Make) -> None:
    module = make()
    module.latent_std.zero_()
    with pytest.raises(ValueError, match="knows no statistics of its latents"):
        module.generate(Condition(), 9, torch.tensor([1]))


def test_stacks_of_images_are_encoded_one_by_one(make: Make) -> None:
    module = make(joint_images=True)
    video, is_image = random_video(3), torch.tensor([True, False, True])
    latents = module.encode_latents(video, is_image)
    for row in (0, 2):
        for frame in range(3):
            alone = module.tokenizer.encode(video[row : row + 1, :, frame : frame + 1]).latents[0, :, 0]
            assert torch.allclose(latents[row, :, frame], alone)
    assert torch.equal(latents[1:2], module.tokenizer.encode(video[1:2]).latents)


# Training


def test_the_loss_of_a_step_does_not_depend_on_what_came_before(make: Make) -> None:
    batch = random_batch()
    fresh = attach(make(), step=5).training_step(batch, 2)
    used = make()
    for step in range(3):
        attach(used, step=step).training_step(random_batch(4), step)
    torch.rand(7)  # someone draws from the global stream
    assert attach(used, step=5).training_step(batch, 2) == fresh
    others = {attach(used, step=step).training_step(batch, index).item() for step, index in ((5, 1), (4, 2))}
    assert len(others | {fresh.item()}) == 3


def test_ranks_together_train_on_what_one_process_with_all_clips_does(make: Make) -> None:
    module, batch = make(frame_prediction=0.5), random_batch(4)
    losses = []
    for rank in range(2):
        part = {name: value[2 * rank :][:2] for name, value in batch.items()}
        losses.append(attach(module, rank, 2, step=6).training_step(part, 1).item())
    assert losses[0] != losses[1]
    assert sum(losses) / 2 == pytest.approx(attach(module, 0, 1, step=6).training_step(batch, 1).item(), rel=1e-5)


def test_the_untrained_model_predicts_no_velocity(continuous_tokenizer: Path) -> None:
    module = attach(WALTModule(str(continuous_tokenizer), **TOY))
    latents = torch.randn(16, 12, 3, 4, 4, generator=keyed_generator(1))
    noise = torch.randn(16, 12, 3, 4, 4, generator=keyed_generator(2))
    errors = module.squared_errors(latents, noise, torch.arange(0, 1000, 63), label=torch.zeros(16, dtype=torch.long))
    assert errors.mean().item() == pytest.approx(1, abs=0.05)  # the variance of a velocity, from 9,216 draws


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_self_conditioning_runs_the_network_once_more_without_gradient(make: Make, share: float) -> None:
    module = make(self_conditioning=share)
    seen = calls(module)
    for step in range(4):
        attach(module, step=step).training_step(random_batch(), 0)
    assert len(seen) == (8 if share else 4)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        if share:
            assert first.get("estimate") is None
            assert not first["grad"]
            levels = tuple(level.view(-1, 1, 1, 1, 1) for level in module.process.levels(first["times"]))
            assert torch.equal(second["estimate"], module.process.clean(first["noisy"], first["out"], levels))
            assert not second["estimate"].requires_grad
        assert second["grad"]


def test_self_conditioning_is_decided_for_all_ranks_at_once_and_as_often_as_asked(make: Make) -> None:
    module = make(self_conditioning=0.5)
    seen = calls(module)
    counts = []
    for step in range(40):
        for rank in range(2):
            before = len(seen)
            attach(module, rank, 2, step).training_step(random_batch(1), 0)
            counts.append(len(seen) - before)
    assert counts[::2] == counts[1::2]
    assert 12 <= counts[::2].count(2) <= 28  # 20 +- 2.5 sigma


@pytest.mark.parametrize(("share", "expected"), [(0.0, [0, 1, 2, 3]), (1.0, [5, 5, 5, 5])])
def test_labels_are_dropped_as_often_as_asked(make: Make, share: float, expected: list[int]) -> None:
    module = make(label_dropout=share)
    seen = calls(module)
    module.training_step(random_batch(4), 0)
    assert all(call["label"].tolist() == expected for call in seen)


def test_the_frame_condition_is_the_clean_past_and_its_mask(make: Make) -> None:
    module = make(frame_prediction=0.6)
    latents = torch.randn(4, 12, 3, 4, 4, generator=keyed_generator(1))
    past = module.past_channels(latents, torch.tensor([0, 1, 2, 1]))
    mask = past[:, -1]
    assert mask[:, :, 0, 0].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert torch.equal(past[:, :-1], latents * mask[:, None])
    uniform = torch.rand(4, 7, 4, 4, generator=keyed_generator(2))
    nothing = module.network(latents, torch.arange(4), past=torch.zeros_like(past))
    assert torch.equal(module.network(latents, torch.arange(4)), nothing)
    dropped = module._random_past(latents, torch.full((4,), 0.6), uniform[:, 0, 0, 0], None)
    assert not dropped.any()


def test_frames_are_given_as_often_and_as_many_as_asked(make: Make) -> None:
    module = make(frame_prediction=0.25, past_latents=(1, 2))
    uniform = torch.rand(400, 2, generator=keyed_generator(2))
    past = module._random_past(torch.ones(400, 12, 3, 1, 1), uniform[:, 0], uniform[:, 1], None)
    counts = past[:, -1, :, 0, 0].sum(1).long().bincount(minlength=4) / 400
    assert counts.tolist() == pytest.approx([0.75, 0.125, 0.125, 0], abs=0.05)
    images = module._random_past(
        torch.ones(400, 12, 3, 1, 1), uniform[:, 0], uniform[:, 1], torch.ones(400, dtype=torch.bool)
    )
    assert not images.any()
    assert make()._random_past(torch.ones(4, 12, 3, 1, 1), uniform[:4, 0], uniform[:4, 1], None) is None


def test_images_and_videos_train_together_each_with_its_labels(make: Make) -> None:
    module = make(joint_images=True, label_dropout=0.0)
    seen = calls(module)
    is_image = torch.tensor([True, False])
    labels = torch.tensor([[4, 2, 0], [1, 1, 1]])
    module.training_step(random_batch(is_image=is_image, frame_label=labels), 0)
    assert torch.equal(seen[-1]["label"], labels)
    assert torch.equal(seen[-1]["is_image"], is_image)


def test_images_are_clips_of_one_frame(make: Make) -> None:
    module = make(num_frames=1)
    batch = {"video": random_video(frames=1), "label": torch.tensor([0, 1]), "is_image": torch.tensor([True, True])}
    assert module.training_step(batch, 0).isfinite()
    assert module.generate(Condition(), 1, torch.tensor([3])).shape == (1, 3, 1, 32, 32)


def test_min_snr_weights_the_errors_and_is_off_by_default(make: Make) -> None:
    assert make().min_snr is None
    plain, weighted = make(), make(min_snr=5.0)
    seen = calls(weighted)
    loss = weighted.training_step(random_batch(1), 0)
    weight = min_snr_weight(weighted.process.levels(seen[-1]["times"])[0], 5.0, floor=0.01)
    error = plain.training_step(random_batch(1), 0)
    assert loss.item() == pytest.approx((weight * error).item(), rel=1e-5)
    assert weighted.logged["train/mse"] == pytest.approx(error.item(), rel=1e-5)


def test_rectified_flow_trains_and_samples(make: Make) -> None:
    module = make(process="rectified_flow", flow_shift=2.0)
    assert module.training_step(random_batch(), 0).isfinite()
    assert module.generate(Condition(), 9, torch.tensor([1])).isfinite().all()


def test_one_batch_is_learned_by_heart(continuous_tokenizer: Path) -> None:
    torch.manual_seed(0)
    settings = {"num_frames": 5, "dim": 64, "num_heads": 4, "lr": 5e-3, "lr_schedule": "constant", "warmup_steps": 0}
    module = WALTModule(str(continuous_tokenizer), **(TOY | settings))
    module.load_tokenizer()
    batch = {"video": random_video(8, frames=5), "label": torch.zeros(8, dtype=torch.long)}
    module.fit_latent_statistics([module.encode_latents(batch["video"])])
    batch["video"] = batch["video"][:1].expand(8, -1, -1, -1, -1)
    optimizer = attach(module).configure_optimizers()["optimizer"]
    losses = []
    for step in range(160):
        loss = attach(module, step=step).training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.2)
    assert sum(losses[-10:]) / 10 < losses[0] / 10


def test_only_weights_of_linear_layers_decay(make: Make) -> None:
    module = make(weight_decay=0.25)
    decayed, rest = module.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    ids = {id(parameter) for parameter in decayed["params"]}
    names = [name for name, parameter in module.network.named_parameters() if id(parameter) in ids]
    assert all(name.endswith("weight") and "norm" not in name for name in names)
    assert "class_embedding.weight" not in names
    assert len(decayed["params"]) + len(rest["params"]) == len(list(module.network.parameters()))


# Validation


def test_validation_repeats_its_noise_and_is_the_mean_over_its_levels(make: Make) -> None:
    module, batch = make(frame_prediction=1.0), random_batch()
    attach(module, step=0).validation_step(batch, 0)
    first = module.logged
    attach(module, step=9).validation_step(batch, 0)
    assert module.logged == first
    levels = [f"val/loss_{level}" for level in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert first.keys() == {*levels, "val/loss"}
    assert first["val/loss"] == pytest.approx(sum(first[level] for level in levels) / 6, rel=1e-5)
    attach(module, step=9).validation_step(batch, 1)
    assert module.logged != first


def test_validation_reaches_pure_noise_and_gives_the_conditions(make: Make) -> None:
    module = make(frame_prediction=1.0)
    seen = calls(module)
    module.validation_step(random_batch(), 0)
    assert [int(call["times"][0]) for call in seen] == [100, 300, 500, 700, 900, 999]
    assert all(call["label"].tolist() == [0, 1] for call in seen)
    assert all(call["past"][:, -1, :, 0, 0].tolist() == [[1, 1, 0]] * 2 for call in seen)


# Generation


def test_generated_videos_are_a_function_of_their_seeds_and_labels(make: Make) -> None:
    module, seeds = make(), torch.tensor([5, 6])
    labels = Condition(torch.tensor([1, 1]))
    video = module.generate(labels, 9, seeds)
    torch.rand(3)
    assert torch.equal(module.generate(labels, 9, seeds), video)
    assert video.shape == (2, 3, 9, 32, 32)
    assert video.abs().max() <= 1
    assert not torch.equal(video[0], video[1])
    assert not torch.equal(module.generate(Condition(torch.tensor([2, 1])), 9, seeds)[0], video[0])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_does_not_depend_on_its_batch(make: Make, eta: float) -> None:
    module = make(sampling=DiffusionSampling(num_steps=3, eta=eta, guidance_scale=2.0))
    together = module.generate(Condition(), 9, torch.tensor([5, 6, 7]))
    assert torch.allclose(module.generate(Condition(), 9, torch.tensor([7, 5])), together[[2, 0]], atol=1e-4)
    assert torch.allclose(module.generate(Condition(), 9, torch.tensor([6])), together[1:2], atol=1e-4)


def test_missing_labels_are_drawn_from_the_seeds(make: Make) -> None:
    module = make()
    seen = calls(module)
    module.generate(Condition(), 9, torch.arange(40))
    labels = seen[0]["label"]
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    module.generate(Condition(), 9, torch.tensor([7, 3]))
    assert seen[-1]["label"].tolist() == labels[[7, 3]].tolist()
    assert all(torch.equal(call["label"], labels) for call in seen[:3])


def test_guidance_asks_the_network_without_its_conditions(make: Make) -> None:
    module = make(frame_prediction=0.5, sampling=DiffusionSampling(num_steps=2, guidance_scale=3.0))
    seen = calls(module)
    module.generate(Condition(torch.tensor([1]), random_video(1, 5)), 9, torch.tensor([5]))
    assert ["label" in call for call in seen] == [True, False, True, False]
    assert ["past" in call for call in seen] == [True, False, True, False]
    assert torch.equal(seen[2]["estimate"], seen[3]["estimate"])  # both see the guided estimate
    assert seen[2]["estimate"].any()


def test_known_frames_reach_the_network_as_clean_latents(make: Make) -> None:
    module = make(frame_prediction=1.0)
    seen = calls(module)
    video = random_video(2, 9)
    module.generate(Condition(video=video[:, :, :5]), 9, torch.tensor([5, 6]))
    latents = module.normalised(module.encode_latents(video))
    expected = module.past_channels(latents, torch.tensor([2, 2]))
    assert all(torch.allclose(call["past"], expected, atol=1e-6) for call in seen)


def test_long_videos_go_on_from_their_last_five_frames(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that knows the truth, k extensions are the truth: 9 + 4k frames, for 17 + 12k of 17."""
    module = make(frame_prediction=0.5)
    truth = random_video(2, 9 + 3 * 4)
    pasts = []

    def oracle(seeds: Tensor, label: Tensor, past: Tensor | None, sampling: Any, part: int = 0) -> Tensor:
        pasts.append(past)
        return module.normalised(module.encode_latents(truth[:, :, 4 * part : 4 * part + 9]))

    monkeypatch.setattr(module, "generate_latents", oracle)
    video = module.generate(Condition(), 21, torch.tensor([1, 2]))
    assert torch.allclose(video, truth, atol=1e-5)
    assert pasts[0] is None
    for part in range(1, 4):
        last = truth[:, :, 4 * part : 4 * part + 5]
        assert torch.allclose(pasts[part], module.normalised(module.encode_latents(last)), atol=1e-5)


def test_extensions_have_noise_of_their_own_and_leave_the_beginning(make: Make) -> None:
    module, seeds = make(frame_prediction=0.5), torch.tensor([1, 2])
    seen = calls(module)
    longer = module.generate(Condition(), 13, seeds)
    assert longer.shape[2] == 13
    assert torch.equal(longer[:, :, :9], module.generate(Condition(), 9, seeds))
    assert not torch.equal(seen[0]["noisy"], seen[3]["noisy"])


@pytest.mark.parametrize(
    ("changes", "frames", "message"),
    [
        ({}, 13, "this model makes clips of 9 frames"),
        ({"frame_prediction": 0.5, "past_latents": (1,)}, 13, "this model makes clips of 9 frames"),
        ({"frame_prediction": 0.5}, 15, r"9 frames, and 4 more for each extension. Nearest: 13 or 17"),
        ({"frame_prediction": 0.5}, 5, r"Nearest: 9 or 13 \(--num_frames\)"),
    ],
)
def test_a_length_that_cannot_be_made_is_refused(make: Make, changes: dict, frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"num_frames={frames} cannot be generated: .*{message}"):
        make(**changes).generate(Condition(), frames, torch.tensor([1]))


@pytest.mark.parametrize(
    ("changes", "condition", "message"),
    [
        ({"num_classes": 0}, Condition(torch.tensor([1])), "has no classes"),
        ({}, Condition(video=random_video(1, 5)), "predicts no frames"),
        (
            {"frame_prediction": 0.5},
            Condition(video=random_video(1, 9)),
            r"9 frames are known; .* trained with \[1, 5\]",
        ),
        ({"frame_prediction": 1.0}, Condition(), "never trained without their first frames"),
    ],
)
def test_conditions_that_the_model_does_not_know_are_refused(
    make: Make, changes: dict, condition: Condition, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes).generate(condition, 9, torch.tensor([1]))


@pytest.mark.parametrize("cached", [False, True])
def test_callbacks_see_samples_with_the_conditions_of_the_batch(make: Make, cached: bool) -> None:
    module, batch = make(frame_prediction=1.0), random_batch(3)
    seen = calls(module)
    past = module.past_channels(module.batch_latents(batch)[:2], torch.tensor([2, 2]))
    if cached:
        batch["latents"] = module.encode_latents(batch.pop("video"))
    assert module.sample_videos(batch, torch.tensor([4, 5])).shape == (2, 3, 9, 32, 32)
    assert seen[0]["label"].tolist() == [0, 1]
    assert torch.allclose(seen[0]["past"], past, atol=1e-5)


# A fit


def fit(module: WALTModule, steps: int, folder: Path, **options: Any) -> None:
    """Train; checkpoints of every third step lie in the folder."""
    data = MovingShapesDataModule(num_train=8, num_val=2, num_frames=9, resolution=32, batch_size=2, seed=1)
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, **options)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_statistics_are_measured_when_a_run_begins_and_come_from_the_checkpoint_when_it_goes_on(
    continuous_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TOY | {"num_classes": 12, "statistics_clips": 4}
    module = WALTModule(str(continuous_tokenizer), **settings)
    fit(module, 3, tmp_path / "first")
    data = MovingShapesDataModule(num_train=8, num_val=2, num_frames=9, resolution=32, batch_size=2, seed=1)
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(2), strict=False)]
    latents = torch.cat([module.encode_latents(batch["video"]) for batch in batches])
    assert torch.allclose(module.latent_std, latents.std((0, 2, 3, 4), correction=0), atol=1e-6)

    resumed = WALTModule(str(continuous_tokenizer), **settings)
    monkeypatch.setattr(resumed, "fit_latent_statistics", None)  # a call would fail
    fit(resumed, 4, tmp_path / "second", ckpt_path=tmp_path / "first/step=3.ckpt", weights_only=True)
    assert torch.equal(resumed.latent_std, module.latent_std)


def test_without_a_data_module_the_statistics_have_to_be_given(continuous_tokenizer: Path) -> None:
    module = WALTModule(str(continuous_tokenizer), **TOY)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", **quiet)
    loader = DataLoader([random_batch()], batch_size=None)
    with pytest.raises(ValueError, match=r"call fit_latent_statistics\(latents\) first"):
        trainer.fit(module, loader, loader)


def test_a_checkpoint_made_without_the_command_line_is_plain_and_loads(
    continuous_tokenizer: Path, tmp_path: Path
) -> None:
    sampling = DiffusionSampling(num_steps=2, guidance_scale=2.0, guidance_interval=(0.1, 0.9))
    module = WALTModule(str(continuous_tokenizer), **(TOY | {"num_classes": 12, "sampling": sampling}))
    fit(module, 3, tmp_path / "run")
    torch.load(tmp_path / "run/step=3.ckpt", weights_only=True)
    loaded = WALTModule.load_from_checkpoint(tmp_path / "run/step=3.ckpt")
    assert (loaded.sampling.num_steps, loaded.sampling.guidance_scale) == (2, 2.0)
    seeds = torch.tensor([2])
    assert torch.equal(loaded.generate(Condition(), 9, seeds), module.generate(Condition(), 9, seeds))
