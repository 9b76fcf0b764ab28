"""How a next-token model makes videos: one window, a window that slides, and frames between frames.

TATS, section 3: short videos fill the model's window. Longer ones slide it over latent frames: the last few are context
at the window's beginning, the next ones are generated after them. In the hierarchy, one network makes key frames a few
latent frames apart, another one fills all gaps between them as one batch.

Noise comes from a callable (see `decoding.seeded_noise`), so that sample i owns the generator of its own seed.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from models.blocks.causal import KVCache
from models.priors.decoding import Noise, filtered_probabilities, pick, seeded_noise
from models.priors.tats import TATS
from models.random import keyed_generator


@dataclass(frozen=True)
class TokenFilter:
    """Which tokens may be drawn.

    Args:
        temperature: Divides the logits.
        top_k: Keep the k most likely tokens (ties are kept); None keeps all, 1 is greedy.
        top_p: Drop a token if the tokens before it, in descending order, exceed this probability; None keeps all.
        needs_top_k: Released behaviour: without `top_k`, `top_p` does nothing.
        guidance_scale: Weight w of the condition, before all else: `l_null + w (l_condition - l_null)`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    needs_top_k: bool = False
    guidance_scale: float = 1.0

    def guided(self, logits: Tensor, num_samples: int) -> Tensor:
        """Logits `[B, V]` of those that know the condition, and of those that do not if there are `2B` rows."""
        if len(logits) == num_samples:
            return logits
        known, null = logits.chunk(2)
        return null + self.guidance_scale * (known - null)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities `[..., V]` of the tokens that stay."""
        top_p = None if self.needs_top_k and self.top_k is None else self.top_p
        return filtered_probabilities(logits, self.temperature, self.top_k, top_p, keep_at_threshold=True)


@dataclass(frozen=True)
class AutoregressiveSampling:
    """Settings of TATS' sampling.

    Args:
        temperature: Divides the logits.
        top_k: Keep the k most likely tokens (ties are kept); null keeps all, 1 is greedy.
        top_p: Drop a token if the tokens before it, in descending order, exceed this probability; null keeps all.
        released_filter: The released filter: without top_k, top_p does nothing.
        first_top_k: top_k in the first window; null takes top_k's.
        first_top_p: top_p in the first window; null takes top_p's.
        context_frames: Latent frames that a sliding window keeps as context.
        new_frames: Latent frames generated before it slides on; null fills the window, the release makes one.
        interpolation: Checkpoint of the network that fills the frames between key frames; only for key frames.
        released_interpolation: Fill as the release does: positions and masks differ from those of training.
        gaps_at_once: Most gaps between key frames that are filled at once, if memory is short; null fills all.
        guidance_scale: Weight of the condition, for a model that was trained with condition_dropout; 1 does without.
        class_set: Size of a set for evaluation: the sample of seed s has the class of its s-th member, see
            `balanced_classes`. Null: the classes take turns along the seeds.

    Raises:
        ValueError: If gaps_at_once, guidance_scale or class_set is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = 2048
    top_p: float | None = 0.92
    released_filter: bool = False
    first_top_k: int | None = None
    first_top_p: float | None = None
    context_frames: int = 1
    new_frames: int | None = 1
    interpolation: str | None = None
    released_interpolation: bool = False
    gaps_at_once: int | None = None
    guidance_scale: float = 1.0
    class_set: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("gaps_at_once", self.gaps_at_once, 1),
            ("guidance_scale", self.guidance_scale, 0),
            ("class_set", self.class_set, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected at least {least} (--model.sampling.{name}).")

    @property
    def first_filter(self) -> TokenFilter:
        """Filter of the first window."""
        top_k = self.top_k if self.first_top_k is None else self.first_top_k
        top_p = self.top_p if self.first_top_p is None else self.first_top_p
        return TokenFilter(self.temperature, top_k, top_p, self.released_filter, self.guidance_scale)

    @property
    def filter(self) -> TokenFilter:
        """Filter of all else."""
        return TokenFilter(self.temperature, self.top_k, self.top_p, self.released_filter, self.guidance_scale)


def balanced_classes(num_samples: int, num_classes: int, seed: int = 0) -> Tensor:
    """Classes of a set of samples: as many of each, shuffled, less those that are too many, drawn at random.

    TATS' evaluation of UCF-101 makes 2048 // 101 + 1 = 21 videos of each class, and takes 2,048 of the 2,121 at random.
    Here only those that are taken need to be made. (The release makes up whole batches of a class first.)

    Args:
        num_samples: Size of the set.
        num_classes: Number of classes.
        seed: Key of the order.

    Returns:
        `[num_samples]` int64.
    """
    each = -(-num_samples // num_classes)
    order = torch.randperm(each * num_classes, generator=keyed_generator(seed, num_samples, num_classes))
    return order[:num_samples] % num_classes


def _draw(network: TATS, features: Tensor, token_filter: TokenFilter, num_samples: int, noise: Noise) -> Tensor:
    logits = token_filter.guided(network.head(features), num_samples)  # [B, V]
    return pick(token_filter.probabilities(logits), noise(logits.shape))[0]


def _to_codes(network: TATS, tokens: list[Tensor]) -> Tensor:
    # a condition id that was drawn, rare after training, becomes code 0
    return (torch.stack(tokens, dim=1) - network.condition_size).clamp(min=0)


@torch.no_grad()
def continue_codes(
    network: TATS, condition: Tensor, codes: Tensor, count: int, token_filter: TokenFilter, noise: Noise, cache: KVCache
) -> Tensor:
    """Generate codes after others.

    Args:
        network: Causal.
        condition: `[B, C]` condition tokens; `[2B, C]` for guidance, those of the null condition last.
        codes: `[B, m]` codes at the window's beginning; `m` may be 0.
        count: Codes to generate; they must fit the block.
        token_filter: Temperature, top-k, nucleus.
        noise: Draws of `Exp(1)`, called with `[B, V]` once a token.
        cache: Empty, or a beginning of condition and codes: it is not computed again.

    Returns:
        `[B, count]` codes in `[0, V_z)`.
    """
    copies = len(condition) // len(codes)
    known = (codes + network.condition_size).repeat(copies, 1)
    tokens = torch.cat([condition, known], dim=1)[:, cache.filled :]
    drawn: list[Tensor] = []
    for _ in range(count):
        positions = torch.arange(cache.filled, cache.filled + tokens.shape[1], device=tokens.device)
        features = network.extend(tokens, positions, cache)
        drawn.append(_draw(network, features[:, -1], token_filter, len(codes), noise))
        tokens = drawn[-1][:, None].repeat(copies, 1)
    return _to_codes(network, drawn)


def slide(network: TATS, condition: Tensor, num_frames: int, settings: AutoregressiveSampling, noise: Noise) -> Tensor:
    """Generate latent frames, with a window that slides once they are more than it holds (TATS, section 3.2).

    Positions begin at 0 in every window, so a window that slid needs the keys and values of its frames anew; those of
    the condition stay, and a window that still has room goes on from the cache. With one frame of context and one new
    frame, as released, a frame depends on its predecessor and the condition alone.

    Args:
        network: Causal.
        condition: `[B, C]` condition tokens; `[2B, C]` for guidance, those of the null condition last.
        num_frames: Latent frames.
        settings: Filters, frames of context, new frames.
        noise: Draws of `Exp(1)`.

    Returns:
        `[B, num_frames, F]` codes.

    Raises:
        ValueError: If context and new frames do not fit the window.
    """
    size, window, context = network.frame_tokens, network.num_frames, settings.context_frames
    cache = network.new_cache()
    guided = settings.guidance_scale != 1
    codes = condition.new_empty(len(condition) // (2 if guided else 1), 0)
    if num_frames <= window:
        codes = continue_codes(network, condition, codes, num_frames * size, settings.first_filter, noise, cache)
        return rearrange(codes, "b (t f) -> b t f", f=size)
    new = window - context if settings.new_frames is None else settings.new_frames
    if context < 1 or new < 1 or context + new > window:
        raise ValueError(
            f"context_frames={context} and new_frames={settings.new_frames} do not fit a window of {window} latent "
            "frames: expected at least 1 of each, together no more than that (--model.sampling.context_frames, "
            "--model.sampling.new_frames)."
        )
    codes = continue_codes(network, condition, codes, context * size, settings.first_filter, noise, cache)
    while (missing := num_frames - codes.shape[1] // size) > 0:
        if codes.shape[1] > context * size:  # the first window goes on, all others begin anew after the condition
            cache.clear(kept=condition.shape[1])
        known = codes[:, -context * size :]
        count = min(new, missing) * size
        codes = torch.cat(
            [codes, continue_codes(network, condition, known, count, settings.filter, noise, cache)], dim=1
        )
    return rearrange(codes, "b (t f) -> b t f", f=size)


@torch.no_grad()
def fill_between(
    network: TATS,
    condition: Tensor,
    left: Tensor,
    right: Tensor,
    token_filter: TokenFilter,
    noise: Noise,
    released: bool = False,
) -> Tensor:
    """Generate the latent frames between two (TATS, section 3.3).

    The boundaries come first: condition and left frame at the block's beginning, the right frame at its end, where they
    stood in training; they see each other, and the frames between see them and what came before.

    The release differs in three points, reproduced by `released`: the right frame stands one position early (with its
    last token, which training never gave), the left frame cannot see it and it is causal in itself, and the first new
    token is drawn from the right frame's last position instead of the left frame's.

    A causal network, variant (a) of the paper's figure, goes on after the left frame, whatever comes then.

    Args:
        network: With the mask `closed_boundaries`; under `open_boundaries` the last frame misses what it saw.
        condition: `[B, C]` condition tokens.
        left: `[B, F]` codes of the frame before.
        right: `[B, F]` codes of the frame after.
        token_filter: Temperature, top-k, nucleus.
        noise: Draws of `Exp(1)`.
        released: Whether to follow the release.

    Returns:
        `[B, t - 2, F]` codes.
    """
    middle = (network.num_frames - 2) * network.frame_tokens
    if network.attention_mask is None:
        codes = continue_codes(network, condition, left, middle, token_filter, noise, network.new_cache())
        return codes.unflatten(1, (-1, network.frame_tokens))
    size, block, offset = network.frame_tokens, network.block_size, network.condition_size
    past = torch.cat([condition, left + offset], dim=1)
    num_past = past.shape[1]
    future = (right if released else right[:, :-1]) + offset
    tokens = torch.cat([past, future], dim=1)
    count = tokens.shape[1]
    place = torch.arange(block, device=tokens.device)
    positions = torch.cat([place[:num_past], place[block - future.shape[1] :]])
    visible = network.attention_mask[:count, :count]
    if not released:
        visible = torch.ones_like(visible)
    cache = network.new_cache()
    features = network.extend(tokens, positions, cache, visible)
    drawn = [_draw(network, features[:, -1 if released else num_past - 1], token_filter, len(left), noise)]
    for position in range(num_past, num_past + middle - 1):
        features = network.extend(drawn[-1][:, None], place[position : position + 1], cache)
        drawn.append(_draw(network, features[:, -1], token_filter, len(left), noise))
    return rearrange(_to_codes(network, drawn), "b (t f) -> b t f", f=size)


def fill_gaps(
    network: TATS,
    condition: Tensor,
    keys: Tensor,
    token_filter: TokenFilter,
    seeds: Tensor,
    released: bool = False,
    gaps_at_once: int | None = None,
) -> Tensor:
    """Fill the gaps between key frames, all as one batch: `m F` sequential steps, however many keys there are.

    Args:
        network: See `fill_between`; fills `m = t - 2` frames a gap.
        condition: `[B, C]` condition tokens.
        keys: `[B, k, F]` codes of the key frames.
        token_filter: Temperature, top-k, nucleus.
        seeds: `[B, k - 1]` int64, of the gaps.
        released: Whether to follow the release.
        gaps_at_once: Rows of a batch, at most; None for no limit. The codes do not depend on it.

    Returns:
        `[B, (k - 1) (m + 1) + 1, F]` codes; key frame `i` is at `i (m + 1)`.
    """
    num_gaps = keys.shape[1] - 1
    if num_gaps == 0:
        return keys
    left, right = (rearrange(frames, "b g f -> (b g) f") for frames in (keys[:, :-1], keys[:, 1:]))
    condition = condition.repeat_interleave(num_gaps, dim=0)
    filled = [
        fill_between(
            network,
            condition[rows],
            left[rows],
            right[rows],
            token_filter,
            seeded_noise(seeds.flatten()[rows], keys.device),
            released,
        )
        for rows in torch.arange(len(left)).split(gaps_at_once or len(left))
    ]
    pieces = torch.cat([keys[:, :-1, None], rearrange(torch.cat(filled), "(b g) m f -> b g m f", g=num_gaps)], dim=2)
    return torch.cat([rearrange(pieces, "b g m f -> b (g m) f"), keys[:, -1:]], dim=1)
