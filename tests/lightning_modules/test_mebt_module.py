"""MeBT's training, validation and sampling: windows, masks, the optimizer, and what a sample depends on."""

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

from datamodules import MovingShapesDataModule
from datamodules.sampler import ClipRequest, Curriculum, collate_clips
from lightning_modules import MeBTModule
from lightning_modules.generator import Condition
from models.priors.decoding import DraftAndRevise
from models.priors.mebt import SampleMask, mask_window
from models.random import keyed_generator
from models.weights import load_tokenizer

TOY = {
    "num_frames": 16,
    "resolution": 32,
    "codebook_size": 16,
    "dim": 16,
    "num_heads": 2,
    "num_latents": 4,
    "blocks": ["latent_enc", "latent_self", "latent_dec", "lt2l", "latent_dec"],
    "sampling": DraftAndRevise(num_steps=4),
    "seed": 3,
}


def make_module(tokenizer_bundle: Path, **changes: Any) -> MeBTModule:
    """A toy MeBT whose weights are large enough for its predictions to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MeBTModule(str(tokenizer_bundle), **(TOY | changes))
        for parameter in module.network.parameters():
            nn.init.normal_(parameter, std=0.3)
    module.load_tokenizer()
    return attach(module)


def attach(module: MeBTModule, rank: int = 0, world_size: int = 1, step: int = 0) -> MeBTModule:
    """Give the module a stand-in for the Trainer, and keep what it logs in `module.logged`."""
    module._trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, global_step=step, estimated_stepping_batches=10
    )
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, torch.as_tensor(value).item())
    module.logged = logged
    return module


@pytest.fixture
def module(tokenizer_bundle: Path) -> MeBTModule:
    return make_module(tokenizer_bundle)


def random_codes(batch_size: int = 2, frames: int = 4) -> Tensor:
    return torch.randint(16, (batch_size, frames, 4, 4), generator=keyed_generator(8))


# Windows of long clips


@pytest.fixture(scope="module")
def long_clips() -> MovingShapesDataModule:
    data = MovingShapesDataModule(num_train=2, num_val=1, num_frames=128, resolution=32, batch_size=2, seed=1)
    data.setup("fit")
    return data


def window_batch(data: MovingShapesDataModule, start: int, frames: int, margin: int | None) -> dict[str, Any]:
    """The batch that a curriculum with such a margin makes of a window."""
    curriculum = Curriculum(lambda step: frames, margin, frame_multiple=4)
    windows = (curriculum.window(data.seed, step, data.num_frames) for step in range(1000))
    window = next(window for window in windows if window["window_start"] == start)
    return collate_clips([data.datasets["train"][ClipRequest(index, **window)] for index in range(2)])


@pytest.mark.parametrize(("start", "frames"), [(0, 16), (4, 16), (56, 4), (60, 32), (108, 16), (112, 16), (0, 128)])
def test_codes_of_a_window_are_those_of_the_whole_clip(
    tokenizer_bundle: Path, long_clips: MovingShapesDataModule, start: int, frames: int
) -> None:
    module = make_module(tokenizer_bundle, num_frames=128)
    margin = module.tokenizer.context_frames()
    assert margin is not None
    clips = collate_clips([long_clips.datasets["train"][ClipRequest(index)] for index in range(2)])
    whole = load_tokenizer(tokenizer_bundle).encode(clips["video"]).codes  # [2, 32, 4, 4]
    batch = window_batch(long_clips, start, frames, margin)
    codes, first = module.window_codes(batch)
    assert first == start // 4
    assert torch.equal(codes, whole[:, first : first + frames // 4])
    assert batch["video"].shape[2] <= frames + 2 * margin  # and not because all of it was read
    assert len(codes.unique()) > 1


def test_without_a_margin_codes_at_the_edges_of_a_window_differ(
    tokenizer_bundle: Path, long_clips: MovingShapesDataModule
) -> None:
    module = make_module(tokenizer_bundle, num_frames=128)
    margin = module.tokenizer.context_frames()
    differ = [
        not torch.equal(
            module.window_codes(window_batch(long_clips, start, 16, 0))[0],
            module.window_codes(window_batch(long_clips, start, 16, margin))[0],
        )
        for start in (4, 56, 108)
    ]
    assert any(differ)


def test_pixels_and_cached_codes_give_the_same_loss(tokenizer_bundle: Path, long_clips: MovingShapesDataModule) -> None:
    module = make_module(tokenizer_bundle, num_frames=128)
    pixels = window_batch(long_clips, 56, 16, module.tokenizer.context_frames())
    window = {name: pixels[name] for name in ("window_start", "window_frames")}
    cached = {"codes": module.window_codes(pixels)[0], "margin_before": 0, **window}
    assert module.training_step(pixels, 0) == module.training_step(cached, 0)


def test_a_window_is_predicted_at_its_own_place_in_the_clip(module: MeBTModule) -> None:
    clip = random_codes()
    window, start, num_masked = clip[:, 1:3], 1, 20
    noise = torch.rand(2, 32, generator=keyed_generator(1))
    nll = module.masked_nll(window, start, mask_window(noise, [SampleMask(0, 32, 0, num_masked)] * 2))

    absolute = noise.argsort(dim=1) + 16  # a latent frame has 16 tokens
    logits = module.network(clip.flatten(1), absolute[:, :12], absolute[:, 12:])
    truth = clip.flatten(1).gather(1, absolute[:, 12:])
    torch.testing.assert_close(nll, F.cross_entropy(logits.transpose(1, 2), truth, reduction="none"))

    nll.sum().backward()
    touched = module.network.position_embedding.grad[0].abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(16, 48))


# Training


def test_the_loss_of_a_step_does_not_depend_on_what_came_before(tokenizer_bundle: Path) -> None:
    batch = {"codes": random_codes()}
    fresh = attach(make_module(tokenizer_bundle), step=5).training_step(batch, 2)
    used = make_module(tokenizer_bundle)
    for step in range(3):
        attach(used, step=step).training_step({"codes": random_codes(4)}, step)
    torch.rand(7)  # someone draws from the global stream
    assert attach(used, step=5).training_step(batch, 2) == fresh


def test_masks_change_from_step_to_step_and_between_accumulated_batches(module: MeBTModule) -> None:
    batch = {"codes": random_codes()}
    seen = {(step, index): attach(module, step=step).training_step(batch, index) for step in (0, 1) for index in (0, 1)}
    assert len({loss.item() for loss in seen.values()}) == 4


def test_one_mask_ratio_a_step_for_all_ranks_and_accumulated_batches(module: MeBTModule) -> None:
    def ratio(rank: int, step: int, index: int) -> float:
        attach(module, rank, 2, step).training_step({"codes": random_codes()}, index)
        return module.logged["train/mask_ratio"]

    assert ratio(0, 4, 0) == ratio(1, 4, 0) == ratio(0, 4, 1)
    assert len({ratio(0, step, 0) for step in range(8)}) > 4


def test_ranks_together_mask_what_one_process_with_all_clips_masks(module: MeBTModule) -> None:
    codes = random_codes(4)
    losses = [attach(module, rank, 2, step=6).training_step({"codes": codes[2 * rank :][:2]}, 1) for rank in range(2)]
    assert losses[0] != losses[1]
    together = attach(module, 0, 1, step=6).training_step({"codes": codes}, 1)
    assert torch.stack(losses).mean().item() == pytest.approx(together.item(), rel=1e-6)


@pytest.mark.parametrize(("rho_power", "divisor"), [(1.0, "masked"), (0.0, "window")])
def test_rho_power_chooses_between_the_mean_and_the_papers_sum(
    tokenizer_bundle: Path, rho_power: float, divisor: str
) -> None:
    module = make_module(tokenizer_bundle, rho_power=rho_power)
    loss = module.training_step({"codes": random_codes()}, 0)
    expected = module.logged["train/nll"] * (1 if divisor == "masked" else module.logged["train/mask_ratio"])
    assert 0 < module.logged["train/mask_ratio"] < 1
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert module.logged["train/loss"] == pytest.approx(loss.item())


def test_tokens_of_a_batch_are_counted(module: MeBTModule) -> None:
    batch = {"codes": random_codes(frames=2), "window_start": 8, "window_frames": 4, "margin_before": 4}
    module.training_step(batch, 0)
    assert module.tokens_per_batch == 2 * 16  # one latent frame is left of the two


def training_loss(tokenizer_bundle: Path, codes: Tensor, step: int = 0, **changes: Any) -> tuple[float, MeBTModule]:
    module = attach(make_module(tokenizer_bundle, **changes), step=step)
    return module.training_step({"codes": codes, "label": torch.arange(len(codes))}, 0).item(), module


def test_each_sample_may_draw_its_own_mask_ratio(tokenizer_bundle: Path) -> None:
    codes = random_codes(6)
    module = make_module(tokenizer_bundle, mask_ratio_per="sample")
    masks = module.random_masks(codes, 0)
    assert len({mask.masked for mask in masks}) > 3
    assert {(mask.start, mask.length) for mask in masks} == {(0, 64)}
    together = [attach(module, rank, 2).random_masks(codes[3 * rank :][:3], 0) for rank in range(2)]
    assert together[0] + together[1] == masks  # two ranks draw what one draws
    assert attach(module).random_masks(codes, 1) != masks
    loss = module.training_step({"codes": codes}, 0)
    loss.backward()
    assert loss.isfinite()
    ratios = [mask.masked / 64 for mask in masks]
    assert module.logged["train/mask_ratio"] == pytest.approx(sum(ratios) / 6)
    assert len({mask.masked for mask in make_module(tokenizer_bundle).random_masks(codes, 0)}) == 1  # as published


def test_each_sample_may_have_a_window_of_its_own(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, length_per="sample")
    codes = random_codes(40)
    masks = module.random_masks(codes, 0)
    assert {mask.length for mask in masks} == {16, 32, 48, 64}
    assert {mask.start for mask in masks if mask.length == 16} == {0, 16, 32, 48}
    assert all(mask.start + mask.length <= 64 and 0 < mask.masked <= mask.length for mask in masks)
    assert module.training_step({"codes": codes}, 0).isfinite()


def test_frames_are_given_in_a_share_of_the_steps(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, prediction_share=0.5)
    codes = random_codes()
    masks = [attach(module, step=step).random_masks(codes, 0)[0] for step in range(40)]
    assert 10 < sum(mask.given > 0 for mask in masks) < 30
    assert {mask.given for mask in masks} == {0, 16, 32, 48}  # never all
    assert all(mask.masked <= 64 - mask.given for mask in masks)
    step = next(step for step, mask in enumerate(masks) if mask.given == 48)
    attach(module, step=step).training_step({"codes": codes}, 0).backward()
    assert attach(module, step=step).random_masks(random_codes(frames=1), 0)[0].given == 0  # nothing to go on from


def test_the_budget_bounds_the_targets_and_leaves_the_mean_comparable(tokenizer_bundle: Path) -> None:
    codes = random_codes(30)
    seen = []
    for budget in (None, 5):
        module = make_module(tokenizer_bundle, target_budget=budget)
        read = module.network.cross_entropy
        module.network.cross_entropy = lambda features, *rest, read=read: (
            seen.append(features.shape[1]) or read(features, *rest)
        )
        seen.append(module.training_step({"codes": codes}, 0).item())
    all_targets, whole, few_targets, part = seen
    assert (few_targets, all_targets > 20) == (5, True)
    assert part == pytest.approx(whole, rel=0.1)


def test_smoothing_is_of_the_training_loss_alone(tokenizer_bundle: Path) -> None:
    codes = random_codes()
    sharp, module = training_loss(tokenizer_bundle, codes)
    smooth, smoothed = training_loss(tokenizer_bundle, codes, label_smoothing=0.5)
    assert smooth != pytest.approx(sharp, rel=1e-3)
    for one in (module, smoothed):
        one.validation_step({"codes": codes}, 0)
    assert module.logged["val/loss"] == smoothed.logged["val/loss"]


def test_training_in_bf16_is_near_that_in_float32(tokenizer_bundle: Path) -> None:
    codes = random_codes()
    module = make_module(tokenizer_bundle)
    exact = module.training_step({"codes": codes}, 0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module.training_step({"codes": codes}, 0)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()
    rounded.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.network.parameters())


def test_a_model_with_classes_learns_them(tokenizer_bundle: Path) -> None:
    codes = random_codes()
    module = make_module(tokenizer_bundle, num_classes=3)
    losses = {label: module.training_step({"codes": codes, "label": torch.full((2,), label)}, 0) for label in (0, 2)}
    assert losses[0] != losses[2]
    losses[2].backward()
    assert (module.network.label_embedding.weight.grad.abs().sum(dim=1) > 0).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_share": 1.5}, r"prediction_share=1.5 is no share.*--model\.prediction_share"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 is no share"),
        ({"target_budget": 0}, "target_budget=0 must be null or at least 1"),
    ],
)
def test_training_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeBTModule("nowhere", **(TOY | change))


@pytest.mark.slow
def test_compiled_training_needs_few_graphs_for_a_thousand_lengths_and_masks(
    tokenizer_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are counted by a backend that only counts; the windows are those of a curriculum, down to one token."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend, **options))
    torch._dynamo.reset()
    blocks = ["latent_enc", "latent_dec"]  # a block takes a second to compile
    module = make_module(tokenizer_bundle, num_frames=64, compile_network=True, blocks=blocks)
    codes = random_codes(1, frames=16)
    first = attach(module, step=7).training_step({"codes": codes}, 0)
    plain = attach(make_module(tokenizer_bundle, num_frames=64, blocks=blocks), step=7)
    assert first.item() == pytest.approx(plain.training_step({"codes": codes}, 0).item(), rel=1e-5)
    clip, positions = codes.flatten(1), torch.arange(256)[None]
    sizes = set()
    for step, tau in enumerate(torch.rand(1000, generator=keyed_generator(1)).tolist()):
        tokens = 16 * (1 + step * 16 // 1000)
        num_context = int(tau * tokens)
        sizes.add((num_context, tokens))
        module.features(module.network, clip, positions[:, :num_context], positions[:, num_context:tokens])
    assert len(sizes) > 500
    assert {0, 1} <= {num_context for num_context, _ in sizes}
    assert 1 <= len(graphs) <= 10
    torch._dynamo.reset()


# Validation


def test_validation_repeats_its_masks_and_learns_nothing_from_the_step(module: MeBTModule) -> None:
    batch = {"codes": random_codes()}
    attach(module, step=0).validation_step(batch, 0)
    first = module.logged
    attach(module, step=9).validation_step(batch, 0)
    assert module.logged == first
    attach(module, step=9).validation_step(batch, 1)
    assert module.logged != first


def test_validation_loss_is_the_mean_over_its_mask_ratios(module: MeBTModule) -> None:
    module.validation_step({"codes": random_codes()}, 0)
    names = [f"val/nll_{ratio}" for ratio in ("0.25", "0.50", "0.75", "1.00")]
    assert module.logged.keys() == {*names, "val/loss"}
    assert module.logged["val/loss"] == pytest.approx(sum(module.logged[name] for name in names) / 4)


def test_validation_with_nothing_visible_predicts_every_token(module: MeBTModule) -> None:
    codes = random_codes()
    module.validation_step({"codes": codes}, 0)
    everything = torch.arange(64).expand(2, -1)
    logits = module.network(codes.flatten(1), everything[:, :0], everything)
    expected = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert module.logged["val/nll_1.00"] == pytest.approx(expected.item(), rel=1e-5)


def test_ranks_together_validate_what_one_process_validates(module: MeBTModule) -> None:
    codes = random_codes(4)
    losses = []
    for rank in range(2):
        attach(module, rank, 2).validation_step({"codes": codes[2 * rank :][:2]}, 3)
        losses.append(module.logged["val/loss"])
    attach(module).validation_step({"codes": codes}, 3)
    assert sum(losses) / 2 == pytest.approx(module.logged["val/loss"], rel=1e-6)


# Optimizer


def test_only_weights_of_linear_layers_decay(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, lr=0.25, betas=(0.5, 0.6), weight_decay=0.125)
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, rest = optimizer.param_groups
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == linear
    assert {id(p) for p in (*decayed["params"], *rest["params"])} == {id(p) for p in module.parameters()}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(module.parameters()))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.125, 0.0)
    assert {(group["lr"], tuple(group["betas"])) for group in (decayed, rest)} == {(0.25, (0.5, 0.6))}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [1.0] * 11),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75] + [1.0] * 8),
        ({"lr_schedule": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * step / 10) for step in range(11)]),
        (
            {"lr_schedule": "cosine", "warmup_steps": 2},
            [1 / 3, 2 / 3, *(0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(9))],
        ),
    ],
)
def test_learning_rate_follows_its_schedule(tokenizer_bundle: Path, settings: dict, rates: list[float]) -> None:
    module = make_module(tokenizer_bundle, lr=0.5, **settings)  # ten steps, says the stand-in for the Trainer
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    assert schedule["interval"] == "step"
    seen = []
    for _ in rates:
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule["scheduler"].step()
    assert seen == [pytest.approx([0.5 * rate] * 2, abs=1e-12) for rate in rates]


# Generation


def test_generated_videos_are_a_function_of_their_seeds(module: MeBTModule) -> None:
    seeds = torch.tensor([5, 6])
    video = module.generate(Condition(), 16, seeds)
    torch.rand(3)
    assert torch.equal(module.generate(Condition(), 16, seeds), video)
    assert video.shape == (2, 3, 16, 32, 32)
    assert video.abs().max() <= 1
    assert not torch.equal(video[0], video[1])


def test_a_sample_does_not_depend_on_its_batch(module: MeBTModule) -> None:
    """Compared as codes: matrix products round differently in batches of other sizes, the choices are the same."""
    together = module.generate_codes(16, torch.tensor([5, 6, 7]))
    assert len(together.unique()) > 4
    assert torch.equal(module.generate_codes(16, torch.tensor([7, 5])), together[[2, 0]])
    assert torch.equal(module.generate_codes(16, torch.tensor([6])), together[1:2])


def test_samples_may_be_shorter_than_the_training_clips(module: MeBTModule) -> None:
    assert module.generate(Condition(), 4, torch.tensor([1])).shape == (1, 3, 4, 32, 32)


def test_sampling_settings_can_be_given_for_once(module: MeBTModule) -> None:
    seeds = torch.tensor([5])
    own = module.generate_codes(16, seeds)
    assert torch.equal(module.generate_codes(16, seeds, DraftAndRevise(num_steps=4)), own)
    assert not torch.equal(module.generate_codes(16, seeds, DraftAndRevise(num_steps=1)), own)


@pytest.mark.parametrize("num_frames", [0, -4, 6])
def test_a_length_that_is_no_number_of_latent_frames_is_refused(module: MeBTModule, num_frames: int) -> None:
    with pytest.raises(ValueError, match=f"num_frames={num_frames} cannot be generated: .* makes multiples of 4"):
        module.generate(Condition(), num_frames, torch.tensor([1]))


# Longer than trained


def test_a_long_video_is_made_by_windows_that_begin_with_the_last_frames(
    module: MeBTModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = []
    edit = module.edit_codes

    def watch(codes: Tensor, keep: Tensor, *rest: Any) -> Tensor:
        out = edit(codes, keep, *rest)
        windows.append((codes, keep, out))
        return out

    monkeypatch.setattr(module, "edit_codes", watch)
    seeds = torch.tensor([5, 6])
    codes = module.generate_codes(44, seeds, DraftAndRevise(num_steps=4, context_frames=4))
    assert codes.shape == (2, 11, 4, 4)
    assert [int(keep[:, 0, 0].sum()) for _, keep, _ in windows] == [0, 1, 1, 3]  # the last one is as long as the others
    firsts = [0, 3, 6, 7]
    for first, (given, keep, out) in zip(firsts, windows, strict=True):
        assert torch.equal(codes[:, first : first + 4], out)  # positions begin at 0 in every window
        assert torch.equal(given[:, keep], out[:, keep])
    assert len({tuple(out[0, -1].flatten().tolist()) for _, _, out in windows}) == 4  # not the same noise again
    assert torch.equal(module.generate_codes(44, seeds[1:], DraftAndRevise(num_steps=4, context_frames=4)), codes[1:])


def test_windows_of_a_long_video_have_all_their_steps(module: MeBTModule) -> None:
    """The release counts the given tokens as well, and so leaves out the first steps."""
    calls = []
    forward = module.features

    def count(network: Any, codes: Tensor, context: Tensor, targets: Tensor, label: Any) -> Tensor:
        calls.append((context.shape[1], targets.shape[1]))
        return forward(network, codes, context, targets, label)

    module.features = count
    module.generate_codes(24, torch.tensor([5]), DraftAndRevise(num_steps=4))
    assert calls == [(0, 64), (4, 60), (18, 46), (39, 25), (32, 32), (34, 30), (41, 23), (51, 13)]


@pytest.mark.parametrize("context_frames", [6, 16, 20])
def test_windows_that_do_not_fit_are_refused(module: MeBTModule, context_frames: int) -> None:
    with pytest.raises(ValueError, match=f"context_frames={context_frames} does not fit: .*multiple of 4 below 16"):
        module.generate_codes(24, torch.tensor([1]), DraftAndRevise(context_frames=context_frames))


# Editing


def test_any_set_of_tokens_can_be_kept(module: MeBTModule) -> None:
    codes, seeds = random_codes(), torch.tensor([5, 6])
    everything = torch.ones(4, 4, 4, dtype=torch.bool)
    assert torch.equal(module.edit_codes(codes, everything, seeds), codes)
    keep = (
        torch.rand(2, 64, generator=keyed_generator(3)).argsort(1).argsort(1).view(2, 4, 4, 4) < 23
    )  # others for each
    sharp = {"temperature": 0.1, "revise_temperature": 0.1}  # or the noise would decide alone
    settings = DraftAndRevise(num_steps=3, bootstrap_passes=2, revise_rounds=1, revise_groups=4, **sharp)
    edited = module.edit_codes(codes, keep, seeds, settings)
    assert torch.equal(edited[keep], codes[keep])
    changed = module.edit_codes(codes.where(keep, (codes + 1) % 16), keep, seeds, settings)
    assert torch.equal(changed, edited)  # what is not kept is not read
    assert not torch.equal(module.edit_codes(codes, keep, seeds + 9, settings), edited)
    assert torch.equal(module.edit_codes(codes[1:], keep[1:], seeds[1:], settings), edited[1:])
    other = module.edit_codes((codes + 1) % 16, keep, seeds, settings)
    assert not torch.equal(other[~keep], edited[~keep])  # what is kept is


def test_edits_that_do_not_fit_are_refused(module: MeBTModule) -> None:
    codes, keep = random_codes(), torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    keep[0, 0] = True
    with pytest.raises(ValueError, match=r"keep \[16, 0\] tokens: expected as many"):
        module.edit_codes(codes, keep, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"1 seeds, codes .* do not fit"):
        module.edit_codes(codes, keep, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"Codes are \(5, 4, 4\): expected at most \(4, 4, 4\)"):
        module.edit_codes(random_codes(frames=5), keep, torch.tensor([1, 2]))


def clips() -> Tensor:
    data = MovingShapesDataModule(num_train=2, num_val=2, num_frames=16, resolution=32, batch_size=2, seed=1)
    data.setup("fit")
    return next(iter(data.val_dataloader()))["video"]


def test_a_video_goes_on_from_past_frames(module: MeBTModule) -> None:
    video, seeds = clips(), torch.tensor([5, 6])
    made = module.generate(Condition(video=video[:, :, :8]), 24, seeds)
    assert made.shape == (2, 3, 24, 32, 32)
    settings = DraftAndRevise(num_steps=4, given_frames=8)
    by_task = module.generate(Condition(video=video, task="frame_prediction"), 24, seeds, settings)
    assert torch.equal(by_task, made)
    later = video.clone()
    later[:, :, 8:] = 0.5
    assert torch.equal(module.generate(Condition(video=later, task="frame_prediction"), 24, seeds, settings), made)
    codes = module.generate_codes(24, seeds, past=module.encode_video(video[:, :, :8]))
    assert torch.equal(codes[:, :2], module.encode_video(video[:, :, :8]))


@pytest.mark.parametrize(
    ("task", "kept"),
    [("frame_interpolation", 2 * 16), ("central_outpainting", 4 * 4), ("central_inpainting", 4 * 12)],
)
def test_parts_of_clips_are_kept(module: MeBTModule, task: str, kept: int) -> None:
    video, seeds = clips(), torch.tensor([5, 6])
    codes, keep = module.known_codes(video, task, module.sampling)
    assert int(keep.sum()) == kept
    if task == "frame_interpolation":
        assert torch.equal(codes[:, :1], module.encode_video(video[:, :, :4]))
        assert torch.equal(codes[:, 3:], module.encode_video(video[:, :, 12:]))
    made = module.generate(Condition(video=video, task=task), 16, seeds)
    unknown = keep.logical_not().repeat_interleave(4, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    other = video.masked_fill(unknown, 0.25)
    assert torch.equal(module.generate(Condition(video=other, task=task), 16, seeds), made)
    with pytest.raises(ValueError, match=f"num_frames=12 does not fit the task {task}"):
        module.generate(Condition(video=video, task=task), 12, seeds)


@pytest.mark.parametrize("given_frames", [6, 16])
def test_given_frames_that_do_not_fit_are_refused(module: MeBTModule, given_frames: int) -> None:
    settings = DraftAndRevise(given_frames=given_frames)
    with pytest.raises(ValueError, match=f"given_frames={given_frames} does not fit: .*given_frames"):
        module.generate(Condition(video=clips(), task="frame_prediction"), 16, torch.tensor([1, 2]), settings)


def test_tasks_and_clips_go_together(module: MeBTModule) -> None:
    with pytest.raises(ValueError, match="The task frame_prediction needs the clips"):
        module.generate(Condition(task="frame_prediction"), 16, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"task=juggling is none of MeBT's \(--task\)"):
        module.checked_task("juggling")


def test_videos_of_classes(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_classes=3)
    with torch.no_grad():
        for block in module.network.blocks:  # or the latents would hardly reach the logits
            block.norm1.weight.fill_(1.0)
            block.attention.proj.weight.mul_(10)
    seeds = torch.tensor([5, 5])
    settings = DraftAndRevise(num_steps=4, temperature=0.05)
    codes = module.generate_codes(16, seeds, settings, torch.tensor([0, 2]))
    assert not torch.equal(codes[0], codes[1])
    batch = {"seeds": torch.tensor([5, 2]), "num_frames": 16, "task": None}
    expected = module.generate(Condition(label=torch.tensor([2, 2])), 16, batch["seeds"])
    assert torch.equal(torch.cat([*module.predict_step(batch, 0)["pieces"]], dim=2), expected)  # classes in turn
    with pytest.raises(ValueError, match="Labels are none: expected 2 of the classes 0 to 2"):
        module.generate_codes(16, seeds)
    with pytest.raises(ValueError, match=r"Labels are \[3\]: expected 1 of the classes"):
        module.checked_task(None, 3)


def test_generation_does_not_drop_out(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, dropout=0.5).train()
    seeds = torch.tensor([5])
    assert torch.equal(module.generate_codes(16, seeds), module.generate_codes(16, seeds))
    assert module.network.training


def test_a_label_is_refused(module: MeBTModule) -> None:
    with pytest.raises(ValueError, match="unconditional"):
        module.generate(Condition(label=torch.tensor([1])), 16, torch.tensor([1]))


# Checkpoints of a module that was made in Python


def test_a_checkpoint_made_without_the_command_line_is_plain_and_loads(tokenizer_bundle: Path, tmp_path: Path) -> None:
    module = MeBTModule(str(tokenizer_bundle), **(TOY | {"sampling": DraftAndRevise(num_steps=7, top_k=3)}))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", enable_model_summary=False, **quiet)
    loader = DataLoader([{"codes": random_codes()}], batch_size=None)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "made.ckpt")
    torch.load(tmp_path / "made.ckpt", weights_only=True)
    loaded = MeBTModule.load_from_checkpoint(tmp_path / "made.ckpt")
    assert loaded.sampling == DraftAndRevise(num_steps=7, top_k=3)
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    seeds = torch.tensor([2])
    assert torch.equal(loaded.generate_codes(16, seeds), module.generate_codes(16, seeds))


def test_the_norm_of_the_gradients_is_logged_before_they_are_clipped(tokenizer_bundle: Path) -> None:
    module = MeBTModule(str(tokenizer_bundle), **TOY)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        log_every_n_steps=1,
        gradient_clip_val=1e-3,
        **quiet,
    )
    loader = DataLoader([{"codes": random_codes()}], batch_size=None)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/grad_norm"] > 0.01  # they were clipped to a thousandth
