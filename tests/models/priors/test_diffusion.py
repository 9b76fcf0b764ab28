"""Noise processes and samplers against closed forms, published numbers and the schedulers of diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from models.priors.diffusion import (
    Diffusion,
    DiffusionSampling,
    NoiseProcess,
    RectifiedFlow,
    add_noise,
    guided,
    linear_schedule,
    min_snr_weight,
    sample,
    sampling_step,
)
from models.random import keyed_generator

OPTIONS = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}


def noise(*shape: int, key: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=keyed_generator(key), dtype=dtype)


def table_levels(gamma: Tensor) -> tuple[Tensor, Tensor]:
    return gamma.sqrt(), (1 - gamma).sqrt()


# Schedules


def test_schedule_has_the_published_values() -> None:
    """Reference values in float64, computed apart from this code."""
    index = [0, 100, 250, 500, 750, 900, 990, 999]
    before = [0.99990000, 0.89514159, 0.52142303, 0.07779666, 0.00330016, 0.00027024, 0.00004837, 0.00004036]
    after = [0.99990000, 0.89449044, 0.51886054, 0.07524622, 0.00264411, 0.00010304, 0.00000037, 0.0]
    assert linear_schedule(zero_terminal_snr=False)[index].tolist() == pytest.approx(before, abs=1e-8)
    assert linear_schedule()[index].tolist() == pytest.approx(after, abs=1e-8)


def test_schedule_falls_strictly_to_exactly_zero() -> None:
    gamma = linear_schedule()
    assert gamma[999] == 0
    assert gamma[0].item() == pytest.approx(0.9999, abs=1e-12)
    assert (gamma.diff() < 0).all()
    betas = 1 - gamma[1:] / gamma[:-1]
    assert betas[-1] == 1
    assert betas[-2].item() == pytest.approx(0.7523, abs=1e-4)


def test_schedule_is_that_of_diffusers() -> None:
    theirs = DDIMScheduler(**OPTIONS).alphas_cumprod  # float32: cumulative products of its own
    assert torch.allclose(linear_schedule().float(), theirs, atol=3e-6)


def test_min_snr_weight() -> None:
    gamma = linear_schedule()
    snr = gamma / (1 - gamma)
    assert torch.allclose(min_snr_weight(gamma.sqrt(), 5.0), snr.clamp(max=5) / (snr + 1))
    assert min_snr_weight(gamma.sqrt(), 5.0)[-1] == 0
    assert min_snr_weight(gamma.sqrt(), 5.0, floor=0.1).min() == pytest.approx(0.1)


# Processes


@pytest.mark.parametrize("process", [Diffusion(), RectifiedFlow(), RectifiedFlow(shift=3.0)])
def test_velocity_converts_to_clean_and_noise_at_every_level(process: NoiseProcess) -> None:
    clean, eps = noise(1000, 4), noise(1000, 4, key=1)
    signal, sigma = process.levels(torch.arange(1000))
    levels = (signal[:, None].double(), sigma[:, None].double())
    noisy = add_noise(clean, eps, levels)
    velocity = process.velocity(clean, eps, levels)
    assert torch.allclose(process.clean(noisy, velocity, levels), clean, atol=1e-6)  # a^2 + b^2 = 1 in float32
    assert torch.allclose(process.noise(noisy, velocity, levels), eps, atol=1e-6)
    assert velocity.isfinite().all()


def test_velocity_at_pure_noise_is_the_negative_clean_latent() -> None:
    """The form that W.A.L.T prints would be the noise there."""
    clean, eps = noise(3), noise(3, key=1)
    levels = Diffusion().levels(torch.tensor(999.0))
    assert torch.equal(Diffusion().velocity(clean, eps, levels), -clean)


def test_velocity_and_noisy_latents_are_those_of_diffusers() -> None:
    theirs, process = DDIMScheduler(**OPTIONS), Diffusion()
    clean, eps = noise(1000, 4, dtype=torch.float32), noise(1000, 4, key=1, dtype=torch.float32)
    index = torch.arange(1000)
    levels = tuple(level[:, None] for level in process.levels(index))
    assert torch.allclose(add_noise(clean, eps, levels), theirs.add_noise(clean, eps, index), atol=1e-3)
    assert torch.allclose(process.velocity(clean, eps, levels), theirs.get_velocity(clean, eps, index), atol=1e-3)


def test_errors_of_velocity_clean_and_noise_are_in_fixed_proportion() -> None:
    process = Diffusion()
    clean, eps, wrong = noise(8), noise(8, key=1), noise(8, key=2)
    for time in (50, 500, 900):
        gamma = linear_schedule()[time]
        levels = table_levels(gamma)
        noisy = add_noise(clean, eps, levels)
        error = (process.velocity(clean, eps, levels) - wrong).square().mean()
        of_clean = (process.clean(noisy, wrong, levels) - clean).square().mean() / (1 - gamma)
        of_noise = (process.noise(noisy, wrong, levels) - eps).square().mean() / gamma
        assert error.item() == pytest.approx(of_clean.item(), rel=1e-10)
        assert error.item() == pytest.approx(of_noise.item(), rel=1e-10)


def test_unit_variance_is_kept_at_every_level() -> None:
    clean, eps = noise(20_000), noise(20_000, key=1)
    process = Diffusion()
    for time in (0, 300, 700, 999):
        levels = process.levels(torch.tensor(time))
        assert add_noise(clean, eps, levels).var().item() == pytest.approx(1, abs=0.03)  # 3 sigma of 20,000 draws
        assert process.velocity(clean, eps, levels).var().item() == pytest.approx(1, abs=0.03)


def test_times_cover_all_levels_evenly() -> None:
    times = Diffusion().times((torch.arange(4000) + 0.5) / 4000)
    assert times.unique().tolist() == list(range(1000))
    assert Diffusion().times(torch.tensor([1 - 2**-24])).item() == 999


def test_flow_times_are_logit_normal_and_shift_towards_noise() -> None:
    uniform = (torch.arange(999) + 1) / 1000
    times = RectifiedFlow().times(uniform) / 1000
    assert torch.allclose(torch.logit(times.double()).std(), torch.tensor(1.0, dtype=torch.float64), atol=0.01)
    assert times.median().item() == pytest.approx(0.5, abs=1e-3)
    assert (RectifiedFlow(3.0).times(uniform) / 1000).median().item() == pytest.approx(0.75, abs=1e-3)


# Sampling


def test_trailing_steps_start_at_pure_noise() -> None:
    times = Diffusion().sampling_times(50)
    assert times == [float(999 - 20 * i) for i in range(50)]
    theirs = DDIMScheduler(**OPTIONS)
    for steps in (1, 7, 50, 1000):
        theirs.set_timesteps(steps)
        assert Diffusion().sampling_times(steps) == theirs.timesteps.tolist()
    with pytest.raises(ValueError, match=r"num_steps=1001: this process has 1 to 1000 steps \(--model.sampling"):
        Diffusion().sampling_times(1001)


def toy_velocity(noisy: Tensor, time: float) -> Tensor:
    return (noisy * 1.3 + time / 1000).sin()


def test_ddim_steps_are_those_of_diffusers() -> None:
    theirs = DDIMScheduler(**OPTIONS, set_alpha_to_one=True)
    theirs.set_timesteps(50)
    start = noise(2, 3, 4, dtype=torch.float32)
    noisy = start
    for time in theirs.timesteps:
        noisy = theirs.step(toy_velocity(noisy, float(time)), time, noisy).prev_sample
    ours = sample(Diffusion(), lambda z, t, *_: toy_velocity(z, float(t[0])), lambda: start, DiffusionSampling())
    assert torch.allclose(ours, noisy, atol=2e-4)


@pytest.mark.parametrize("i", [0, 1, 24, 48])
def test_ddpm_steps_are_those_of_diffusers(i: int) -> None:
    theirs = DDPMScheduler(**OPTIONS)
    theirs.set_timesteps(50)
    process = Diffusion()
    times = process.sampling_times(50)
    noisy, fresh = noise(2, 5, dtype=torch.float32), noise(2, 5, key=1, dtype=torch.float32)
    velocity = toy_velocity(noisy, times[i])
    expected = theirs.step(velocity, int(times[i]), noisy, generator=keyed_generator(1)).prev_sample
    here, there = (process.levels(torch.tensor(time)) for time in (times[i], times[i + 1]))
    ours = sampling_step(
        process.clean(noisy, velocity, here), process.noise(noisy, velocity, here), here, there, 1.0, fresh
    )
    # diffusers' table is a float32 product; its last levels are off by up to 3e-6 of gamma
    assert torch.allclose(ours, expected, atol=2e-2 if i == 0 else 3e-3)


def test_eta_1_is_the_posterior_of_the_forward_process() -> None:
    gamma, next_gamma = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    clean, eps = noise(5), noise(5, key=1)
    noisy = add_noise(clean, eps, table_levels(gamma))
    alpha = gamma / next_gamma
    mean = next_gamma.sqrt() * (1 - alpha) / (1 - gamma) * clean + alpha.sqrt() * (1 - next_gamma) / (1 - gamma) * noisy
    std = ((1 - next_gamma) / (1 - gamma) * (1 - alpha)).sqrt()
    levels = table_levels(gamma), table_levels(next_gamma)
    assert torch.allclose(sampling_step(clean, eps, *levels, 1.0, torch.zeros(5)), mean)
    ones = torch.ones(5, dtype=torch.float64)
    assert torch.allclose(sampling_step(clean, eps, *levels, 1.0, ones), mean + std)


@pytest.mark.parametrize("process", [Diffusion(), RectifiedFlow(shift=2.0)])
@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_oracle_is_sampled_exactly(process: NoiseProcess, steps: int, eta: float) -> None:
    clean = noise(2, 3)
    draws = iter(range(100))

    def oracle(noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
        signal, sigma = (level.double()[:, None] for level in process.levels(times))
        return process.velocity(clean, (noisy - signal * clean) / sigma, (signal, sigma))

    out = sample(process, oracle, lambda: noise(2, 3, key=next(draws)), DiffusionSampling(num_steps=steps, eta=eta))
    assert torch.allclose(out, clean, atol=1e-6)  # levels are stored in float32


def test_one_step_returns_the_negative_velocity() -> None:
    start = noise(2, 3)
    out = sample(Diffusion(), lambda z, *_: z.cos(), lambda: start, DiffusionSampling(num_steps=1))
    assert torch.equal(out, -start.cos())


def test_each_step_sees_the_estimate_of_the_one_before() -> None:
    seen, process = [], Diffusion()

    def predict(noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
        seen.append((noisy, times, estimate))
        return noisy.sin()

    sample(process, predict, lambda: noise(2, 3), DiffusionSampling(num_steps=3))
    assert not seen[0][2].any()
    for (noisy, times, _), (_, _, estimate) in pairwise(seen):
        levels = tuple(level[:, None] for level in process.levels(times))
        assert torch.equal(estimate, process.clean(noisy, noisy.sin(), levels))


# Guidance


def test_guidance_of_1_and_0_is_the_one_or_the_other_model() -> None:
    def predict(noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
        return noisy.sin() if conditional else noisy.cos()

    def run(scale: float, model=predict) -> Tensor:
        return sample(Diffusion(), model, lambda: noise(2, 3), DiffusionSampling(num_steps=5, guidance_scale=scale))

    assert torch.equal(run(1.0), run(1.0, lambda z, *_: z.sin()))
    assert torch.allclose(run(0.0), run(1.0, lambda z, *_: z.cos()))
    assert not torch.allclose(run(3.0), run(1.0))


def test_guiding_velocity_clean_or_noise_gives_the_same_step() -> None:
    process, levels, following = (
        Diffusion(),
        (torch.tensor(0.6), torch.tensor(0.8)),
        (torch.tensor(0.8), torch.tensor(0.6)),
    )
    noisy, one, two = (noise(1, 6, key=key) for key in range(3))

    def step(clean: Tensor, eps: Tensor) -> Tensor:
        return sampling_step(clean, eps, levels, following)

    velocity = guided(one, two, 4.0)
    expected = step(process.clean(noisy, velocity, levels), process.noise(noisy, velocity, levels))
    clean = guided(*(process.clean(noisy, v, levels) for v in (one, two)), 4.0)
    assert torch.allclose(step(clean, (noisy - levels[0] * clean) / levels[1]), expected, atol=1e-6)
    eps = guided(*(process.noise(noisy, v, levels) for v in (one, two)), 4.0)
    assert torch.allclose(step((noisy - levels[1] * eps) / levels[0], eps), expected, atol=1e-6)


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction() -> None:
    one, two = noise(2, 6), 3 * noise(2, 6, key=1)
    full = guided(one, two, 5.0, rescale=1.0)
    assert torch.allclose(full.std(1), one.std(1))
    half = guided(one, two, 5.0, rescale=0.5)
    assert torch.allclose(half, 0.5 * full + 0.5 * guided(one, two, 5.0))


def test_guidance_grows_from_noise_to_the_clean_latent_with_a_power() -> None:
    settings = DiffusionSampling(guidance_scale=3.8, guidance_power=4.0)
    weights = [settings.guidance_at(i / 100) for i in range(100, -1, -1)]
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(3.8)
    assert weights == sorted(weights)
    assert settings.guidance_at(0.2) == pytest.approx(1 + 2.8 * (1 - math.cos(math.pi * 0.8**4)) / 2)


def test_outside_of_the_interval_there_is_no_guidance() -> None:
    settings = DiffusionSampling(guidance_scale=2.0, guidance_interval=(0.2, 0.6))
    assert [settings.guidance_at(time) for time in (0.0, 0.19, 0.2, 0.6, 0.61, 1.0)] == [1, 1, 2, 2, 1, 1]
    asked = []

    def predict(noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
        asked.append(conditional)
        return noisy

    sample(
        Diffusion(),
        predict,
        lambda: noise(1, 2),
        DiffusionSampling(10, guidance_scale=2.0, guidance_interval=(0.2, 0.6)),
    )
    assert asked.count(False) == 4  # of the times 999, 899, ..., 99


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"eta": 1.5},
        {"guidance_scale": -1.0},
        {"guidance_rescale": 2.0},
        {"guidance_interval": (0.5, 0.2)},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.*--model.sampling.{next(iter(wrong))}"):
        DiffusionSampling(**wrong)
