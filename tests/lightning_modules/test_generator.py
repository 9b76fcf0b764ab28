"""What all second-stage models share, shown on one that learns nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.generator import Condition, VideoGenerator
from models.random import keyed_generator
from models.tokenizers import VQGAN3D
from models.weights import load_tokenizer, state_digest


class Dice(VideoGenerator):
    """Draws every code from the sample's own seed."""

    def __init__(self, tokenizer: str, num_frames: int = 16, resolution: int = 32, **changes: Any) -> None:
        arguments = {"downsample": (4, 8, 8), "codebook_size": 16, "seed": 3} | changes
        super().__init__(tokenizer, num_frames, resolution, **arguments)
        self.layer = nn.Linear(1, 1)

    def generate(self, condition: Condition, num_frames: int, seeds: Tensor, sampling: Any = None) -> Tensor:
        shape = (num_frames // 4, *self.latent_shape[1:])
        codes = [torch.randint(16, shape, generator=keyed_generator(seed)) for seed in seeds.tolist()]
        return self.decode_codes(torch.stack(codes))


@pytest.fixture
def dice(tokenizer_bundle: Path) -> Dice:
    module = Dice(str(tokenizer_bundle))
    module.load_tokenizer()
    return module


@pytest.fixture
def tokenizer(tokenizer_bundle: Path) -> VQGAN3D:
    return load_tokenizer(tokenizer_bundle)


def on_rank(module: VideoGenerator, rank: int, world_size: int, step: int = 0) -> VideoGenerator:
    """Attach a stand-in for the Trainer that knows where we are."""
    module._trainer = SimpleNamespace(global_rank=rank, world_size=world_size, global_step=step)
    return module


def random_video(batch_size: int = 2, num_frames: int = 16) -> Tensor:
    return torch.rand(batch_size, 3, num_frames, 32, 32, generator=keyed_generator(5)) * 2 - 1


# Geometry and tokenizer


@pytest.mark.parametrize(
    ("num_frames", "resolution", "message"),
    [
        (18, 32, r"num_frames=18 is no multiple of the tokenizer's factor 4. Nearest: 16 or 20 \(--data.num_frames\)"),
        (16, 36, r"resolution=36 is no multiple of the tokenizer's factor 8. Nearest: 32 or 40 \(--data.resolution\)"),
    ],
)
def test_a_size_that_is_no_whole_number_of_codes_is_refused(num_frames: int, resolution: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dice("nowhere", num_frames, resolution)


def test_a_model_is_built_and_counted_without_its_tokenizer() -> None:
    module = Dice("nowhere")
    assert module.latent_shape == (4, 4, 4)
    assert sum(parameter.numel() for parameter in module.parameters()) == 2


def test_missing_tokenizer_names_the_commands_that_make_one() -> None:
    with pytest.raises(FileNotFoundError, match=r"No tokenizer at nowhere (?s:.*)make train(?s:.*)longtake export"):
        Dice("nowhere").setup("fit")


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"codebook_size": 32}, r"codebook_size=16, the model expects \(4, 8, 8\) and 32"),
        ({"downsample": (2, 8, 8)}, r"downsample=\(4, 8, 8\) .* the model expects \(2, 8, 8\) and 16"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer_bundle: Path, changes: dict, theirs: str) -> None:
    with pytest.raises(ValueError, match=theirs):
        Dice(str(tokenizer_bundle), **changes).load_tokenizer()


def test_tokenizer_stays_out_of_the_module_tree(dice: Dice) -> None:
    assert dice.state_dict().keys() == {"layer.weight", "layer.bias"}
    assert [name for name, _ in dice.named_children()] == ["layer"]
    dice.train()
    assert not dice.tokenizer.training  # its statistics stay frozen
    assert not any(parameter.requires_grad for parameter in dice.tokenizer.parameters())


def test_tokenizer_is_read_once(dice: Dice) -> None:
    first = dice.tokenizer
    dice.setup("fit")
    assert dice.tokenizer is first


def test_checkpoint_names_the_tokenizer_by_its_weights(dice: Dice, tokenizer: VQGAN3D) -> None:
    checkpoint: dict[str, Any] = {}
    dice.on_save_checkpoint(checkpoint)
    assert checkpoint["tokenizer_digest"] == state_digest(tokenizer.state_dict())
    dice.on_load_checkpoint(checkpoint)


def test_checkpoint_of_another_tokenizer_is_refused(dice: Dice) -> None:
    with pytest.raises(ValueError, match=r"trained on tokenizer 0123456789ab, but .*toy is .*--model.tokenizer"):
        dice.on_load_checkpoint({"tokenizer_digest": "0123456789abcdef"})


def test_checkpoint_is_compared_with_the_tokenizer_before_anyone_has_loaded_it(tokenizer_bundle: Path) -> None:
    """As `load_from_checkpoint` does."""
    with pytest.raises(ValueError, match="trained on tokenizer 0123456789ab"):
        Dice(str(tokenizer_bundle)).on_load_checkpoint({"tokenizer_digest": "0123456789abcdef"})


def test_checkpoint_without_a_tokenizer_is_refused(dice: Dice) -> None:
    with pytest.raises(ValueError, match="names no tokenizer"):
        dice.on_load_checkpoint({})


# Codes of batches


def test_a_whole_clip_gives_all_of_its_codes(dice: Dice, tokenizer: VQGAN3D) -> None:
    video = random_video()
    codes, start = dice.window_codes({"video": video})
    assert start == 0
    assert torch.equal(codes, tokenizer.encode(video).codes)


def test_cached_codes_are_taken_as_they_are(dice: Dice) -> None:
    codes = torch.randint(16, (2, 4, 4, 4), generator=keyed_generator(1))
    assert torch.equal(dice.window_codes({"codes": codes})[0], codes)


def test_margins_are_cut_from_the_codes(dice: Dice, tokenizer: VQGAN3D) -> None:
    video = random_video()
    window = {"window_start": 24, "window_frames": 4, "margin_before": 8}
    codes, start = dice.window_codes({"video": video, **window})
    assert start == 6
    assert torch.equal(codes, tokenizer.encode(video).codes[:, 2:3])


def test_mixed_precision_does_not_touch_the_tokenizer(dice: Dice) -> None:
    video = random_video(4)
    codes = dice.window_codes({"video": video})[0]
    decoded = dice.decode_codes(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            dice.tokenizer.pre_vq_conv(torch.rand(1, 16, 1, 1, 1)).dtype == torch.bfloat16
        )  # or it would prove nothing
        assert torch.equal(dice.window_codes({"video": video})[0], codes)
        assert torch.equal(dice.decode_codes(codes), decoded)


# Random numbers


def test_ranks_take_their_rows_of_the_global_batch(dice: Dice) -> None:
    drawn: list[int] = []

    def draw(size: int) -> Tensor:
        drawn.append(size)
        return torch.arange(size)

    rows = [on_rank(dice, rank, 3).sliced_by_rank(draw, 4) for rank in range(3)]
    assert drawn == [12, 12, 12]
    assert torch.cat(rows).tolist() == list(range(12))


def test_random_numbers_of_a_step_depend_on_step_and_stream_alone(dice: Dice) -> None:
    def draw(rank: int, step: int, *keys: int) -> float:
        return torch.rand((), generator=on_rank(dice, rank, 2, step).step_generator(*keys)).item()

    assert draw(0, 7, 1) == draw(1, 7, 1) == draw(0, 7, 1)
    assert len({draw(0, 7, 1), draw(0, 8, 1), draw(0, 7, 2), draw(0, 7, 1, 0), draw(0, 7, 1, 1)}) == 5


# Generation


def test_decoded_codes_are_the_tokenizers_video(dice: Dice, tokenizer: VQGAN3D) -> None:
    encoded = tokenizer.encode(random_video())
    assert torch.equal(dice.decode_codes(encoded.codes), tokenizer.decode(encoded.latents))


def test_callbacks_and_prediction_see_a_video_for_each_seed(dice: Dice) -> None:
    seeds = torch.tensor([4, 9])
    shown = dice.sample_videos({"video": random_video(1)}, seeds)
    assert shown.shape == (2, 3, 16, 32, 32)
    predicted = dice.predict_step({"seeds": seeds, "num_frames": 8}, 0)
    assert torch.equal(predicted["seeds"], seeds)
    video = torch.cat([*predicted["pieces"]], dim=2)
    assert torch.equal(video, dice.generate(Condition(), 8, seeds))
    assert video.shape == (2, 3, 8, 32, 32)


def test_captions_say_what_videos_were_asked_for(dice: Dice) -> None:
    batch = {"label": torch.tensor([4, 9, 2]), "text": ["a ball", "a box", "a star"]}
    assert dice.sample_captions(batch, 2) == [("video", ""), ("video", "")]
    dice.num_classes = 12
    assert dice.sample_captions(batch, 2) == [("video", "class 4"), ("video", "class 9")]
    dice.reads_text = True
    assert dice.sample_captions(batch, 2) == [("video", "a ball"), ("video", "a box")]


def test_known_pixels_are_first_frames_only_if_they_are_whole() -> None:
    video, known = torch.zeros(2, 3, 8, 4, 4), torch.zeros(8, 4, 4, dtype=torch.bool)
    assert Condition().first_frames() is None
    assert Condition(video=video).first_frames() is video  # without a mask, all of it is known
    assert Condition(video=video, known=known).first_frames() is None
    known[:3] = True
    assert Condition(video=video, known=known).first_frames().shape == (2, 3, 3, 4, 4)
    assert Condition(video=video, known=known.expand(2, -1, -1, -1)).first_frames().shape[2] == 3
    known[5, 0, 0] = True
    with pytest.raises(ValueError, match="goes on with whole first frames"):
        Condition(video=video, known=known).first_frames()
