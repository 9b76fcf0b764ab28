import copy
import math

import pytest
import torch
from torch import Tensor

from models.random import keyed_generator
from models.tokenizers import quantizers
from models.tokenizers.quantizers import VectorQuantizer, code_counts, usage_statistics

TwoRanks = list[dict[str, dict[str, Tensor]]]


def latents(*keys: int, batch: int = 2, dim: int = 3, grid: tuple[int, int, int] = (2, 2, 3)) -> Tensor:
    return torch.randn(batch, dim, *grid, generator=keyed_generator(*keys), dtype=torch.float64)


def rows(z: Tensor) -> Tensor:
    """Vectors in raster order (b, t, h, w), written out."""
    b, _, t, h, w = z.shape
    return torch.stack([z[i, :, j, k, m] for i in range(b) for j in range(t) for k in range(h) for m in range(w)])


def trained(codebook_size: int = 5, dim: int = 3, **options: float) -> VectorQuantizer:
    quantizer = VectorQuantizer(codebook_size, dim, **options).double()
    quantizer(latents(0, dim=dim))
    return quantizer


def test_each_vector_gets_its_nearest_entry() -> None:
    quantizer = trained().eval()
    z = latents(1)
    distances = (rows(z)[:, None] - quantizer.embeddings).norm(dim=2)  # [n, K]
    encoded = quantizer(z)
    assert torch.equal(encoded.codes.flatten(), distances.argmin(1))
    assert encoded.codes.shape == (2, 2, 2, 3)
    assert encoded.codes.dtype == torch.int64


def test_rows_are_searched_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = trained().eval()
    whole = quantizer(latents(1)).codes
    monkeypatch.setattr(quantizers, "_MAX_DISTANCES", 5 * 7)  # 7 rows at a time, 24 rows
    assert torch.equal(quantizer(latents(1)).codes, whole)


def test_latents_are_codebook_rows_exactly() -> None:
    quantizer = trained().eval()
    encoded = quantizer(latents(1))
    assert torch.equal(rows(encoded.latents), quantizer.embeddings[encoded.codes.flatten()])
    assert torch.equal(encoded.latents, quantizer.codes_to_latents(encoded.codes))


def test_gradient_passes_straight_through() -> None:
    quantizer = trained().eval()
    z = latents(1).requires_grad_()
    upstream = latents(2)
    (gradient,) = torch.autograd.grad((quantizer(z).latents * upstream).sum(), z)
    assert torch.equal(gradient, upstream)


def test_commitment_pulls_vectors_to_their_entries() -> None:
    quantizer = trained(commitment_weight=0.5).eval()
    z = latents(1).requires_grad_()
    encoded = quantizer(z)
    chosen = encoded.latents.detach()
    loss = encoded.losses["commitment"]
    assert torch.allclose(loss, 0.5 * (z - chosen).square().mean())
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.allclose(gradient, 0.5 * 2 * (z - chosen) / z.numel())


def test_codebook_is_made_of_vectors_of_the_first_training_batch() -> None:
    quantizer = VectorQuantizer(5, 3).double()
    z = latents(0)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(z)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    quantizer.decay = 1.0  # the moving averages stand still, only the initialisation is seen
    quantizer.train()(z, keyed_generator(1))
    matches = (quantizer.z_avg[:, None] == rows(z)).all(2)  # [K, n]
    assert matches.any(1).all()
    assert matches.any(0).sum() == 5  # five different vectors
    assert torch.equal(quantizer.N, torch.ones(5, dtype=torch.float64))
    assert quantizer.initialized


def test_too_few_vectors_are_repeated_with_little_noise() -> None:
    quantizer = VectorQuantizer(30, 3, decay=1.0).double()
    z = latents(0)  # 24 vectors
    quantizer(z)
    distances = (quantizer.z_avg[:, None] - rows(z)).abs().amax(2).min(1).values  # [K]
    assert 0 < distances.max() < 5 * 0.01 / math.sqrt(3)
    assert len(quantizer.z_avg.unique(dim=0)) == 30


def test_moving_averages_follow_their_closed_form() -> None:
    quantizer = trained()
    counts, sums = quantizer.N.clone(), quantizer.z_avg.clone()
    z = latents(1)
    codes = quantizer(z).codes.flatten().tolist()
    for j in range(5):
        chosen = [vector for vector, code in zip(rows(z), codes, strict=True) if code == j]
        counts[j] = 0.99 * counts[j] + 0.01 * len(chosen)
        sums[j] = 0.99 * sums[j] + 0.01 * sum(chosen, torch.zeros(3))
    weights = (counts + 1e-7) / (counts.sum() + 5e-7) * counts.sum()
    assert torch.allclose(quantizer.N, counts)
    assert torch.allclose(quantizer.z_avg, sums)
    assert torch.allclose(quantizer.embeddings, sums / weights[:, None])


def test_codes_are_looked_up_before_the_codebook_moves() -> None:
    quantizer = trained()
    embeddings = quantizer.embeddings.clone()
    encoded = quantizer(latents(1))
    assert torch.equal(rows(encoded.latents), embeddings[encoded.codes.flatten()])
    assert not torch.equal(quantizer.embeddings, embeddings)


def test_evaluation_changes_nothing() -> None:
    quantizer = trained(restart_threshold=5.0)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(latents(1))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_an_initialised_codebook_survives_the_state_dict() -> None:
    source, target = trained(), VectorQuantizer(5, 3, decay=1.0).double()
    target.load_state_dict(source.state_dict())
    embeddings = target.z_avg / target.N[:, None]
    target.train()(latents(1))
    assert torch.allclose(target.embeddings, embeddings)  # with decay 1 a new initialisation is all that could move it


def test_loading_an_untouched_codebook_lets_it_initialise_again() -> None:
    untouched = VectorQuantizer(5, 3, decay=1.0).double()
    quantizer = trained(decay=1.0)
    quantizer.load_state_dict(untouched.state_dict())
    z = latents(1)
    quantizer(z)
    assert (quantizer.z_avg[:, None] == rows(z)).all(2).any(1).all()


def dead_after_one_step(**options: float) -> tuple[VectorQuantizer, Tensor, Tensor]:
    """A codebook whose last two entries lie out of reach, after a step on other vectors; which entries are dead."""
    quantizer = trained(**options)
    quantizer.embeddings[3:] = 1000
    quantizer.N[3:] = 0.1
    quantizer.N[:3] = 50
    z = latents(1)
    quantizer(z, keyed_generator(7))
    return quantizer, rows(z), torch.tensor([False, False, False, True, True])


def test_unused_entries_restart_from_the_batch_with_fresh_averages() -> None:
    quantizer, vectors, dead = dead_after_one_step(restart_threshold=1.0)
    assert torch.equal((quantizer.embeddings[:, None] == vectors).all(2).any(1), dead)
    assert torch.equal(quantizer.z_avg[dead], quantizer.embeddings[dead])
    assert torch.equal(quantizer.N[dead], torch.ones(2, dtype=torch.float64))
    assert (quantizer.N[~dead] > 49).all()


def test_released_restart_leaves_the_averages_alone() -> None:
    quantizer, vectors, dead = dead_after_one_step(restart_threshold=1.0, released_restart=True)
    assert torch.equal((quantizer.embeddings[:, None] == vectors).all(2).any(1), dead)
    assert torch.allclose(quantizer.N[dead], torch.tensor(0.1 * 0.99, dtype=torch.float64))
    assert not (quantizer.z_avg[:, None] == vectors).all(2).any()


@pytest.mark.parametrize(("released", "survives"), [(False, True), (True, False)])
def test_a_fresh_entry_survives_an_idle_step_only_if_its_averages_were_reset(released: bool, survives: bool) -> None:
    quantizer, _, dead = dead_after_one_step(restart_threshold=0.5, released_restart=released)
    fresh = quantizer.embeddings[dead].clone()
    idle = quantizer.embeddings[0].view(1, 3, 1, 1, 1).expand(2, 3, 2, 2, 3)  # every vector chooses entry 0
    quantizer(idle, keyed_generator(8))
    assert torch.allclose(quantizer.embeddings[dead], fresh, atol=0.1) == survives


def test_without_restarts_unused_entries_keep_their_average() -> None:
    quantizer, _, dead = dead_after_one_step()
    total = quantizer.N.sum()
    weights = (quantizer.N + 1e-7) / (total + 5e-7) * total
    assert torch.allclose(quantizer.embeddings[dead], quantizer.z_avg[dead] / weights[dead, None])


def test_random_choices_depend_on_the_key_alone() -> None:
    made = []
    for key in (1, 1, 2):
        torch.manual_seed(len(made))
        quantizer = VectorQuantizer(5, 3).double()
        quantizer(latents(0), keyed_generator(key))
        made.append(quantizer.embeddings)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_distances_are_computed_in_float32_under_autocast() -> None:
    quantizer = VectorQuantizer(64, 3).eval()
    z = latents(1, grid=(4, 8, 8)).float()
    expected = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = quantizer(z)
    assert torch.equal(encoded.codes, expected.codes)
    assert encoded.latents.dtype == encoded.losses["commitment"].dtype == torch.float32
    assert quantizer(z.bfloat16()).latents.dtype == torch.float32


def test_training_in_bfloat16_keeps_the_codebook_in_float32() -> None:
    quantizer = VectorQuantizer(5, 3, restart_threshold=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantizer(latents(0).bfloat16())
    assert quantizer.embeddings.dtype == quantizer.N.dtype == quantizer.z_avg.dtype == torch.float32


def test_one_entry_has_perplexity_one_and_uniform_usage_as_many_as_entries() -> None:
    assert trained(codebook_size=1).eval()(latents(1)).statistics["perplexity"] == 1
    uniform = usage_statistics(torch.full((8,), 3))
    assert uniform["perplexity"].item() == pytest.approx(8, rel=1e-6)
    assert uniform["usage"] == 1
    assert usage_statistics(torch.tensor([4, 0, 4, 0]))["usage"] == 0.5


def test_counts_are_those_of_bincount() -> None:
    codes = torch.randint(9, (2, 3, 4, 5), generator=keyed_generator(0))
    assert torch.equal(code_counts(codes, 11), torch.bincount(codes.flatten(), minlength=11))


def test_two_ranks_keep_the_codebook_of_one_process_with_both_batches(two_ranks: TwoRanks) -> None:
    parts = [rank["quantizer"] for rank in two_ranks]
    quantizer = VectorQuantizer(7, 3, restart_threshold=1.0).double()
    for step in range(2):
        z = torch.cat([part["batches"][step] for part in parts])
        perplexity = quantizer(z, keyed_generator(step)).statistics["perplexity"]
        assert all(torch.allclose(part["perplexities"][step], perplexity) for part in parts)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(parts[0][name], parts[1][name]), name
        assert torch.allclose(parts[0][name].double(), value.double()), name
