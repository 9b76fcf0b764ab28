"""COMMITModule: tasks drawn by step, conditions tokenized on the fly, validation by task, generation from pixels."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.shapes import MovingShapes
from lightning_modules import COMMITModule
from lightning_modules.generator import Condition
from models.priors.commit import MASK, REFINE, COMMITDecoding, multivariate_mask
from models.priors.tasks import CLASS_TASKS, EMPTY_TASKS, TASKS, known_region, padded_video
from models.random import keyed_generator

PIXEL_TASKS = [task for task in TASKS if task not in EMPTY_TASKS]
TOY: dict[str, Any] = {
    "num_frames": 16,
    "resolution": 32,
    "codebook_size": 16,
    "tasks": TASKS,
    "num_classes": 12,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "dropout": 0.0,
    "sampling": COMMITDecoding(num_steps=3),
    "seed": 3,
}


def make_module(tokenizer_bundle: Path, **changes: Any) -> COMMITModule:
    """A toy COMMIT whose weights are large enough for its predictions to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = COMMITModule(str(tokenizer_bundle), **(TOY | changes))
        for parameter in module.network.parameters():
            nn.init.normal_(parameter, std=0.8)
    module.load_tokenizer()
    return attach(module)


def attach(module: COMMITModule, rank: int = 0, world_size: int = 1, step: int = 0) -> COMMITModule:
    """Give the module a stand-in for the Trainer, and keep what it logs in `module.logged`."""
    module._trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, global_step=step, estimated_stepping_batches=10
    )
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, torch.as_tensor(value).item())
    module.logged = logged
    return module


@pytest.fixture
def module(tokenizer_bundle: Path) -> COMMITModule:
    return make_module(tokenizer_bundle)


@pytest.fixture(scope="session")
def clips() -> dict[str, Tensor]:
    shapes = MovingShapes("train", 4, 16, resolution=32)
    return {
        "video": torch.stack([shapes.render(index) for index in range(4)]),
        "label": torch.tensor([shapes.ground_truth(index).label for index in range(4)]),
        "index": torch.arange(4),
    }


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


# Tasks


def tasks_of_steps(module: COMMITModule, batch: dict[str, Tensor], steps: range, rank: int = 0) -> list[str]:
    """Which tasks the steps train."""
    seen: list[str] = []
    token_nll = module.token_nll
    module.token_nll = lambda batch, task, *rest: (seen.append(task), token_nll(batch, task, *rest))[1]
    for step in steps:
        attach(module, rank, 2, step).training_step(batch, 0)
    module.token_nll = token_nll
    return seen


def test_tasks_are_drawn_by_step_alike_on_all_ranks(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    seen = tasks_of_steps(module, part(clips, slice(1)), range(60))
    assert len(set(seen)) >= 10
    assert tasks_of_steps(module, part(clips, slice(1)), range(40, 46), rank=1) == seen[40:46]


@pytest.mark.parametrize("prompts", ["own", "shared"])
def test_prompts_tell_tasks_apart_as_configured(tokenizer_bundle: Path, prompts: str) -> None:
    module = COMMITModule(str(tokenizer_bundle), **(TOY | {"prompts": prompts}))
    numbers = {task: module.prompt(task) for task in TASKS}
    assert len(set(numbers.values())) == (11 if prompts == "own" else 4)
    assert max(numbers.values()) < module.network.num_prompts
    assert (numbers["dynamic_inpainting"] == numbers["central_outpainting"]) == (prompts == "shared")


def test_a_model_of_one_task_has_no_prompt(tokenizer_bundle: Path) -> None:
    module = COMMITModule(str(tokenizer_bundle), **(TOY | {"tasks": ["frame_prediction"]}))
    assert module.network.num_prompts == 0
    assert module.network.position_embedding.shape[1] == 65


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "expected different ones, at least one"),
        ({"tasks": ["unconditional", "unconditional"]}, "expected different ones"),
        ({"num_classes": 0}, r"class_conditional needs classes: give their number \(--model.num_classes\)"),
        ({"past_frames": 16}, r"expected 1 to 15 of 16 frames \(--model.past_frames\)"),
        ({"tasks": ["juggling"]}, "no task 'juggling'"),
    ],
)
def test_tasks_that_cannot_be_trained_are_refused(tokenizer_bundle: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COMMITModule(str(tokenizer_bundle), **(TOY | changes))


# Training


@pytest.mark.parametrize("task", ["frame_prediction", "central_inpainting", "class_conditional"])
def test_the_input_holds_the_condition_the_mask_and_the_truth(
    module: COMMITModule, clips: dict[str, Tensor], task: str
) -> None:
    """The step's cross-entropy, put together from its parts by hand."""
    codes = module.clip_codes(clips)
    scores, count = torch.rand(4, 64, generator=keyed_generator(1)), torch.tensor([10, 30, 50, 64])
    nll, kinds = module.token_nll(clips, task, codes, (count, scores))
    is_condition = module.condition_tokens(task)
    condition = module.tokenizer.encode(padded_video(clips["video"], task)).codes.flatten(1)
    tokens, _ = multivariate_mask(codes, condition, is_condition, scores, count, module.network.mask_id)
    label = clips["label"] if task in CLASS_TASKS else None
    logits = module.network(tokens, label, TASKS.index(task))
    torch.testing.assert_close(nll, F.cross_entropy(logits[:, :, 0].transpose(1, 2), codes, reduction="none"))
    assert torch.equal((kinds == REFINE), (kinds != 0) & is_condition)
    assert ((kinds == MASK).any(), (kinds == REFINE).any()) == (True, task != "class_conditional")
    if task == "frame_prediction":  # what the condition adds: other codes than the truth, at the place it is known
        assert (condition != codes)[:, is_condition].any()


def test_parts_of_the_loss_are_logged_and_add_up(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    loss = module.training_step(clips, 0)
    names = ("train/refine", "train/mask", "train/reconstruct")
    assert sum(module.logged[name] for name in names) == pytest.approx(loss.item(), rel=1e-5)
    assert module.logged["train/loss"] == pytest.approx(loss.item())
    assert 0 < module.logged["train/corrupted"] <= 1
    assert module.tokens_per_batch == 4 * 64


def test_uniform_predictions_cost_the_logarithm_of_the_codebook(
    tokenizer_bundle: Path, clips: dict[str, Tensor]
) -> None:
    module = make_module(tokenizer_bundle, label_smoothing=0.1)
    nn.init.zeros_(module.network.heads[0][2].weight)
    nn.init.zeros_(module.network.heads[0][2].bias)
    nn.init.zeros_(module.network.head_bias)
    assert module.training_step(clips, 0).item() == pytest.approx(torch.tensor(16.0).log().item(), rel=1e-5)


def test_labels_are_smoothed_in_training(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    sharp, smooth = (make_module(tokenizer_bundle, label_smoothing=eps).training_step(clips, 0) for eps in (0.0, 0.5))
    assert sharp != smooth


def test_pixels_and_cached_codes_give_the_same_loss_where_no_pixel_is_known(
    tokenizer_bundle: Path, clips: dict[str, Tensor]
) -> None:
    module = make_module(tokenizer_bundle, tasks=EMPTY_TASKS)
    cached = {"codes": module.window_codes(clips)[0], "label": clips["label"]}
    losses = [[attach(module, step=step).training_step(batch, 0) for step in range(4)] for batch in (clips, cached)]
    assert losses[0] == losses[1]


def test_cached_condition_codes_give_the_loss_of_pixels(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    module = make_module(tokenizer_bundle, tasks=("class_conditional", "frame_prediction", "central_inpainting"))
    cached = {"codes": module.window_codes(clips)[0], "label": clips["label"]}
    for task in module.conditions():
        codes = module.condition_codes(clips, task, len(clips["label"]))
        cached[f"task/{task}"] = codes.unflatten(1, module.latent_shape)
    assert len(cached) == 4
    losses = [[attach(module, step=step).training_step(batch, 0) for step in range(6)] for batch in (clips, cached)]
    assert losses[0] == losses[1]


def test_cached_codes_are_refused_where_pixels_are_known(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    cached = {"codes": module.window_codes(clips)[0], "label": clips["label"]}
    with pytest.raises(ValueError, match=r"neither pixels nor `task/.*give a data module with pixels"):
        module.validation_step(cached, 0)


def test_windows_of_a_curriculum_are_refused(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    window = {"window_start": 0, "window_frames": 8, "margin_before": 0}
    with pytest.raises(ValueError, match=r"whole clips, of \(4, 4, 4\) codes; this batch has \(2, 4, 4\)"):
        module.training_step(clips | window, 0)


@pytest.mark.parametrize("label", [-1, 12])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_labels_that_are_no_classes_are_refused(
    module: COMMITModule, clips: dict[str, Tensor], label: int, step: str
) -> None:
    wrong = clips | {"label": torch.tensor([0, label, 1, 2])}
    with pytest.raises(ValueError, match=r"do not fit num_classes=12 \(--model.num_classes\)"):
        getattr(module, step)(wrong, 0)


def test_the_loss_of_a_step_does_not_depend_on_what_came_before(
    tokenizer_bundle: Path, clips: dict[str, Tensor]
) -> None:
    fresh = attach(make_module(tokenizer_bundle), step=5).training_step(clips, 2)
    used = make_module(tokenizer_bundle)
    for step in range(3):
        attach(used, step=step).training_step(part(clips, slice(2)), step)
    torch.rand(7)  # someone draws from the global stream
    assert attach(used, step=5).training_step(clips, 2) == fresh
    assert attach(used, step=5).training_step(clips, 3) != fresh


@pytest.mark.parametrize("mask_ratio_per", ["sample", "batch"])
def test_ranks_together_train_what_one_process_with_all_clips_trains(
    tokenizer_bundle: Path, clips: dict[str, Tensor], mask_ratio_per: str
) -> None:
    module = make_module(tokenizer_bundle, mask_ratio_per=mask_ratio_per)
    halves = [part(clips, slice(2 * rank, 2 * rank + 2)) for rank in range(2)]
    losses = [attach(module, rank, 2, step=6).training_step(halves[rank], 1) for rank in range(2)]
    assert losses[0] != losses[1]
    together = attach(module, 0, 1, step=6).training_step(clips, 1)
    assert torch.stack(losses).mean().item() == pytest.approx(together.item(), rel=1e-5)


@pytest.mark.parametrize("mask_ratio_per", ["sample", "batch"])
def test_mask_ratios_are_drawn_as_configured(tokenizer_bundle: Path, mask_ratio_per: str) -> None:
    module = make_module(tokenizer_bundle, mask_ratio_per=mask_ratio_per)
    counts, scores = module.random_mask(8, keyed_generator(1), keyed_generator(2))
    assert (len(counts.unique()) == 1) == (mask_ratio_per == "batch")
    assert 1 <= counts.min() <= counts.max() <= 64
    assert scores.shape == (8, 64)


@pytest.mark.parametrize("masking", ["multivariate", "latent", "prefix"])
def test_every_way_to_give_a_condition_trains_and_generates(
    tokenizer_bundle: Path, clips: dict[str, Tensor], masking: str
) -> None:
    module = make_module(tokenizer_bundle, masking=masking, tasks=["central_inpainting", "class_frame_prediction"])
    for step in range(2):
        assert attach(module, step=step).training_step(clips, 0) > 0
    kept = condition(clips, "central_inpainting")
    codes = module.generate_codes(kept, 16, torch.arange(4)).flatten(1)
    given = module.tokenizer.encode(padded_video(clips["video"], "central_inpainting")).codes.flatten(1)
    is_condition = module.condition_tokens("central_inpainting")
    assert torch.equal(codes[:, is_condition], given[:, is_condition]) == (masking == "latent")


def test_tasks_are_drawn_by_their_weights(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    names = ["unconditional", "class_conditional", "frame_prediction"]
    module = make_module(tokenizer_bundle, tasks=names, task_weights=[3, 1, 0])
    seen = tasks_of_steps(module, part(clips, slice(1)), range(80))
    assert seen.count("frame_prediction") == 0
    assert 45 <= seen.count("unconditional") <= 73  # 60 on average, 3.9 is the deviation


@pytest.mark.parametrize("dropout", [0.0, 0.999999])
def test_dropped_conditions_are_masks_without_a_class(
    tokenizer_bundle: Path, clips: dict[str, Tensor], dropout: float
) -> None:
    module = make_module(tokenizer_bundle, tasks=["class_frame_prediction"], condition_dropout=dropout)
    seen: list[tuple] = []
    forward = module.network.forward
    module.network.forward = lambda tokens, label, prompt: (seen.append((tokens, label)), forward(tokens, label))[1]
    module.training_step(clips, 0)
    tokens, label = seen[0]
    assert torch.equal(label, torch.full((4,), 12) if dropout else clips["label"])
    loss = module.logged["train/refine_tokens"]
    assert (loss == 0) == (dropout > 0)
    assert module.logged["train/mask_tokens"] == pytest.approx((tokens == module.network.mask_id).float().mean())


def test_only_chosen_parts_of_the_loss_are_trained(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    module = make_module(tokenizer_bundle, losses=["mask"], tasks=["frame_prediction"])
    loss = module.training_step(clips, 0)
    assert module.logged["train/mask"] == pytest.approx(loss.item())
    assert module.logged["train/refine"] == module.logged["train/reconstruct"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_weights": [1.0]}, r"expected a number for each of 11 tasks, .*--model.task_weights"),
        ({"task_weights": [0.0] * 11}, "not all zero"),
        ({"losses": ["guess"]}, r"losses=\['guess'\]: expected some of reconstruct, mask, refine"),
        ({"condition_dropout": 1.0}, r"condition_dropout=1.0: expected 0 to 1 \(--model.condition_dropout\)"),
    ],
)
def test_settings_of_training_that_make_no_sense_are_refused(
    tokenizer_bundle: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        COMMITModule(str(tokenizer_bundle), **(TOY | changes))


def test_validation_measures_every_task_with_the_same_masks_each_time(
    module: COMMITModule, clips: dict[str, Tensor]
) -> None:
    attach(module, step=0).validation_step(clips, 0)
    first = module.logged
    assert first.keys() == {*(f"val/loss_{task}" for task in TASKS), "val/loss"}
    assert first["val/loss"] == pytest.approx(sum(first[f"val/loss_{task}"] for task in TASKS) / 11, rel=1e-5)
    assert len(set(first.values())) == 12
    attach(module, step=9).validation_step(clips, 0)
    assert module.logged == first
    attach(module, step=9).validation_step(clips, 1)
    assert module.logged != first


def test_the_learning_rate_warms_up_and_falls_to_zero(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, lr=0.5, warmup_steps=2)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    decayed, rest = optimizer.param_groups
    linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == linear
    assert len(decayed["params"]) + len(rest["params"]) == len(list(module.parameters()))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.045, 0.0)
    assert decayed["betas"] == (0.9, 0.96)
    rates = []
    for _ in range(12):
        rates.append(decayed["lr"])
        optimizer.step()
        schedule.step()
    assert rates[2] == 0.5
    assert rates[:3] == sorted(rates[:3])
    assert rates[6] == pytest.approx(0.25)  # half the peak at w + (S - w) / 2
    assert rates[10] == rates[11] == pytest.approx(0, abs=1e-12)  # no restart


# Generation


def condition(clips: dict[str, Tensor], task: str, rows: slice = slice(None)) -> Condition:
    return Condition(
        label=clips["label"][rows] if task in CLASS_TASKS else None,
        video=None if task in EMPTY_TASKS else clips["video"][rows],
        task=task,
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_generates_a_function_of_seeds_and_known_pixels(
    module: COMMITModule, clips: dict[str, Tensor], task: str
) -> None:
    seeds = torch.tensor([5, 6, 7, 8])
    codes = module.generate_codes(condition(clips, task), 16, seeds)
    torch.rand(3)
    known = known_region(task, (16, 32, 32))
    unread = clips | {"video": torch.where(known, clips["video"], 0.3)}
    assert torch.equal(module.generate_codes(condition(unread, task), 16, seeds), codes)
    assert torch.equal(module.generate_codes(condition(clips, task, slice(2, 3)), 16, seeds[2:3]), codes[2:3])
    assert not torch.equal(module.generate_codes(condition(clips, task), 16, seeds + 9), codes)
    if task in PIXEL_TASKS:
        other = clips | {"video": clips["video"].flip(0)}
        assert not torch.equal(module.generate_codes(condition(other, task), 16, seeds), codes)
    if task in CLASS_TASKS:
        other = clips | {"label": (clips["label"] + 1) % 12}
        assert not torch.equal(module.generate_codes(condition(other, task), 16, seeds), codes)


@pytest.mark.parametrize("paste_known", [False, True])
def test_known_pixels_reappear_if_asked_to(module: COMMITModule, clips: dict[str, Tensor], paste_known: bool) -> None:
    sampling = COMMITDecoding(num_steps=2, paste_known=paste_known)
    video = module.generate(condition(clips, "dynamic_inpainting"), 16, torch.arange(4), sampling)
    plain = module.generate(condition(clips, "dynamic_inpainting"), 16, torch.arange(4), COMMITDecoding(num_steps=2))
    known = known_region("dynamic_inpainting", (16, 32, 32))
    assert video.shape == (4, 3, 16, 32, 32)
    assert torch.equal(video[..., known], clips["video"][..., known]) == paste_known
    assert torch.equal(video[..., ~known], plain[..., ~known])


def test_a_model_that_knows_the_clip_makes_it_again(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    """With the truth as logits, every task ends with the codes of the whole clip, not with the condition's."""
    codes = module.clip_codes(clips)
    module.network.forward = lambda tokens, label, prompt: F.one_hot(codes, 16).float()[:, :, None] * 100
    for task in TASKS:
        made = module.generate_codes(condition(clips, task), 16, torch.arange(4))
        assert torch.equal(made.flatten(1), codes)


def test_dropout_does_not_reach_samples(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, dropout=0.5)
    module.train()
    request = Condition(task="unconditional")
    codes = [module.generate_codes(request, 16, torch.tensor([1])) for _ in range(2)]
    assert torch.equal(codes[0], codes[1])
    assert module.network.training


def test_a_model_of_one_task_can_be_asked_for_others(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    module = make_module(tokenizer_bundle, tasks=["frame_prediction"], num_classes=0)
    seeds = torch.arange(4)
    assert module.generate_codes(condition(clips, "central_inpainting"), 16, seeds).shape == (4, 4, 4, 4)
    with pytest.raises(ValueError, match=r"task=class_conditional is none of this model's \(--task\)"):
        module.generate_codes(condition(clips, "class_conditional"), 16, seeds)


@pytest.mark.parametrize(
    ("request_", "num_frames", "message"),
    [
        (Condition(task="juggling"), 16, r"task=juggling is none of this model's \(--task\): frame_prediction, "),
        (Condition(task="class_conditional"), 16, "class_conditional is generated with a label"),
        (Condition(task="unconditional", label=torch.tensor([1])), 16, "unconditional is generated without a label"),
        (Condition(task="frame_prediction"), 16, "frame_prediction is generated with a video"),
        (
            Condition(task="unconditional", video=torch.zeros(1, 3, 16, 32, 32)),
            16,
            "unconditional is generated without a video",
        ),
        (Condition(task="class_conditional", label=torch.tensor([12])), 16, "do not fit num_classes=12"),
        (
            Condition(task="class_conditional", label=torch.tensor([1, 2])),
            16,
            "1 seeds were given, .* label has 2 rows",
        ),
        (Condition(task="frame_prediction", video=torch.zeros(1, 3, 17, 32, 32)), 16, "video of 1 to 16 fr"),
        (Condition(task="central_inpainting", video=torch.zeros(1, 3, 8, 32, 32)), 16, "Expected video of 16 frames"),
        (Condition(task="frame_prediction", video=torch.zeros(1, 3, 16, 24, 32)), 16, "got 16 frames of 24 x 32"),
        (Condition(task="unconditional"), 8, "num_frames=8 cannot be generated: this model makes clips of 16"),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    module: COMMITModule, request_: Condition, num_frames: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module.generate(request_, num_frames, torch.tensor([1]))


# Masks of the user's own


def test_a_mask_of_any_form_is_generated_around(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    """Each sample has its own; unknown pixels are not read, known ones are, and can be pasted."""
    video, seeds = clips["video"], torch.arange(4)
    known = torch.zeros(4, 16, 32, 32, dtype=torch.bool)
    for row in range(4):
        known[row, 3 * row : 3 * row + 4, 5 * row :, :20] = True
    request = Condition(video=video, known=known)
    codes = module.generate_codes(request, 16, seeds)
    unread = torch.where(known[:, None], video, 0.3)
    assert torch.equal(module.generate_codes(Condition(video=unread, known=known), 16, seeds), codes)
    alone = Condition(video=video[2:3], known=known[2:3])
    assert torch.equal(module.generate_codes(alone, 16, seeds[2:3]), codes[2:3])
    assert not torch.equal(module.generate_codes(Condition(video=video.flip(0), known=known), 16, seeds), codes)
    pasted = module.generate(request, 16, seeds, COMMITDecoding(num_steps=1, paste_known=True))
    assert torch.equal(pasted.movedim(1, -1)[known], video.movedim(1, -1)[known])


def test_the_mask_of_a_task_is_that_task(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    for task in ("central_outpainting", "dynamic_inpainting", "frame_interpolation"):
        known = known_region(task, (16, 32, 32))
        assert module.task_of(Condition(video=clips["video"], known=known)) == task
        padded, _ = module.padded(module.whole_clips(Condition(video=clips["video"], task=task)))
        assert torch.equal(padded, padded_video(clips["video"], task))
        by_mask = Condition(video=clips["video"], known=known)
        codes = [module.generate_codes(c, 16, torch.arange(4)) for c in (by_mask, condition(clips, task))]
        assert torch.equal(*codes)


def test_other_masks_borrow_the_prompt_of_a_task_with_black_padding(
    module: COMMITModule, tokenizer_bundle: Path, clips: dict[str, Tensor]
) -> None:
    known = known_region("central_outpainting", (16, 32, 32)).clone()
    known[0, 0, 0] = True
    assert module.task_of(Condition(video=clips["video"], known=known)) == "dynamic_outpainting"
    few = make_module(tokenizer_bundle, tasks=["central_outpainting", "frame_prediction"])
    assert few.task_of(Condition(video=clips["video"], known=known)) == "central_outpainting"
    with pytest.raises(ValueError, match="takes no pixels"):
        make_module(tokenizer_bundle, tasks=EMPTY_TASKS).task_of(Condition(video=clips["video"], known=known))


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (torch.zeros(16, 32, 32), r"\[T, H, W\] or \[B, T, H, W\] bool"),
        (torch.zeros(16, 16, 16, dtype=torch.bool), r"mask has shape \(16, 16, 16\), and the video has 1 clips of"),
        (torch.zeros(2, 16, 32, 32, dtype=torch.bool), r"mask has shape \(2, 16, 32, 32\)"),
        (torch.zeros(16, 32, 32, dtype=torch.bool), r"none of the pixels are known: .*\(--mask\)"),
        (torch.ones(16, 32, 32, dtype=torch.bool), "all of the pixels are known"),
    ],
)
def test_masks_that_do_not_fit_are_refused(module: COMMITModule, known: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.generate(Condition(video=torch.zeros(1, 3, 16, 32, 32), known=known), 16, torch.tensor([1]))


def test_first_frames_are_enough_to_predict_from(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    seeds = torch.arange(4)
    whole = module.generate_codes(condition(clips, "frame_prediction"), 16, seeds)
    first = Condition(video=clips["video"][:, :, :1], task="frame_prediction")
    assert torch.equal(module.generate_codes(first, 16, seeds), whole)


# Longer videos


def test_longer_videos_go_on_from_their_own_last_frames(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    module = make_module(tokenizer_bundle, tasks=["frame_prediction", "unconditional"], past_frames=3)
    seeds = torch.tensor([4, 9])
    asked: list[Condition] = []
    generate_codes = module.generate_codes
    module.generate_codes = lambda request, *rest: (asked.append(request), generate_codes(request, *rest))[1]
    video = module.generate(Condition(task="unconditional"), 35, seeds)
    assert video.shape == (2, 3, 35, 32, 32)  # 16 + 13 + 6 of 13
    assert [request.task for request in asked] == ["unconditional", "frame_prediction", "frame_prediction"]
    assert torch.equal(asked[1].video, video[:, :, 13:16])
    assert torch.equal(asked[2].video, video[:, :, 26:29])
    assert torch.equal(video[:, :, :16], module.generate(Condition(task="unconditional"), 16, seeds))
    alone = module.generate(Condition(task="unconditional"), 35, seeds[1:])
    torch.testing.assert_close(alone, video[1:], atol=1e-4, rtol=0)
    assert not torch.equal(video[:, :, 16:29], video[:, :, 3:16])  # other draws each time


def test_a_class_goes_on_with_longer_videos(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    label = torch.tensor([3])
    video = module.generate(Condition(label, task="class_conditional"), 20, torch.tensor([1]))
    other = module.generate(Condition(label, task="class_conditional"), 31, torch.tensor([1]))
    assert torch.equal(other[:, :, :20], video)


def test_longer_videos_need_a_model_that_predicts_frames(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, tasks=["unconditional"])
    with pytest.raises(ValueError, match="longer videos only if frame_prediction is among its tasks"):
        module.generate(Condition(), 20, torch.tensor([1]))


# Guidance, and codes in parts


def test_guidance_and_revising_change_samples(module: COMMITModule, clips: dict[str, Tensor]) -> None:
    request, seeds = condition(clips, "class_frame_prediction"), torch.arange(4)
    plain = module.generate_codes(request, 16, seeds, COMMITDecoding(3))
    for settings in (COMMITDecoding(3, guidance_scale=3.0), COMMITDecoding(3, revise_rounds=1)):
        codes = module.generate_codes(request, 16, seeds, settings)
        assert not torch.equal(codes, plain)
        assert torch.equal(module.generate_codes(request, 16, seeds, settings), codes)


def test_a_model_of_codes_in_parts_trains_and_generates(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    module = make_module(tokenizer_bundle, token_groups=2)
    assert module.network.part_size == 4
    loss = module.training_step(clips, 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.network.parameters())
    video = module.generate(condition(clips, "central_inpainting"), 16, torch.arange(4))
    assert video.shape == (4, 3, 16, 32, 32)


def test_short_names_of_tasks_are_understood(module: COMMITModule) -> None:
    assert module.checked_task("inpaint_central") == "central_inpainting"
    assert module.checked_task("class", 3) == "class_conditional"
    assert (module.known_frames("predict"), module.known_frames("interpolate")) == (1, 16)


def test_videos_to_show_go_through_the_tasks(tokenizer_bundle: Path, clips: dict[str, Tensor]) -> None:
    tasks = ("class_frame_prediction", "unconditional", "central_inpainting")
    module = make_module(tokenizer_bundle, tasks=tasks)
    seeds = torch.arange(4)
    video = module.sample_videos(clips, seeds)
    for row, task in enumerate([*tasks, tasks[0]]):
        rows = slice(row, row + 1)
        alone = module.generate(condition(clips, task, rows), 16, seeds[rows])
        torch.testing.assert_close(video[rows], alone, atol=1e-4, rtol=0)

    labels = clips["label"].tolist()
    assert module.sample_captions(clips, 4) == [
        (tasks[0], f"{tasks[0]}, class {labels[0]}"),
        (tasks[1], tasks[1]),
        (tasks[2], tasks[2]),
        (tasks[0], f"{tasks[0]}, class {labels[3]}"),
    ]


def test_without_a_label_the_seeds_go_through_the_classes(module: COMMITModule) -> None:
    batch = {"seeds": torch.tensor([3, 14]), "num_frames": 16, "task": "class_conditional"}
    given = batch | {"label": torch.tensor([3, 2])}
    made = [torch.cat([*module.predict_step(one, 0)["pieces"]], dim=2) for one in (batch, given)]
    assert torch.equal(*made)


# A checkpoint


def test_a_checkpoint_is_plain_and_loads(tokenizer_bundle: Path, clips: dict[str, Tensor], tmp_path: Path) -> None:
    module = COMMITModule(str(tokenizer_bundle), **(TOY | {"sampling": COMMITDecoding(num_steps=7, top_k=3)}))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", enable_model_summary=False, **quiet)
    loader = DataLoader([clips], batch_size=None)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "made.ckpt")
    torch.load(tmp_path / "made.ckpt", weights_only=True)
    loaded = COMMITModule.load_from_checkpoint(tmp_path / "made.ckpt")
    assert loaded.sampling == COMMITDecoding(num_steps=7, top_k=3)
    assert loaded.tasks == TASKS
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
