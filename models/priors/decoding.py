"""How a masked-token model turns masks into tokens.

Confidence decoding (MaskGIT; MeBT's release calls it `maskgit`): all masked positions are predicted at once, the most
confident join the context, the rest are predicted again. The number that stays masked follows a schedule of the step,
so every shape is known on the host beforehand and nothing waits for the device.

Noise comes from a callable, so that a test can switch it off and sample i can own the generator of its own seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.random import keyed_generator

MaskSchedule = Literal["linear", "cosine", "square", "cubic", "sqrt"]
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
) -> Tensor:
    """Fill the target positions of a code map by confidence decoding (MeBT, section 3.3; MaskGIT).

    At progress `u = i / num_steps`, `m = ceil(mask_ratio(u) N)` tokens are to stay masked. If more than the targets at
    hand, or as many, the step reveals nothing and is skipped without a forward pass; else every target is drawn, and
    the targets with the highest `log p + c Gumbel` (written `p / E^c`) join the context with the code just drawn.

    Args:
        predict: The network: codes `[B, N]`, context `[B, S]`, targets `[B, M]` to logits `[B, M, K]`.
        codes: `[B, N]` int64, right at the context positions, ignored elsewhere.
        context: `[B, S]` positions that are given and never change.
        targets: `[B, M]` positions to fill; at least one.
        settings: Steps, schedule, temperatures and filters.
        noise: Draws of `Exp(1)`, called with a shape.

    Returns:
        `[B, N]` codes, filled.
    """
    num_tokens = context.shape[1] + targets.shape[1]
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
