"""How a masked-token model turns masks into tokens.

- Confidence decoding (MaskGIT; MeBT's release calls it `maskgit`): all masked positions are predicted at once, the most
  confident join the context, the rest are predicted again.
- Bootstrap: the first tokens are drawn one at a time, at random places, so that what is predicted at once afterwards
  has something in common to go by.
- Draft: one random group of positions after the other (Lee et al., Draft-and-Revise, NeurIPS 2022).
- Revise: a finished map is drawn again, one random group given all the others; block Gibbs sampling (ibid.).

All take the positions that are given (context) and those to fill (targets): with something given, they edit. How many
tokens are drawn when follows from the settings alone, so every shape is known on the host and nothing waits for the
device.

Noise comes from a callable, so that a test can switch it off and sample i can own the generator of its own seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.random import keyed_generator

MaskSchedule = Literal["linear", "cosine", "square", "cubic", "sqrt", "quadratic", "convex", "cosine_plus"]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (codes [B,N], context [B,S], targets [B,M]) -> logits [B,M,K]
Noise = Callable[[Sequence[int]], Tensor]  # shape -> independent draws of E ~ Exp(1)


def mask_ratio(schedule: MaskSchedule, u: float) -> float:
    """Fraction of tokens masked at progress `u` in [0, 1]: 1 at the start, 0 at the end."""
    match schedule:
        case "linear":
            return 1.0 - u
        case "cosine":
            # cos(pi / 2) is 6e-17 in float64, and a ceiling would leave one token masked for ever.
            return 0.0 if u >= 1.0 else math.cos(math.pi * u / 2)
        case "square":
            return 1.0 - u**2
        case "cubic":
            return 1.0 - u**3
        case "sqrt":
            return 1.0 - math.sqrt(u)
        case "quadratic":
            return (1.0 - u) ** 2
        case "convex":
            return (1.0 - u) ** 3
        case "cosine_plus":
            return 0.0 if u >= 1.0 else (1.0 + math.cos(math.pi * u)) / 2


def num_masked_tokens(schedule: MaskSchedule, u: float, num_tokens: int) -> int:
    """Tokens that stay masked at progress `u`: ratio times tokens, rounded up, in float32 as the release does."""
    ratio = torch.tensor(mask_ratio(schedule, u), dtype=torch.float32)
    return int(torch.ceil(ratio * num_tokens))


@dataclass(frozen=True)
class ConfidenceDecoding:
    """Settings of confidence decoding (MeBT, papers' E1).

    Args:
        num_steps: Number of steps; a step that would reveal nothing costs nothing.
        schedule: How many tokens stay masked along the steps.
        temperature: Divides the logits.
        choice_temperature: Scale of the Gumbel noise in the choice of what to keep, at the first step.
        choice_schedule: How that scale falls along the steps.
        top_k: Keep the k most likely codes (ties are kept); null keeps all.
        top_p: Keep the smallest set of codes that reaches this probability; null keeps all.
    """

    num_steps: int = 32
    schedule: MaskSchedule = "cosine"
    temperature: float = 1.0
    choice_temperature: float = 4.0
    choice_schedule: Literal["linear", "constant", "cosine"] = "linear"
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("num_steps", self.num_steps, 1), ("top_k", self.top_k, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least} (--model.sampling.{name}).")

    def choice_temperature_at(self, u: float) -> float:
        """Scale of the choice noise at progress `u`."""
        match self.choice_schedule:
            case "linear":
                return self.choice_temperature * (1.0 - u)
            case "constant":
                return self.choice_temperature
            case "cosine":
                return self.choice_temperature * mask_ratio("cosine", u)


def seeded_noise(seeds: Tensor, device: torch.device | str) -> Noise:
    """Exponential noise in which sample i draws from the generator of `seeds[i]`, whatever its batch.

    Args:
        seeds: `[B]` int64, non-negative.
        device: Where the noise is drawn and used.

    Returns:
        A callable that takes a shape `[B, ...]`.
    """
    generators = [keyed_generator(seed, device=device) for seed in seeds.tolist()]

    def draw(shape: Sequence[int]) -> Tensor:
        # One launch a sample: separate generators are what makes a sample independent of its batch.
        out = torch.empty(*shape, device=device)
        for row, generator in zip(out, generators, strict=True):
            row.exponential_(generator=generator)
        return out

    return draw


def filtered_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    keep_at_threshold: bool = False,
) -> Tensor:
    """Softmax after temperature, top-k (ties at the threshold are kept) and nucleus filter.

    Args:
        logits: `[..., K]`, any floating type; computed in float32, or float64 if given that.
        temperature: Divides the logits.
        top_k: Codes to keep, at least.
        top_p: A code is dropped if the codes before it, in descending order, already reach this probability.
        keep_at_threshold: Drop it only if they exceed it (TATS) instead of reaching it (MeBT).

    Returns:
        `[..., K]` probabilities.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature + 1e-8)
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered  # 0 for the best, which is never dropped
        is_dropped = mass_before > top_p if keep_at_threshold else mass_before >= top_p
        probabilities = probabilities.masked_fill(is_dropped.scatter(-1, order, is_dropped), 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def pick(probabilities: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw codes by the exponential race, `argmax p / E` with `E ~ Exp(1)`.

    Args:
        probabilities: `[..., K]`.
        noise: `[..., K]` exponential draws; ones give the most likely code.

    Returns:
        The codes and their probabilities, each `[...]`.
    """
    codes = (probabilities / noise).argmax(dim=-1)
    return codes, probabilities.gather(-1, codes[..., None])[..., 0]


@torch.no_grad()
def confidence_decode(
    predict: Predict,
    codes: Tensor,
    context: Tensor,
    targets: Tensor,
    settings: ConfidenceDecoding,
    noise: Noise,
    num_tokens: int | None = None,
) -> Tensor:
    """Fill the target positions of a code map by confidence decoding (MeBT, section 3.3; MaskGIT).

    At progress `u = i / num_steps`, `m = ceil(mask_ratio(u) N)` tokens are to stay masked. If more than the targets at
    hand, or as many, the step reveals nothing and is skipped without a forward pass; else every target is drawn, and
    the targets with the highest `log p + c Gumbel` (written `p / E^c`) join the context with the code just drawn.

    Args:
        predict: The network: codes `[B, N]`, context `[B, S]`, targets `[B, M]` to logits `[B, M, K]`.
        codes: `[B, N]` int64, right at the context positions, ignored elsewhere.
        context: `[B, S]` positions that are given and never change.
        targets: `[B, M]` positions to fill.
        settings: Steps, schedule, temperatures and filters.
        noise: Draws of `Exp(1)`, called with a shape.
        num_tokens: N of the schedule. None counts context and targets, as the release does: where much is given, the
            first steps reveal nothing then, and the rest has fewer to go through.

    Returns:
        `[B, N]` codes, filled.
    """
    num_tokens = num_tokens or context.shape[1] + targets.shape[1]
    for step in range(1, settings.num_steps + 1):
        u = step / settings.num_steps
        num_masked = num_masked_tokens(settings.schedule, u, num_tokens)
        num_revealed = targets.shape[1] - num_masked
        if num_revealed <= 0:
            continue
        probabilities = filtered_probabilities(
            predict(codes, context, targets), settings.temperature, settings.top_k, settings.top_p
        )
        drawn, confidence = pick(probabilities, noise(probabilities.shape))  # [B, M]
        codes = codes.scatter(1, targets, drawn)
        choice_noise = noise(confidence.shape) ** settings.choice_temperature_at(u)
        order = (confidence / choice_noise).argsort(dim=1, descending=True, stable=True)
        targets = targets.gather(1, order)
        context = torch.cat([context, targets[:, :num_revealed]], dim=1)
        targets = targets[:, num_revealed:]
    return codes


@torch.no_grad()
def bootstrap_decode(
    predict: Predict, codes: Tensor, context: Tensor, targets: Tensor, num_passes: int, noise: Noise
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill some target positions one at a time, at random places (MeBT's release, for long videos).

    Every pass predicts all targets, as the network is used to, and keeps one. Temperature 1, no filter, as published.

    Args:
        predict: See `confidence_decode`; so are `codes`, `context`, `targets` and `noise`.
        codes: `[B, N]`.
        context: `[B, S]`.
        targets: `[B, M]`.
        num_passes: Tokens to draw; all targets if there are fewer.
        noise: Draws of `Exp(1)`.

    Returns:
        The codes, and the context and the targets to go on with.
    """
    for _ in range(min(num_passes, targets.shape[1])):
        logits = predict(codes, context, targets)  # [B, M, K]
        order = noise(targets.shape).argsort(dim=1)  # the first is drawn, before its code: no other row is needed
        chosen, targets = targets.gather(1, order).tensor_split([1], dim=1)
        row = logits.gather(1, order[:, :1, None].expand(-1, -1, logits.shape[2]))  # [B, 1, K]
        probabilities = filtered_probabilities(row)
        codes = codes.scatter(1, chosen, pick(probabilities, noise(probabilities.shape))[0])
        context = torch.cat([context, chosen], dim=1)
    return codes, context, targets


@torch.no_grad()
def draft_decode(
    predict: Predict,
    codes: Tensor,
    context: Tensor,
    targets: Tensor,
    noise: Noise,
    *,
    groups: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Fill the target positions in random groups, one after the other; each pass predicts all that are left.

    Args:
        predict: See `confidence_decode`; so are `codes`, `context`, `targets` and `noise`.
        codes: `[B, N]`.
        context: `[B, S]`.
        targets: `[B, M]`.
        noise: Draws of `Exp(1)`.
        groups: Number of groups; their sizes differ by one at most.
        temperature: Divides the logits.
        top_k: See `filtered_probabilities`.
        top_p: See `filtered_probabilities`.

    Returns:
        `[B, N]` codes, filled.
    """
    targets = targets.gather(1, noise(targets.shape).argsort(dim=1))
    for size in _group_sizes(targets.shape[1], groups):
        # logits of all that are left are what the network is trained for; only the group's are drawn from
        logits = predict(codes, context, targets)[:, :size]
        probabilities = filtered_probabilities(logits, temperature, top_k, top_p)
        chosen, targets = targets.tensor_split([size], dim=1)
        codes = codes.scatter(1, chosen, pick(probabilities, noise(probabilities.shape))[0])
        context = torch.cat([context, chosen], dim=1)
    return codes


@torch.no_grad()
def revise(
    predict: Predict,
    codes: Tensor,
    context: Tensor,
    targets: Tensor,
    noise: Noise,
    *,
    rounds: int,
    groups: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw the target positions of a finished map again, group by group, each given all other tokens.

    Each round has new random groups and rewrites every target exactly once. No confidence is asked for.

    Args:
        predict: See `confidence_decode`; so is `noise`.
        codes: `[B, N]`, all of them drawn.
        context: `[B, S]` positions that are given and never change.
        targets: `[B, M]` positions to revise.
        noise: Draws of `Exp(1)`.
        rounds: How often everything is revised.
        groups: Groups of a round. They divide the number of tokens where nothing is given, as in the release;
            otherwise their sizes differ by one at most.
        temperature: Divides the logits; towards 0, the most likely code is taken.
        top_k: See `filtered_probabilities`.
        top_p: See `filtered_probabilities`.

    Returns:
        `[B, N]` codes.

    Raises:
        ValueError: If the groups do not divide the number of tokens of a map in which nothing is given.
    """
    count = targets.shape[1]
    if rounds and context.shape[1] == 0 and count % groups:
        raise ValueError(
            f"{groups} groups do not divide the {count} tokens to revise: choose a divisor, such as "
            f"{math.gcd(groups, count)} (--model.sampling.revise_groups)."
        )
    for _ in range(rounds):
        order = targets.gather(1, noise(targets.shape).argsort(dim=1))
        first = 0
        for size in _group_sizes(count, groups):
            group, others = order[:, first : first + size], torch.cat([order[:, :first], order[:, first + size :]], 1)
            logits = predict(codes, torch.cat([context, others], dim=1), group)
            probabilities = filtered_probabilities(logits, temperature, top_k, top_p)
            codes = codes.scatter(1, group, pick(probabilities, noise(probabilities.shape))[0])
            first += size
    return codes


def _group_sizes(count: int, groups: int) -> list[int]:
    """Sizes of the groups that are not empty, the larger ones first."""
    return [size for size in (count // groups + (i < count % groups) for i in range(groups)) if size]


@dataclass(frozen=True)
class DraftAndRevise(ConfidenceDecoding):
    """How MeBT samples (its release's `draft_and_revise`): bootstrap, a draft, rounds of revision.

    Args:
        num_steps: Steps of the draft; a step that would reveal nothing costs nothing.
        schedule: How many tokens stay masked along the steps of a draft by confidence.
        temperature: Divides the logits of the draft.
        choice_temperature: Scale of the Gumbel noise in the choice of what to keep, at the first step; by confidence.
        choice_schedule: How that scale falls along the steps; by confidence.
        top_k: Keep the k most likely codes in the draft (ties are kept); null keeps all.
        top_p: Keep the smallest set of codes that reaches this probability; null keeps all.
        draft: `confidence` keeps the codes of the highest confidence in each step; `groups` fills `num_steps` random
            groups, one after the other.
        bootstrap_passes: Tokens that are drawn one at a time before the draft.
        revise_rounds: How often all tokens are drawn again at the end.
        revise_groups: Groups of a round, each given all others; divides the number of tokens.
        revise_temperature: Divides the logits of the revision.
        revise_top_k: Filter of the revision; null keeps all.
        revise_top_p: Filter of the revision; null keeps all.
        context_frames: Pixel frames that a window of a video longer than the model's begins with, the last ones of what
            is there already; null for half a window.
        given_frames: Pixel frames of a clip that the tasks frame_prediction (its first) and frame_interpolation (its
            first and its last) give; null for one latent frame.
    """

    draft: Literal["confidence", "groups"] = "confidence"
    bootstrap_passes: int = 0
    revise_rounds: int = 0
    revise_groups: int = 2
    revise_temperature: float = 0.7
    revise_top_k: int | None = None
    revise_top_p: float | None = None
    context_frames: int | None = None
    given_frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"bootstrap_passes": 0, "revise_rounds": 0, "revise_groups": 1, "revise_top_k": 1}
        for name, bound in (least | {"context_frames": 1, "given_frames": 1}).items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value} must be at least {bound} (--model.sampling.{name}).")


@torch.no_grad()
def draft_and_revise(
    predict: Predict, codes: Tensor, context: Tensor, targets: Tensor, settings: DraftAndRevise, noise: Noise
) -> Tensor:
    """Fill the target positions: bootstrap, draft, revise.

    The schedule of the draft counts the tokens to fill. The release counts the given ones as well when it slides over a
    long video, and so leaves out the draft's first, most careful steps.

    Args:
        predict: See `confidence_decode`; so are `codes`, `context`, `targets` and `noise`.
        codes: `[B, N]`.
        context: `[B, S]`.
        targets: `[B, M]`.
        settings: What to do.
        noise: Draws of `Exp(1)`.

    Returns:
        `[B, N]` codes, filled.

    Raises:
        ValueError: See `revise`.
    """
    codes, seen, left = bootstrap_decode(predict, codes, context, targets, settings.bootstrap_passes, noise)
    if settings.draft == "confidence":
        codes = confidence_decode(predict, codes, seen, left, settings, noise, num_tokens=targets.shape[1])
    else:
        codes = draft_decode(
            predict,
            codes,
            seen,
            left,
            noise,
            groups=settings.num_steps,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
    return revise(
        predict,
        codes,
        context,
        targets,
        noise,
        rounds=settings.revise_rounds,
        groups=settings.revise_groups,
        temperature=settings.revise_temperature,
        top_k=settings.revise_top_k,
        top_p=settings.revise_top_p,
    )
