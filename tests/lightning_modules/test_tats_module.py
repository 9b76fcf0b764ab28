"""TATS' training, validation and sampling: what is a target, which class is meant, and what a sample depends on."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_modules import TATSModule
from lightning_modules.generator import Condition
from lightning_modules.tats import TATSCondition
from models.priors.autoregressive import AutoregressiveSampling
from models.random import keyed_generator
from models.weights import build, load_tokenizer, save_bundle

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
    module = make_module(tokenizer_bundle, num_frames=20, mask="closed_boundaries", released=True)
    codes = random_codes(frames=5)
    module.validation_step({"codes": codes}, 0)
    logits = module.network.code_logits(codes.flatten(1))
    nll = F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none")  # [2, 80]
    assert module.logged["val/loss"] == pytest.approx(nll.mean().item(), rel=1e-5)  # released
    real = torch.cat([nll[:, 16:64], nll[:, 79:]], dim=1)  # three frames between, and the very last code
    assert module.logged["val/nll"] == pytest.approx(real.mean().item(), rel=1e-5)


@pytest.mark.parametrize("released", [False, True])
def test_codes_that_the_mask_gives_away_are_no_targets_unless_released(tokenizer_bundle: Path, released: bool) -> None:
    module = make_module(tokenizer_bundle, num_frames=20, mask="closed_boundaries", released=released)
    codes = random_codes(frames=5)
    loss = module.training_step({"codes": codes}, 0)
    nll = F.cross_entropy(
        module.network.code_logits(codes.flatten(1)).transpose(1, 2), codes.flatten(1), reduction="none"
    )
    real = torch.cat([nll[:, 16:64], nll[:, 79:]], dim=1)
    assert loss.item() == pytest.approx((nll if released else real).mean().item(), rel=1e-5)
    assert nll.mean().item() != pytest.approx(real.mean().item(), rel=1e-3)
    module.validation_step({"codes": codes}, 0)
    assert module.logged["val/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_causal_model_has_nothing_given_away(module: TATSModule) -> None:
    module.validation_step({"codes": random_codes()}, 0)
    assert module.logged["val/nll"] == pytest.approx(module.logged["val/loss"], rel=1e-6)
    assert module.logged["val/loss"] != pytest.approx(math.log(16), rel=1e-3)


def test_a_model_without_a_head_is_as_surprised_as_a_uniform_one(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_classes=101)
    nn.init.zeros_(module.network.head.weight)
    loss = module.training_step({"codes": random_codes(), "label": torch.tensor([7, 100])}, 0)
    assert loss.item() == pytest.approx(math.log(16 + 101), abs=1e-5)


# What training changes in its input


def inputs_of(module: TATSModule, batch: dict[str, Any], step: int = 0) -> tuple[Tensor, Tensor | None]:
    """The codes and the condition that a training step gives the network."""
    seen: list[Any] = []
    code_logits = module.network.code_logits
    module.network.code_logits = lambda codes, condition: (
        seen.append((codes, condition)) or code_logits(codes, condition)
    )
    module._trainer.global_step = step
    module.training_step(batch, 0)
    del module.network.code_logits
    return seen[0]


def test_pkeep_replaces_codes_of_the_input_alone(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, pkeep=0.75)
    codes = random_codes(batch_size=32)
    given, _ = inputs_of(module, {"codes": codes})
    differ = (given != codes.flatten(1)).float().mean().item()
    assert differ == pytest.approx(0.25 * 15 / 16, abs=0.04)  # a random code may be the same
    assert (given.min(), given.max()) == (0, 15)
    logits = module.network.code_logits(given)
    expected = F.cross_entropy(logits.transpose(1, 2), codes.flatten(1)).item()
    assert module.logged["train/loss"] == pytest.approx(expected, rel=1e-5)  # targets are the true codes
    assert torch.equal(inputs_of(module, {"codes": codes})[0], given)  # a function of the step
    assert not torch.equal(inputs_of(module, {"codes": codes}, step=1)[0], given)
    module.validation_step({"codes": codes}, 0)
    clean = F.cross_entropy(module.network.code_logits(codes.flatten(1)).transpose(1, 2), codes.flatten(1)).item()
    assert module.logged["val/loss"] == pytest.approx(clean, rel=1e-5)


def test_dropped_conditions_become_an_id_of_their_own(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_classes=5, condition_dropout=0.25)
    assert module.network.token_embedding.num_embeddings == 5 + 1 + 16
    labels = torch.arange(64) % 5
    batch = {"codes": random_codes(batch_size=64), "label": labels}
    _, condition = inputs_of(module, batch)
    dropped = condition[:, 0] == 5
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.15)
    assert torch.equal(condition[~dropped, 0], labels[~dropped])
    module.network.condition_tokens = lambda *_: pytest.fail("validation drops nothing")
    assert (module.condition_of(module.batch_condition(batch), 64) < 5).all()


def test_two_ranks_draw_what_one_draws(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_classes=5, condition_dropout=0.5)
    together = module._uniform(6, 4, 1)
    parts = []
    for rank in (0, 1):
        module._trainer = SimpleNamespace(global_rank=rank, world_size=2, global_step=0)
        parts.append(module._uniform(6, 2, 1))
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pkeep": 0.0}, r"pkeep=0\.0: expected more than 0, at most 1"),
        (
            {"condition_dropout": 0.1},
            r"condition_dropout=0\.1: expected 0, or less than 1 for a model with a condition",
        ),
        ({"released": True}, r"released=True: expected false: no code is given away by a causal mask"),
        ({"num_classes": 3, "text_tokenizer": "bytes"}, r"give one of --model\.num_classes, --model\.text_tokenizer"),
        (
            {"num_classes": 3, "sampling": {"guidance_scale": 2.0}},
            r"guidance_scale=2\.0 needs a model .*condition_dropout",
        ),
        ({"audio_tokenizer": "x", "audio_downsample": (4, 8, 5)}, r"does not divide \(16, 64, 16\) frames, bands"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str, tokenizer_bundle: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(tokenizer_bundle, **options)


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


def test_guidance_looks_at_the_null_condition(tokenizer_bundle: Path) -> None:
    module = make_module(tokenizer_bundle, num_classes=5, condition_dropout=0.1)
    seeds, condition = torch.tensor([5, 6]), Condition(label=torch.tensor([1, 3]))

    def made(scale: float, given: Condition = condition) -> Tensor:
        sampling = AutoregressiveSampling(top_k=None, top_p=None, guidance_scale=scale)
        return module.generate_codes(given, 24, seeds, sampling)  # the window slides

    assert made(3.0).shape == (2, 6, 4, 4)
    assert not torch.equal(made(3.0), made(1.0))
    assert torch.equal(made(0.0), made(0.0, Condition(label=torch.tensor([4, 0]))))  # weight 0: no condition
    assert not torch.equal(made(1.0), made(1.0, Condition(label=torch.tensor([4, 0]))))


def test_a_set_for_evaluation_has_balanced_classes(class_module: TATSModule) -> None:
    class_module.sampling = AutoregressiveSampling(top_k=None, top_p=None, class_set=8)
    asked: list[Tensor] = []
    class_module.iter_generate = lambda condition, frames, seeds: asked.append(condition.label) or iter(())
    for seeds in (torch.arange(5), torch.arange(5, 8)):
        class_module.predict_step({"seeds": seeds, "num_frames": 4}, 0)
    assert sorted(torch.cat(asked).bincount(minlength=5).tolist()) in ([1, 1, 2, 2, 2], [0, 2, 2, 2, 2])
    class_module.predict_step({"seeds": torch.arange(2), "num_frames": 4, "label": torch.tensor([3, 3])}, 0)
    assert asked[-1].tolist() == [3, 3]  # what is asked for comes first


def test_a_label_is_for_a_model_with_classes(class_module: TATSModule, module: TATSModule) -> None:
    assert class_module.checked_task(None, 4) is None
    assert (class_module.class_conditional, module.class_conditional) == (True, False)
    with pytest.raises(ValueError, match="label=5: this TATS has the classes 0 to 4"):
        class_module.checked_task(None, 5)
    with pytest.raises(ValueError, match="label=0: this TATS has the classes none"):
        module.checked_task(None, 0)


# Text and sound


@pytest.fixture
def text_module(tokenizer_bundle: Path) -> TATSModule:
    text = {"text_tokenizer": "bytes", "text_vocabulary": 257, "text_length": 6}
    return make_module(tokenizer_bundle, **text, condition_dropout=0.5)


def test_text_comes_before_the_codes_as_ids(text_module: TATSModule) -> None:
    assert text_module.network.block_size == 6 + 64 - 1
    condition = text_module.condition_of(TATSCondition(text=["ab", "longer text"]), 2)
    assert condition.tolist() == [[98, 99, 0, 0, 0, 0], [109, 112, 111, 104, 102, 117]]
    codes = random_codes()
    text_module.validation_step({"codes": codes, "text": ["ab", "a red square"]}, 0)
    with_text = text_module.logged["val/loss"]
    text_module.validation_step({"codes": codes, "text": ["ab", "a red circle"]}, 0)
    assert text_module.logged["val/loss"] == with_text  # the ends are cut
    text_module.validation_step({"codes": codes, "text": ["ac", "a red square"]}, 0)
    assert text_module.logged["val/loss"] != with_text


def test_text_reaches_samples_and_longer_videos(text_module: TATSModule) -> None:
    seeds = torch.tensor([5, 5])
    codes = text_module.generate_codes(TATSCondition(text=["ab", "cd"]), 24, seeds)
    assert not torch.equal(codes[0], codes[1])
    batch = {"text": ["ab", "cd", "ef"], "seeds": seeds, "num_frames": 24}
    video = torch.cat([*text_module.predict_step(batch | {"text": batch["text"][:2]}, 0)["pieces"]], dim=2)
    assert torch.equal(video, text_module.decode_codes(codes))
    shown = text_module.sample_videos(batch, seeds)
    assert torch.equal(shown, text_module.generate(TATSCondition(text=["ab", "cd"]), 16, seeds))
    assert text_module.needs_clips(None)


def test_text_that_is_not_there_is_asked_for(text_module: TATSModule, module: TATSModule) -> None:
    with pytest.raises(ValueError, match=r"conditioned on text, but the batches hold none .*--data\.captions"):
        text_module.training_step({"codes": random_codes()}, 0)
    with pytest.raises(ValueError, match="expected 1 texts and no other condition"):
        text_module.generate(Condition(), 16, torch.tensor([1]))
    with pytest.raises(ValueError, match="not conditioned on text or sound"):
        module.generate(TATSCondition(text=["a"]), 16, torch.tensor([1]))


@pytest.fixture(scope="module")
def sound_bundle(tokenizer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of spectrograms: one channel, 4 x 16 x 8 a code."""
    config = json.loads((tokenizer_bundle / "config.json").read_text())
    for part, channels in (("encoder", "in_channels"), ("decoder", "out_channels")):
        config["init_args"][part]["init_args"] |= {channels: 1, "downsample": [4, 16, 8]}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = build(config).eval()
    with torch.no_grad():
        sound = torch.rand(8, 1, 16, 64, 16, generator=keyed_generator(4)) * 2 - 1
        vectors = tokenizer.pre_vq_conv(tokenizer.encoder(tokenizer.to_native(sound))).movedim(1, -1).flatten(0, -2)
        tokenizer.quantizer.embeddings.copy_(vectors[torch.randperm(len(vectors), generator=keyed_generator(0))[:16]])
    folder = tmp_path_factory.mktemp("sound") / "stft"
    save_bundle(folder, tokenizer, config, {"source": "a test"})
    return folder


def hearing_module(tokenizer_bundle: Path, sound_bundle: Path, **changes: Any) -> TATSModule:
    sound = {"audio_tokenizer": str(sound_bundle), "audio_downsample": (4, 16, 8), "audio_codebook_size": 16}
    return make_module(tokenizer_bundle, **(sound | changes))


def test_sound_comes_before_the_codes_as_codes_of_its_own(tokenizer_bundle: Path, sound_bundle: Path) -> None:
    module = hearing_module(tokenizer_bundle, sound_bundle)
    assert module.network.condition_length == 4 * 4 * 2
    audio = torch.rand(2, 1, 16, 64, 16, generator=keyed_generator(7)) * 2 - 1
    condition = module.condition_of(TATSCondition(audio=audio), 2)
    assert condition.shape == (2, 32)
    assert torch.equal(condition, load_tokenizer(sound_bundle).encode(audio).codes.flatten(1))
    codes = random_codes()
    loss = module.training_step({"codes": codes, "audio": audio}, 0)
    assert module.training_step({"codes": codes, "audio": audio.flip(0)}, 0) != loss
    assert not any("hearing" in name for name in module.state_dict())
    seeds = torch.tensor([3, 4])
    pieces = module.predict_step({"seeds": seeds, "num_frames": 16, "audio": audio}, 0)["pieces"]
    video = torch.cat([*pieces], dim=2)
    assert torch.equal(video, module.generate(TATSCondition(audio=audio), 16, seeds))
    assert not torch.equal(video, module.generate(TATSCondition(audio=audio.flip(0)), 16, seeds))


def test_sound_that_does_not_fit_is_refused(tokenizer_bundle: Path, sound_bundle: Path) -> None:
    module = hearing_module(tokenizer_bundle, sound_bundle)
    audio, seeds = torch.zeros(1, 1, 16, 64, 16), torch.tensor([1])
    with pytest.raises(ValueError, match=r"expected sound of \(1, 1, 16, 64, 16\) .* got \(1, 1, 8, 64, 16\)"):
        module.generate(TATSCondition(audio=audio[:, :, :8]), 16, seeds)
    with pytest.raises(ValueError, match="num_frames=20 is longer than the 16 frames of sound"):
        module.generate(TATSCondition(audio=audio), 20, seeds)
    with pytest.raises(ValueError, match="Sound goes with whole clips"):
        module.batch_condition({"audio": audio, "window_frames": 8})
    with pytest.raises(ValueError, match=r"has downsample=\(4, 16, 8\) and codebook_size=16, the model expects .* 32"):
        hearing_module(tokenizer_bundle, sound_bundle, audio_codebook_size=32)
    with pytest.raises(FileNotFoundError, match=r"No tokenizer of sound at nowhere"):
        hearing_module(tokenizer_bundle, sound_bundle, audio_tokenizer="nowhere")


def test_a_checkpoint_is_bound_to_the_tokenizer_of_its_condition(tokenizer_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("#version\na b</w>\n")
    text = {"text_vocabulary": 600, "text_length": 4}
    checkpoint: dict[str, Any] = {}
    make_module(tokenizer_bundle, text_tokenizer="bytes", **text).on_save_checkpoint(checkpoint)
    make_module(tokenizer_bundle, text_tokenizer="bytes", **text).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="another tokenizer of its condition"):
        make_module(tokenizer_bundle, text_tokenizer=str(tmp_path / "merges.txt"), **text).on_load_checkpoint(
            checkpoint
        )
    with pytest.raises(ValueError, match="has 257 ids, the model expects at most 200"):
        make_module(tokenizer_bundle, text_tokenizer="bytes", text_vocabulary=200)


# Long videos


def test_pixels_of_long_videos_come_in_pieces_of_constant_size(module: TATSModule) -> None:
    module.tokenizer.piece_frames = 8
    seeds = torch.tensor([5])
    drawn = random_codes(batch_size=1, frames=16)
    module.generate_codes = lambda condition, num_frames, seeds, sampling: drawn[:, : num_frames // 4]

    def largest(num_frames: int) -> tuple[int, Tensor]:
        """Elements of the largest tensor that any operation makes, and the frames."""
        with LargestTensor() as mode:
            pieces = []
            for piece in module.iter_generate(Condition(), num_frames, seeds):
                assert torch.is_grad_enabled()  # for whoever is given the piece
                assert not piece.requires_grad
                pieces.append(piece)
        assert len(pieces) > 1
        return mode.elements, torch.cat(pieces, dim=2)

    (short, _), (long, video) = largest(32), largest(64)
    assert video.shape == (1, 3, 64, 32, 32)
    assert long == short
    assert torch.equal(video, module.generate(Condition(), 64, seeds))


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that was computed."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_classes_take_turns_along_the_seeds(class_module: TATSModule) -> None:
    pieces = class_module.predict_step({"seeds": torch.tensor([6, 10]), "num_frames": 4}, 0)["pieces"]
    made = torch.cat([*pieces], dim=2)
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
    assert keys.generate_codes(Condition(), 260, torch.tensor([3])).shape == (1, 65, 4, 4)  # 17 keys, 16 gaps
    keys_alone = keys.sample_videos({}, torch.tensor([3]))
    assert keys_alone.shape == (1, 3, 8, 32, 32)  # two key frames, one after the other
