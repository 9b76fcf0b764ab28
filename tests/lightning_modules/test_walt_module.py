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
from experiments.cascade import cascade, check_stages
from lightning_modules import WALTModule, generator
from lightning_modules.generator import Condition
from lightning_modules.walt import WALTCondition
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
    message = r"makes \(2, 4, 4\) latents of 9 frames, the model expects \(3, 4, 4\): one of the two is causal"
    with pytest.raises(ValueError, match=message):
        module.load_tokenizer()


@pytest.mark.parametrize(("frames", "nearest"), [(16, "13 or 17"), (18, "17 or 21"), (2, "1 or 5"), (0, "1 or 5")])
def test_a_clip_that_is_not_one_plus_four_k_frames_is_refused(make: Make, frames: int, nearest: str) -> None:
    message = rf"num_frames={frames} does not fit a causal tokenizer: it takes 1 \+ 4k frames. Nearest: {nearest}"
    with pytest.raises(ValueError, match=message):
        make(num_frames=frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition_dropout": 0.0}, "trained with its label alone; set --model.condition_dropout above 0"),
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
        ({"condition_dropout": 1.5}, r"condition_dropout=1.5 is a share"),
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
    module = make(condition_dropout=share)
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
    module = make(joint_images=True, condition_dropout=0.0)
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
    module.generate(Condition(torch.tensor([1]), video=random_video(1, 5)), 9, torch.tensor([5]))
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

    def oracle(seeds: Tensor, given: Any, past: Tensor | None, low_res: Any, sampling: Any, part: int) -> Tensor:
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


# Text


TEXT = {"text": "bytes", "text_dim": 32, "text_tokens": 16, "num_classes": 0}


def test_texts_reach_the_network_and_their_encoder_learns(make: Make) -> None:
    module = make(**TEXT, condition_dropout=0.0)
    seen = calls(module)
    module.training_step(random_batch(text=["a cat", "rain"]), 0).backward()
    vectors, mask = module.network.text_encoder(["a cat", "rain"])
    assert torch.allclose(seen[-1]["text"], vectors)
    assert torch.equal(seen[-1]["text_mask"], mask)
    assert module.network.text_encoder.embedding.weight.grad.any()
    optimized = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert {id(parameter) for parameter in module.network.text_encoder.parameters()} <= optimized


def test_a_dropped_text_has_no_token(make: Make) -> None:
    module = make(**TEXT, condition_dropout=1.0)
    seen = calls(module)
    losses = [module.training_step(random_batch(text=texts), 0) for texts in (["a cat", "rain"], ["snow", "a dog"])]
    assert not seen[-1]["text_mask"].any()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert make(**TEXT, condition_dropout=0.0).training_step(random_batch(text=["a cat", "rain"]), 0) != losses[0]


def test_images_have_their_captions_and_videos_theirs_for_all_frames(make: Make) -> None:
    module = make(**TEXT, joint_images=True, condition_dropout=0.0)
    seen = calls(module)
    texts = [["one", "two", "three"], ["four"] * 3]
    module.training_step(
        random_batch(is_image=torch.tensor([True, False]), text=["one", "four"], frame_text=texts), 0
    ).backward()
    for row, frame in ((0, 1), (1, 2)):
        vectors, _ = module.network.text_encoder([texts[row][frame]])
        found = seen[-1]["text"][row, frame][seen[-1]["text_mask"][row, frame]]
        assert torch.allclose(found, vectors[0], atol=1e-5)


def test_a_prompt_is_weighed_by_guidance_against_no_text(make: Make) -> None:
    module = make(**TEXT, sampling=DiffusionSampling(num_steps=1, guidance_scale=3.0))
    seen = calls(module)
    video = module.generate(WALTCondition(text=["a cat"]), 9, torch.tensor([5]))
    assert [bool(call["text_mask"].any()) for call in seen] == [True, False]
    assert not torch.equal(module.generate(WALTCondition(text=["a dog"]), 9, torch.tensor([5])), video)
    assert torch.equal(
        module.sample_videos(random_batch(text=["a cat", "rain"]), torch.tensor([5, 6]))[0].argmax(), video[0].argmax()
    )


def test_missing_and_needless_texts_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"reads text, and the batches hold none: give data with captions"):
        make(**TEXT).training_step(random_batch(), 0)
    with pytest.raises(ValueError, match=r"reads text: give a prompt \(--text\)"):
        make(**TEXT).generate(Condition(), 9, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"reads no text: generate it without a prompt"):
        make().generate(WALTCondition(text=["a cat"]), 9, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"was trained with its text alone; set --model.condition_dropout above 0"):
        make(**TEXT, condition_dropout=0.0, sampling=DiffusionSampling(guidance_scale=2.0))


# Super-resolution


@pytest.fixture
def enlarger(make: Make, continuous_tokenizer: Path) -> Make:
    """Toy stages that enlarge 16 x 16 pixels to 32 x 32."""

    def build(**changes: Any) -> WALTModule:
        module = make(low_res_tokenizer=str(continuous_tokenizer), **changes)
        module.low_res_mean.fill_(0.2)
        module.low_res_std.fill_(0.4)
        return module

    return build


def test_a_stage_is_given_the_clip_at_half_its_size_with_noise(enlarger: Make) -> None:
    module, batch = enlarger(low_res_max_time=0.0), random_batch()
    seen = calls(module)
    loss = module.training_step(batch, 0)
    small = torch.nn.functional.avg_pool3d(batch["video"], (1, 2, 2))
    clean = (module.tokenizer.encode(small).latents - 0.2) / 0.4
    assert seen[-1]["low_res_times"].tolist() == [0, 0]
    assert seen[-1]["low_res"].shape == (2, 12, 3, 2, 2)
    assert (seen[-1]["low_res"] - clean).abs().max() < 0.05  # at time 0 there is 0.01 of noise
    assert module.training_step(batch | {"low_res": small}, 0) == loss
    assert module.training_step(batch | {"low_res": -small}, 0) != loss


def test_the_noise_of_the_low_resolution_is_as_strong_as_asked(enlarger: Make) -> None:
    module = enlarger(low_res_max_time=300.0, self_conditioning=0.0)
    seen = calls(module)
    for step in range(20):
        attach(module, step=step).training_step(random_batch(), 0)
    times = torch.stack([call["low_res_times"] for call in seen])
    assert times.min() < 60
    assert 240 < times.max() <= 300
    seen.clear()
    sampling = DiffusionSampling(num_steps=2, low_res_time=100.0, guidance_scale=2.0)
    low_res = random_video(1)[..., ::2, ::2]
    module.generate(WALTCondition(low_res=low_res), 9, torch.tensor([4]), sampling)
    assert len(seen) == 4
    assert all(call["low_res_times"].tolist() == [100] for call in seen)
    assert all(torch.equal(call["low_res"], seen[0]["low_res"]) for call in seen)  # the unconditional ones too
    assert ["label" in call for call in seen] == [True, False, True, False]


def test_a_stage_depends_on_what_it_enlarges_and_on_its_seed_alone(enlarger: Make) -> None:
    module, seeds = enlarger(), torch.tensor([4, 5])
    low_res = random_video()[..., ::2, ::2]
    label = torch.tensor([1, 2])
    video = module.generate(WALTCondition(label, low_res=low_res), 9, seeds)
    assert video.shape == (2, 3, 9, 32, 32)
    alone = module.generate(WALTCondition(label[1:], low_res=low_res[1:]), 9, seeds[1:])
    assert torch.allclose(alone, video[1:], atol=1e-4)
    other = module.generate(WALTCondition(label, low_res=-low_res), 9, seeds)
    assert not torch.allclose(other, video, atol=1e-2)


def test_validation_gives_the_low_resolution_with_the_noise_of_sampling(enlarger: Make) -> None:
    module = enlarger()
    seen = calls(module)
    module.validation_step(random_batch(), 0)
    assert all(call["low_res_times"].tolist() == [100, 100] for call in seen)


def test_a_cascade_hands_on_latents_and_its_extensions_go_on(make: Make, enlarger: Make) -> None:
    base = make(frame_prediction=0.5, resolution=16)
    for stage, more in ((enlarger(), set()), (enlarger(frame_prediction=0.5), {"past"})):
        stage.low_res_digest = base.tokenizer_digest
        check_stages([base, stage], ["base", "2x"])
        seen = calls(stage)
        small, large = cascade([base, stage], 13, torch.tensor([7]), torch.tensor([3]))
        assert [clip.shape for clip in small] == [(1, 12, 3, 2, 2)] * 2
        assert stage.joined(large).shape == (1, 3, 13, 32, 32)
        clean = [(clip - 0.2) / 0.4 for clip in small]
        signal = stage.process.levels(torch.tensor(100.0))[0]
        for call, part in ((seen[0], 0), (seen[3], 1)):
            assert (call["low_res"] - signal * clean[part]).std() == pytest.approx(0.32, abs=0.1)  # the noise is left
        assert more <= seen[3].keys()


def test_stages_that_do_not_fit_are_refused(make: Make, enlarger: Make) -> None:
    base, stage = make(resolution=16), enlarger()
    for stages, message in (
        ([stage, stage], "a is a super-resolution stage: give the base model first"),
        ([base, make()], "b is no super-resolution stage"),
        ([make(), stage], r"b enlarges \(3, 2, 2\) latents of 9 frames, the stage before makes \(3, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_stages(stages, ["a", "b"])
    stage.low_res_digest = "another"
    with pytest.raises(ValueError, match="was trained to enlarge what another tokenizer makes"):
        check_stages([base, stage], ["a", "b"])
    with pytest.raises(ValueError, match="`longtake cascade` runs the stages"):
        stage.generate(Condition(), 9, torch.tensor([1]))
    with pytest.raises(ValueError, match="enlarges nothing"):
        base.generate(WALTCondition(low_res=random_video()), 9, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"enlarges 1 clips of \(3, 2, 2\) latents to so many frames, and got 2"):
        stage.generate_clips(Condition(), 9, torch.tensor([1]), low_res=[torch.zeros(1, 12, 3, 2, 2)] * 2)
    with pytest.raises(ValueError, match="trains from pixels"):
        stage.training_step({"latents": torch.zeros(1, 12, 3, 4, 4), "label": torch.tensor([0])}, 0)


def test_a_low_res_tokenizer_that_does_not_fit_is_refused(make: Make, tokenizer_bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"makes no continuous latents .* 16 x 16 pixels, and this stage doubles"):
        make(low_res_tokenizer=str(tokenizer_bundle))
    with pytest.raises(FileNotFoundError, match=r"--model\.low_res_tokenizer"):
        make(low_res_tokenizer="nowhere")


# Other shapes


def test_a_wide_model_trains_and_samples_and_refuses_squares(make: Make) -> None:
    module = make(width=64)
    wide = random_batch()
    wide["video"] = torch.cat([wide["video"]] * 2, dim=4)
    assert module.training_step(wide, 0).isfinite()
    assert module.generate(Condition(), 9, torch.tensor([1])).shape == (1, 3, 9, 32, 64)
    with pytest.raises(ValueError, match=r"has \(3, 4, 4\) latents, the model expects \(3, 4, 8\): .* 32 x 64 pixels"):
        module.training_step(random_batch(), 0)
    with pytest.raises(ValueError, match=r"width=60 is no multiple of the tokenizer's 8 \(--model.width\)"):
        make(width=60)


def test_adafactor_moves_gates_that_begin_at_zero(continuous_tokenizer: Path) -> None:
    module = WALTModule(str(continuous_tokenizer), **TOY, optimizer="adafactor", lr=1e-2, warmup_steps=0)
    module.load_tokenizer()
    module.latent_std.fill_(0.5)
    optimizer = attach(module).configure_optimizers()["optimizer"]
    for step in range(2):
        attach(module, step=step).training_step(random_batch(), 0).backward()
        optimizer.step()
    assert module.network.head.weight.abs().max() > 1e-3  # scaled by the weights' size, it would be 1e-5


# Tasks of the command `sample`


def test_tasks_and_labels_are_those_of_the_training(make: Make) -> None:
    module = make(frame_prediction=0.5)
    assert module.checked_task(None, 4) is None
    assert not module.needs_clips(None)
    assert module.needs_clips(module.checked_task("image_to_video"))
    assert make(frame_prediction=1.0, past_latents=(2,)).checked_task(None) == "frame_prediction"
    for changes, arguments, message in (
        ({}, ("frame_prediction",), r"task=frame_prediction is none of this model's \(--task\): it has none"),
        ({"frame_prediction": 0.5, "past_latents": (2,)}, ("image_to_video",), "this model's .*: frame_prediction"),
        ({}, (None, 5), r"label=5: this model has 5 classes, from 0 on \(--label\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes).checked_task(*arguments)


@pytest.mark.parametrize(("task", "known"), [("image_to_video", 1), ("frame_prediction", 2)])
def test_sampling_goes_on_from_the_first_frames_of_a_clip(make: Make, task: str, known: int) -> None:
    module, batch = make(frame_prediction=0.5), random_batch()
    seen = calls(module)
    out = module.predict_step(batch | {"seeds": torch.tensor([3, 4]), "num_frames": 9, "task": task}, 0)
    pieces = list(out["pieces"])
    expected = module.past_channels(module.batch_latents(batch), torch.full((2,), known))
    assert torch.allclose(seen[0]["past"], expected, atol=1e-5)
    assert [piece.shape for piece in pieces] == [(2, 3, 9, 32, 32)]


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


def test_statistics_of_cached_latents_are_those_of_the_cache(make: Make) -> None:
    module = make()
    module.latent_std.zero_()
    batch = {"latents": torch.zeros(1, 12, 3, 4, 4), "label": torch.tensor([0])}
    cache = SimpleNamespace(
        train_dataloader=lambda: [batch], latent_statistics=lambda: (torch.arange(12.0), torch.full((12,), 2.0))
    )
    module._trainer = SimpleNamespace(datamodule=cache, world_size=1)
    module.on_fit_start()
    assert module.latent_mean.tolist() == list(range(12))
    assert module.latent_std.tolist() == [2.0] * 12


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_wide_model_starts_from_a_square_one(continuous_tokenizer: Path, tmp_path: Path) -> None:
    settings = TOY | {"num_classes": 12, "statistics_clips": 4}
    square = WALTModule(str(continuous_tokenizer), **settings)
    fit(square, 3, tmp_path / "square")
    file = tmp_path / "square/step=3.ckpt"
    wide = WALTModule(str(continuous_tokenizer), **settings, width=64)
    wide.load_tokenizer()
    wide.start_from(file)
    assert torch.equal(wide.latent_std, square.latent_std)
    weights = [m.network.layers[0].mlp[0].weight for m in (wide, square)]
    assert torch.equal(*weights)
    ends = [m.network.spatial_positions[:, [0, -1]] for m in (wide, square)]
    assert torch.allclose(*ends, atol=1e-6)
    wide.tokenizer_digest = "another"
    with pytest.raises(ValueError, match=r"was not trained on the tokenizer .*--model.init_from"):
        wide.start_from(file)
