"""Gaussian diffusion of continuous latents: noise processes, sampling steps and guidance.

A process mixes a clean latent `z0` with noise `e` to `z = a z0 + b e`; `(a, b)` are its levels, signal and noise. The
network predicts a velocity `v`, from which both `z0` and `e` follow by products and sums alone, without a division by
a level. So the last step of the zero-terminal-SNR schedule, where `z` is pure noise, is a step like all others:

    diffusion (Salimans and Ho, 2022)   a^2 + b^2 = 1   v = a e - b z0   z0 = a z - b v   e = b z + a v
    rectified flow (Liu et al., 2023)   a + b = 1       v = e - z0       z0 = z - b v     e = z + a v

W.A.L.T prints the velocity of the first row with its coefficients exchanged; that form cannot be solved for `z0` at
a = 0, so the one of the papers that it cites is used.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Levels = tuple[Tensor, Tensor]  # signal and noise, each broadcasting against a latent


# Schedules


def linear_schedule(
    num_steps: int = 1000, first_beta: float = 1e-4, last_beta: float = 0.02, zero_terminal_snr: bool = True
) -> Tensor:
    """Signal power `gamma` `[num_steps]` of a linear beta schedule, in float64.

    Args:
        num_steps: Number of noise levels.
        first_beta: Variance that the first step adds.
        last_beta: Variance that the last step adds.
        zero_terminal_snr: Shift and stretch sqrt(gamma) so that the last level is pure noise and the first stays as it
            is (Lin et al., 2024, algorithm 1); without it W.A.L.T's FVD is 91 instead of 61 (table 3e).
    """
    betas = torch.linspace(first_beta, last_beta, num_steps, dtype=torch.float64)
    signal = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    return signal.square()


def min_snr_weight(signal: Tensor, cap: float = 5.0, floor: float = 0.0) -> Tensor:
    """Weight `min(SNR, cap) / (SNR + 1)` of a velocity's squared error (Hang et al., 2023), never below `floor`.

    Args:
        signal: Square root of the signal power; 0 is no problem.
        cap: Largest signal-to-noise ratio that counts.
        floor: Least weight. Without one, pure noise has none, and the first step of sampling is never learned.
    """
    gamma = signal.square()
    return torch.minimum(gamma, cap * (1 - gamma)).clamp(min=floor)


# Processes


class NoiseProcess(nn.Module, ABC):
    """How clean latents become noise. Times are those that the network embeds, from 0 (clean) to about 1000 (noise)."""

    @abstractmethod
    def times(self, uniform: Tensor) -> Tensor:
        """Times in training, from numbers that are uniform in [0, 1)."""

    @abstractmethod
    def levels(self, times: Tensor) -> Levels:
        """Signal and noise of times, in float32 and their shape."""

    @abstractmethod
    def sampling_times(self, num_steps: int) -> list[float]:
        """Times of a sampler's steps, from noise on; the step after the last one arrives at the clean latent.

        Raises:
            ValueError: If the process does not have so many.
        """

    @abstractmethod
    def velocity(self, clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """What the network is trained to predict."""

    @abstractmethod
    def clean(self, noisy: Tensor, velocity: Tensor, levels: Levels) -> Tensor:
        """Clean latent of a noisy one and its velocity."""

    @abstractmethod
    def noise(self, noisy: Tensor, velocity: Tensor, levels: Levels) -> Tensor:
        """Noise in a noisy latent, given its velocity."""


def add_noise(clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """Mix a clean latent with noise."""
    signal, sigma = levels
    return signal * clean + sigma * noise


class Diffusion(NoiseProcess):
    """The variance-preserving process of W.A.L.T (table 8): 1000 steps, linear betas, zero terminal SNR.

    Args:
        num_steps: Number of noise levels.
        zero_terminal_snr: Whether the last level is pure noise.
    """

    signal: Tensor
    sigma: Tensor

    def __init__(self, num_steps: int = 1000, zero_terminal_snr: bool = True) -> None:
        super().__init__()
        self.num_steps = num_steps
        # on the CPU also where parameters are built on the meta device; computed, so no checkpoint holds it
        with torch.device("cpu"):
            gamma = linear_schedule(num_steps, zero_terminal_snr=zero_terminal_snr)
        self.register_buffer("signal", gamma.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - gamma).sqrt().float(), persistent=False)

    def times(self, uniform: Tensor) -> Tensor:
        """Every level is as likely, the last one included."""
        return (uniform * self.num_steps).floor().clamp(max=self.num_steps - 1)

    def levels(self, times: Tensor) -> Levels:
        """Look up levels."""
        index = times.long()
        return self.signal[index], self.sigma[index]

    def sampling_times(self, num_steps: int) -> list[float]:
        """`trailing` steps (Lin et al., 2024): evenly spaced from the last level, which is pure noise; 999, 979, ...

        Raises:
            ValueError: If there are fewer levels than steps.
        """
        if not 0 < num_steps <= self.num_steps:
            raise ValueError(
                f"num_steps={num_steps}: this process has 1 to {self.num_steps} steps (--model.sampling.num_steps)."
            )
        stride = self.num_steps / num_steps
        return [float(round(self.num_steps - i * stride) - 1) for i in range(num_steps)]

    def velocity(self, clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """Return a e - b z0."""
        signal, sigma = levels
        return signal * noise - sigma * clean

    def clean(self, noisy: Tensor, velocity: Tensor, levels: Levels) -> Tensor:
        """Return a z - b v."""
        signal, sigma = levels
        return signal * noisy - sigma * velocity

    def noise(self, noisy: Tensor, velocity: Tensor, levels: Levels) -> Tensor:
        """Return b z + a v."""
        signal, sigma = levels
        return sigma * noisy + signal * velocity


class RectifiedFlow(NoiseProcess):
    """Straight lines from data to noise, times drawn from a logit-normal (Esser et al., 2024). Not part of W.A.L.T.

    Args:
        shift: Moves times towards noise: u <- shift u / (1 + (shift - 1) u); larger than 1 for larger latents.
    """

    scale = 1000.0  # the network's time embedding is made for numbers of this size

    def __init__(self, shift: float = 1.0) -> None:
        super().__init__()
        self.shift = shift

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def times(self, uniform: Tensor) -> Tensor:
        """Logit-normal times."""
        return self.scale * self._shifted(torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).sigmoid())

    def levels(self, times: Tensor) -> Levels:
        """The time is the share of noise."""
        sigma = (times / self.scale).float()
        return 1 - sigma, sigma

    def sampling_times(self, num_steps: int) -> list[float]:
        """Evenly spaced from pure noise before the shift.

        Raises:
            ValueError: If there are none.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: at least 1 step (--model.sampling.num_steps).")
        u = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
        return (self.scale * self._shifted(u)).tolist()

    def velocity(self, clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """Return e - z0."""
        return noise - clean

    def clean(self, noisy: Tensor, velocity: Tensor, levels: Levels) -> Tensor:
        """Return z - b v."""
        return noisy - levels[1] * velocity

    def noise(self, noisy: Tensor, velocity: Tensor, levels: Levels) -> Tensor:
        """Return z + a v."""
        return noisy + levels[0] * velocity


# Sampling


@dataclass(frozen=True)
class DiffusionSampling:
    """How to sample.

    Args:
        num_steps: Steps from noise to a clean latent.
        eta: Share of fresh noise: 0 is DDIM (the paper's sampler; eta itself is our choice), 1 is DDPM.
        guidance_scale: Weight w of the condition: v = v_null + w (v_condition - v_null); 1 does without guidance.
        guidance_power: Grow the weight from 1 at pure noise to guidance_scale: 1 + (w - 1) (1 - cos(pi (1 - t)^power))
            / 2 with t from 1 down to 0. W.A.L.T uses this schedule of MDT for ImageNet (power 4 there); null keeps w
            constant.
        guidance_rescale: Share of a guided velocity whose standard deviation is set back to that of the unguided one
            (Lin et al., 2024); not part of the paper.
        guidance_interval: Guide between these noise levels alone, as fractions of the process (Kynkaanniemi et al.,
            2024); not part of the paper.
        low_res_time: Noise that a super-resolution stage adds to what it enlarges, as a time of the process (our
            choice; the paper gives no number).

    Raises:
        ValueError: If a number is out of its range.
    """

    num_steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0
    guidance_power: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    low_res_time: float = 100.0

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        checks = {
            f"num_steps={self.num_steps}: at least 1": self.num_steps >= 1,
            f"eta={self.eta}: from 0 to 1": 0 <= self.eta <= 1,
            f"guidance_scale={self.guidance_scale}: at least 0": self.guidance_scale >= 0,
            f"guidance_power={self.guidance_power}: above 0": self.guidance_power is None or self.guidance_power > 0,
            f"guidance_rescale={self.guidance_rescale}: from 0 to 1": 0 <= self.guidance_rescale <= 1,
            f"guidance_interval={self.guidance_interval}: 0 <= low <= high <= 1": 0 <= low <= high <= 1,
            f"low_res_time={self.low_res_time}: from 0 to 999": 0 <= self.low_res_time <= 999,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(f"Sampling cannot work with {rule} (--model.sampling.{rule.split('=')[0]}).")

    @property
    def is_guided(self) -> bool:
        """Whether the network is also asked without condition."""
        return self.guidance_scale != 1

    def guidance_at(self, time: float) -> float:
        """Weight of the condition at a time from 0 to 1."""
        low, high = self.guidance_interval
        if not low <= time <= high:
            return 1.0
        if self.guidance_power is None:
            return self.guidance_scale
        ramp = (1 - math.cos(math.pi * (1 - time) ** self.guidance_power)) / 2
        return 1 + (self.guidance_scale - 1) * ramp


def guided(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance of all channels.

    Args:
        conditional: Prediction `[B, ...]` with the condition.
        unconditional: Prediction without.
        scale: 1 is the conditional prediction, 0 the unconditional one.
        rescale: Share of the result that gets each sample's standard deviation of the conditional prediction.
    """
    mixed = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return mixed
    axes = list(range(1, mixed.ndim))
    matched = mixed * (conditional.std(axes, keepdim=True) / mixed.std(axes, keepdim=True))
    return rescale * matched + (1 - rescale) * mixed


def sampling_step(
    clean: Tensor, noise: Tensor, levels: Levels, next_levels: Levels, eta: float = 0.0, fresh: Tensor | None = None
) -> Tensor:
    """From one noise level to the next (DDIM, Song et al., 2021, equations 12 and 16).

    Args:
        clean: Estimate of the clean latent.
        noise: Estimate of the noise.
        levels: Levels of the noisy latent that the estimates were made from.
        next_levels: Levels to arrive at.
        eta: 0 is deterministic; 1 draws from DDPM's posterior between the two levels.
        fresh: Standard normal noise; needed if eta is not 0.
    """
    (signal, sigma), (next_signal, next_sigma) = levels, next_levels
    if eta == 0 or fresh is None:
        return add_noise(clean, noise, next_levels)
    # the variance of DDPM's posterior: beta (1 - g') / (1 - g), where beta = 1 - g / g' is what lies between the levels
    variance = (next_sigma / sigma).square() * (1 - (signal / next_signal).square())
    kept = (next_sigma.square() - eta**2 * variance).clamp(min=0).sqrt()
    return next_signal * clean + kept * noise + eta * variance.clamp(min=0).sqrt() * fresh


class Predict(Protocol):
    """The network in a sampler's hands: velocity of noisy latents, given the last estimate of the clean ones."""

    def __call__(self, noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
        """Return `[B, ...]`; without its condition if `conditional` is False."""


def sample(process: NoiseProcess, predict: Predict, draw: Callable[[], Tensor], settings: DiffusionSampling) -> Tensor:
    """Sample clean latents.

    The estimate of one step is the self-condition of the next; the first one has zeros (Chen et al., 2023). Both
    predictions of guidance see the guided estimate.

    Args:
        process: Noise process.
        predict: The network with its conditions.
        draw: Standard normal noise `[B, D, t, h, w]`, another one at each call.
        settings: Steps and guidance.

    Returns:
        `[B, D, t, h, w]`.
    """
    noisy = draw()
    estimate = torch.zeros_like(noisy)
    times = process.sampling_times(settings.num_steps)
    axes = (-1,) + (1,) * (noisy.ndim - 1)
    longest = process.sampling_times(1)[0]

    def levels(time: float) -> Levels:
        signal, sigma = process.levels(torch.tensor([time], device=noisy.device))
        return signal.view(axes), sigma.view(axes)

    for i, time in enumerate(times):
        here = levels(time)
        is_last = i == len(times) - 1
        there = (torch.ones_like(here[0]), torch.zeros_like(here[1])) if is_last else levels(times[i + 1])
        batch_times = torch.full((len(noisy),), time, device=noisy.device)
        velocity = predict(noisy, batch_times, estimate, True)
        scale = settings.guidance_at(time / longest)
        if scale != 1:
            null = predict(noisy, batch_times, estimate, False)
            velocity = guided(velocity, null, scale, settings.guidance_rescale)
        estimate = process.clean(noisy, velocity, here)
        noise = process.noise(noisy, velocity, here)
        fresh = draw() if settings.eta > 0 and not is_last else None
        noisy = sampling_step(estimate, noise, here, there, settings.eta, fresh)
    return noisy
