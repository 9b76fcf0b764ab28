"""COMMIT: its size, its mask, its loss and its decoding, against MAGVIT's equations and counts."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.priors.commit import (
    COMMIT,
    GIVEN,
    LOSS_PARTS,
    MASK,
    MAX_PROMPTS,
    RECONSTRUCT,
    REFINE,
    COMMITDecoding,
    commit_decode,
    commit_loss,
    join_codes,
    latent_mask,
    masked_fraction,
    multivariate_mask,
    num_corrupted_tokens,
    split_codes,
)
from models.priors.decoding import seeded_noise
from models.random import keyed_generator

N, K = 24, 8
SMALL = {"dim": 192, "depth": 12, "num_heads": 3}
B = {"dim": 768, "depth": 12, "num_heads": 12}
L = {"dim": 1024, "depth": 24, "num_heads": 16}


def toy(num_classes: int = 3, num_prompts: int = 2, std: float = 0.3, codebook_size: int = K, **options) -> COMMIT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = COMMIT(codebook_size, N, num_classes, num_prompts, dim=16, depth=2, num_heads=2, **options)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=std)
    return network.eval()


def draw(*shape: int, high: int = K, key: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=keyed_generator(key))


# The transformer


@pytest.mark.parametrize(
    ("size", "num_classes", "num_prompts", "vocabulary", "length", "parameters"),
    [
        (SMALL, 101, 0, 1127, 1025, 5.79e6),  # MAGVIT's release; the others are the paper's B and L
        (B, 101, 0, 1127, 1025, 87_301_991),
        (L, 101, 0, 1127, 1025, 305_567_847),
        (B, 0, MAX_PROMPTS, 1041, 1026, 87_236_625),
        (L, 0, MAX_PROMPTS, 1041, 1026, 305_480_721),
        (B, 174, MAX_PROMPTS, 1215, 1026, 87_370_431),
        (L, 174, MAX_PROMPTS, 1215, 1026, 305_659_071),
    ],
)
def test_the_network_has_the_published_size(
    size: dict, num_classes: int, num_prompts: int, vocabulary: int, length: int, parameters: float
) -> None:
    with torch.device("meta"):
        network = COMMIT(1024, 1024, num_classes, num_prompts, **size)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(parameters, rel=0 if isinstance(parameters, int) else 1e-3)
    assert (network.vocabulary_size, network.mask_id) == (vocabulary, vocabulary - 1)
    assert network.position_embedding.shape[1] == length


def test_forward_is_a_post_norm_transformer_with_a_tied_head() -> None:
    """Against the same mathematics, written out with torch's own attention over all heads."""
    network = toy()
    tokens, label = draw(2, N, high=network.mask_id + 1), torch.tensor([2, 0])
    prefix = torch.stack([torch.full((2,), K + 3 + 1 + 1), K + label], dim=1)
    x = network.token_embedding.weight[torch.cat([prefix, tokens], dim=1)] + network.position_embedding
    x = F.layer_norm(x, (16,), network.norm.weight, network.norm.bias, 1e-12)
    for block in network.blocks:
        heads = [getattr(block.attention, name)(x).view(2, -1, 2, 8) for name in ("query", "key", "value")]
        weights = torch.einsum("bnhd,bmhd->bhnm", heads[0], heads[1]).div(math.sqrt(8)).softmax(dim=-1)
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, heads[2]).flatten(2)
        x = block.norm1(x + block.attention.proj(attended))
        x = block.norm2(x + block.mlp[2](F.gelu(block.mlp[0](x), approximate="tanh")))
    head = network.heads[0]
    h = head[2](F.gelu(head[0](x), approximate="tanh"))
    expected = (h @ network.token_embedding.weight.T + network.head_bias)[:, 2:, :K]
    logits = network(tokens, label, prompt=1)
    assert logits.shape == (2, N, 1, K)
    torch.testing.assert_close(logits[:, :, 0], expected)


def test_label_and_prompt_reach_the_prediction_only_where_the_model_has_them() -> None:
    tokens = draw(1, N)
    network = toy()
    seen = [network(tokens, label, prompt) for label in (None, torch.tensor([0])) for prompt in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    single = toy(num_prompts=0)
    assert torch.equal(single(tokens, prompt=0), single(tokens, prompt=1))
    assert single.position_embedding.shape[1] == N + 1


def test_rows_of_the_embedding_do_not_overlap() -> None:
    network = toy()
    special = {*network.prefix(None, 0, 1)[0].tolist(), *network.prefix(torch.tensor([2]), 1, 1)[0].tolist()}
    assert special == {K + 2, K + 3, K + 4, K + 5}
    assert network.mask_id == K + 6 == network.vocabulary_size - 1


def test_only_weights_of_linear_layers_decay() -> None:
    network = toy()
    decayed = {id(parameter) for parameter in network.decayed_parameters()}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in decayed}
    assert len(names) == 2 * (4 + 2) + 1
    assert not [name for name in names if "norm" in name or "embedding" in name or "bias" in name]


def test_weights_start_within_two_standard_deviations() -> None:
    network = COMMIT(K, N, dim=64, depth=1, num_heads=2, init_std=0.1)
    for tensor in (network.token_embedding.weight, network.position_embedding, network.blocks[0].mlp[0].weight):
        assert 0.15 < tensor.abs().max() <= 0.2
    assert network.blocks[0].mlp[0].bias.abs().max() == network.head_bias.abs().max() == 0


# Codes in parts


def test_a_code_of_18_bits_is_two_parts_of_9() -> None:
    codes = draw(3, 40, high=2**18)
    parts = split_codes(codes, 2, 512)
    assert torch.equal(parts[..., 0] + 512 * parts[..., 1], codes)
    assert torch.equal(parts[..., 0], codes & 511)  # the low bits first
    assert torch.equal(join_codes(parts, 512), codes)


def test_the_embedding_of_a_code_is_the_sum_of_its_parts() -> None:
    network = toy(codebook_size=64, token_groups=2)
    assert network.vocabulary_size == 2 * 8 + 3 + 1 + 2 + 1
    assert network.mask_id == 64 + 3 + 1 + 2
    table = network.token_embedding.weight
    codes = torch.tensor([[0, 7, 8, 63]])
    expected = torch.stack([table[0] + table[8], table[7] + table[8], table[0] + table[9], table[7] + table[15]])
    torch.testing.assert_close(network.embed(codes)[0], expected)
    special = torch.arange(64, 71)[None]  # classes, no class, prompts, mask: a row each
    assert torch.equal(network.embed(special)[0], table[16:])


def test_each_part_has_a_head_tied_to_its_own_rows() -> None:
    network = toy(codebook_size=64, token_groups=2)
    logits = network(draw(2, N, high=64))
    assert logits.shape == (2, N, 2, 8)
    with torch.no_grad():
        network.token_embedding.weight[8:16] = 0  # the second part's
    changed = network(torch.full((2, N), network.mask_id))
    assert torch.equal(changed[:, :, 1], network.head_bias[8:16].expand(2, N, 8))
    assert changed[:, :, 0].std() > 0


def test_the_nll_of_a_code_is_that_of_its_parts() -> None:
    network = toy(codebook_size=64, token_groups=2)
    codes = draw(2, N, high=64)
    logits = network(codes).double()
    joint = (logits[:, :, 1, :, None].log_softmax(-2) + logits[:, :, 0, None, :].log_softmax(-1)).flatten(2)
    expected = F.nll_loss(joint.transpose(1, 2), codes, reduction="none")
    torch.testing.assert_close(network.nll(logits, codes).double(), expected, atol=1e-5, rtol=1e-4)
    uniform = torch.zeros(2, N, 2, 8)
    torch.testing.assert_close(network.nll(uniform, codes), torch.full((2, N), math.log(64)))


def test_uniform_logits_cost_the_logarithm_of_the_codebook_whatever_the_smoothing() -> None:
    network = COMMIT(1024, 4, dim=8, depth=1, num_heads=1)
    for smoothing in (0.0, 1e-4, 0.3):
        nll = network.nll(torch.zeros(1, 4, 1, 1024), torch.tensor([[0, 5, 700, 1023]]), smoothing)
        torch.testing.assert_close(nll, torch.full((1, 4), 6.931472))
    # on- and off-values of smoothed targets, read off the gradient: softmax minus target
    logits = torch.zeros(1, 1, 1, 1024, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits.flatten(0, 2), torch.tensor([3]), label_smoothing=1e-4).backward()
    target = 1 / 1024 - logits.grad.flatten()
    assert target[3].item() == pytest.approx(1 - 1e-4 + 9.765625e-8, rel=1e-12)
    assert target[4].item() == pytest.approx(9.765625e-8, rel=1e-6)


def test_codes_that_cannot_be_taken_apart_are_refused() -> None:
    with pytest.raises(ValueError, match=r"token_groups=2 does not divide .* codebook_size=8: .*--model.token_groups"):
        COMMIT(8, N, token_groups=2, dim=8, depth=1, num_heads=1)


@pytest.mark.parametrize("masking", ["multivariate", "latent", "prefix"])
def test_codes_in_parts_are_decoded(masking: str) -> None:
    network = toy(codebook_size=64, token_groups=2, masking=masking)
    is_condition = torch.arange(N) < 8
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    settings = COMMITDecoding(4, guidance_scale=0.5, revise_rounds=1)
    out = commit_decode(network, draw(2, N, high=64), is_condition, settings, noise, torch.tensor([0, 1]), 1)
    assert out.shape == (2, N)
    assert 0 <= out.min() <= out.max() < 64
    assert len(out.unique()) > 8


# The mask


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        ("cosine", [1015, 989, 946, 886, 812, 724, 623, 512, 391, 265, 133, 1]),
        ("linear", [938, 853, 768, 682, 597, 512, 426, 341, 256, 170, 85, 1]),
        ("exp", [1022, 1020, 1018, 1013, 1006, 992, 966, 922, 842, 701, 449, 1]),
    ],
)
def test_numbers_of_open_tokens_are_the_releases(schedule: str, counts: list[int]) -> None:
    assert [num_corrupted_tokens(schedule, step / 12, 1024) for step in range(1, 13)] == counts


@pytest.mark.parametrize("schedule", ["cosine", "linear", "square", "cubic", "sqrt", "exp", "log"])
def test_schedules_fall_from_everything_to_one_token(schedule: str) -> None:
    counts = [num_corrupted_tokens(schedule, u / 50, 256) for u in range(51)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= 255  # exp of 256 tokens starts at 255 / 256
    assert counts[-1] == 1


def test_mean_corruption_of_the_cosine_schedule() -> None:
    ratios = torch.rand(20000, generator=keyed_generator(0)).tolist()
    mean = sum(num_corrupted_tokens("cosine", r, 1024) for r in ratios) / len(ratios) / 1024
    assert mean == pytest.approx(2 / math.pi, abs=0.005)


@pytest.mark.parametrize("seed", range(8))
def test_mask_is_the_papers_equation(seed: int) -> None:
    generator = keyed_generator(seed)
    codes, condition = draw(3, N, key=seed), draw(3, N, key=seed + 100)
    is_condition = torch.rand(N, generator=generator) < 0.5
    scores = torch.rand(3, N, generator=generator)
    count = torch.randint(1, N + 1, (3,), generator=generator)
    tokens, kinds = multivariate_mask(codes, condition, is_condition, scores, count, mask_id=99)
    for b in range(3):
        threshold = scores[b].sort().values[count[b] - 1]
        for i in range(N):
            if scores[b, i] > threshold:
                expected = (codes[b, i], RECONSTRUCT)
            elif is_condition[i]:
                expected = (condition[b, i], REFINE)
            else:
                expected = (99, MASK)
            assert (tokens[b, i], kinds[b, i]) == expected
    assert torch.equal((kinds != RECONSTRUCT).sum(dim=1), count)


def test_ties_do_not_change_how_many_are_corrupted() -> None:
    _, kinds = multivariate_mask(
        draw(2, N), draw(2, N), torch.zeros(N, dtype=torch.bool), torch.zeros(2, N), torch.tensor([5, 17]), 99
    )
    assert (kinds == MASK).sum(dim=1).tolist() == [5, 17]


def test_without_known_pixels_it_is_plain_masking_and_with_all_known_there_is_no_mask() -> None:
    codes, scores, count = draw(2, N), torch.rand(2, N, generator=keyed_generator(1)), torch.tensor([7, N])
    nothing, everything = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    a, kinds = multivariate_mask(codes, draw(2, N, key=3), nothing, scores, count, 99)
    b, _ = multivariate_mask(codes, draw(2, N, key=4), nothing, scores, count, 99)
    assert torch.equal(a, b)
    assert torch.equal(a == 99, kinds == MASK)
    c, kinds = multivariate_mask(codes, draw(2, N, key=3), everything, scores, count, 99)
    assert not (c == 99).any()
    assert set(kinds.unique().tolist()) == {RECONSTRUCT, REFINE}


def test_parts_of_the_loss_add_up_and_are_told_apart() -> None:
    nll = torch.rand(3, N, generator=keyed_generator(2))
    kinds = draw(3, N, high=3, key=5)
    loss, parts = commit_loss(nll, kinds)
    assert parts.keys() == {"refine", "mask", "reconstruct"}
    for name, kind in LOSS_PARTS.items():
        torch.testing.assert_close(parts[name], nll[kinds == kind].sum() / nll.numel())
    torch.testing.assert_close(sum(parts.values()), loss)
    # the three terms, each as a mean of its own, weighted by their counts
    means = [(nll[kinds == kind].mean(), (kinds == kind).sum()) for kind in LOSS_PARTS.values()]
    torch.testing.assert_close(sum(mean * n for mean, n in means) / sum(n for _, n in means), loss)


def test_the_schedule_begins_with_everything_and_is_never_zero() -> None:
    assert masked_fraction("cosine", 0.0, 1024) == 1.0
    assert masked_fraction("cosine", 1.0, 1024) == 1e-6
    assert num_corrupted_tokens("cosine", 1.0, 1024) == 1


def test_latent_masking_keeps_what_is_known_and_masks_a_share_of_the_rest() -> None:
    codes, scores = draw(3, N), torch.rand(3, N, generator=keyed_generator(6))
    is_condition = torch.arange(N) % 3 == 0  # 8 of 24
    tokens, kinds = latent_mask(codes, is_condition, scores, torch.tensor([1, 12, N]), 99)
    assert torch.equal(tokens[:, is_condition], codes[:, is_condition])
    assert (kinds == GIVEN).equal(is_condition.expand(3, N))
    assert (tokens == 99).sum(dim=1).tolist() == [1, 8, 16]
    assert torch.equal(tokens == 99, kinds == MASK)
    _, parts = commit_loss(torch.where(kinds == GIVEN, 1e6, 1.0), kinds)  # what is given costs nothing
    assert sum(parts.values()).item() == pytest.approx(1.0)


@pytest.mark.parametrize("trained", [("mask",), ("mask", "reconstruct"), ("mask", "refine")])
def test_only_the_chosen_parts_are_trained(trained: tuple) -> None:
    nll = torch.rand(2, N, generator=keyed_generator(3)).requires_grad_()
    kinds = draw(2, N, high=3, key=4)
    loss, parts = commit_loss(nll, kinds, trained)
    counts = sum((kinds == LOSS_PARTS[name]) for name in trained).bool()
    torch.testing.assert_close(loss, torch.stack([nll[b][counts[b]].mean() for b in range(2)]).mean())
    loss.backward()
    assert torch.equal(nll.grad != 0, counts)
    assert {name for name, part in parts.items() if part > 0} == set(trained)


def test_known_tokens_before_the_sequence_are_read_where_they_are_known() -> None:
    network = toy(masking="prefix")
    tokens, condition = torch.full((2, N), network.mask_id), draw(2, N)
    known = condition.where(torch.arange(N) < 6, network.mask_id)
    logits = network(tokens, None, 0, known)
    assert logits.shape == (2, N, 1, K)
    assert torch.equal(network(tokens, None, 0, torch.full_like(known, network.mask_id)), network(tokens))
    other = known.clone()
    other[:, 3] = (other[:, 3] + 1) % K
    assert not torch.equal(network(tokens, None, 0, other), logits)
    moved = known.roll(1, dims=1)  # the same tokens elsewhere
    assert not torch.allclose(network(tokens, None, 0, moved), logits)


# Decoding


class Recorder(nn.Module):
    """A model with given logits that keeps what it was shown."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.seen: list[Tensor] = []
        self.mask_id = 99
        self.masking = "multivariate"
        self.asked: list[tuple] = []

    def forward(self, tokens: Tensor, label: Tensor | None, prompt: int, *prefix: Tensor) -> Tensor:
        self.seen.append(tokens)
        self.asked.append((label, prompt, *prefix))
        return self.logits[:, :, None]  # codes of one part


def random_problem(batch_size: int = 2) -> tuple[Recorder, Tensor, Tensor]:
    logits = torch.randn(batch_size, N, K, generator=keyed_generator(7)) * 2
    is_condition = torch.arange(N) % 3 == 0
    return Recorder(logits), draw(batch_size, N, key=8), is_condition


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12])
def test_decoding_starts_from_the_condition_and_ends_with_every_token_drawn(num_steps: int) -> None:
    model, condition, is_condition = random_problem()
    out = commit_decode(
        model, condition, is_condition, COMMITDecoding(num_steps), seeded_noise(torch.tensor([1, 2]), "cpu")
    )
    assert len(model.seen) == num_steps
    assert torch.equal(model.seen[0], condition.where(is_condition, 99))
    assert 0 <= out.min() <= out.max() < K
    start, is_open = model.seen[0], torch.ones(2, N, dtype=torch.bool)
    for step, tokens in enumerate(model.seen[1:], start=1):
        now_open = is_open.sum(dim=1)[0]
        expected = min(num_corrupted_tokens("cosine", step / num_steps, N), now_open - 1)
        is_same = tokens == start
        # closed tokens hold what comes out in the end, from the step at which they were closed
        assert ((tokens == out) | is_same).all()
        assert ((tokens == 99).sum(dim=1) <= expected).all()
        assert not (~is_open & (tokens != model.seen[step - 1])).any()
        is_open &= is_same


def test_numbers_of_masks_along_the_steps_follow_the_schedule() -> None:
    model = Recorder(torch.zeros(1, 64, K))
    nothing = torch.zeros(64, dtype=torch.bool)
    noise = seeded_noise(torch.tensor([3]), "cpu")
    commit_decode(model, torch.zeros(1, 64, dtype=torch.long), nothing, COMMITDecoding(8), noise)
    counts = [(tokens == 99).sum().item() for tokens in model.seen]
    assert counts == [64, *(math.floor(64 * math.cos(math.pi * step / 16)) for step in range(1, 8))]


def test_a_model_that_knows_overrules_the_condition() -> None:
    truth = draw(2, N, key=11)
    model = Recorder(F.one_hot(truth, K).float() * 100)
    condition = (truth + 1) % K
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    out = commit_decode(model, condition, torch.ones(N, dtype=torch.bool), COMMITDecoding(4), noise)
    assert torch.equal(out, truth)
    assert torch.equal(model.seen[0], condition)


def test_without_choice_noise_the_surest_draws_are_closed_first() -> None:
    confidence = torch.linspace(0.5, 0.99, N)  # of code 0, which is always drawn: ones give the most likely code
    model = Recorder(torch.stack([confidence.log(), (1 - confidence).log()], dim=-1)[None])
    settings = COMMITDecoding(6, choice_temperature=0.0)
    commit_decode(model, draw(1, N), torch.zeros(N, dtype=torch.bool), settings, lambda shape: torch.ones(*shape))
    for tokens in model.seen[1:]:
        is_open = tokens[0] == 99
        assert is_open.nonzero().max() + 1 == is_open.sum()  # the least sure ones, at the front


def test_strong_choice_noise_closes_in_any_order_without_overflow() -> None:
    confidence = torch.linspace(0.2, 0.95, 200)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=-1)[None]
    first = []
    for seed in range(6):
        model = Recorder(logits)
        commit_decode(
            model,
            torch.zeros(1, 200, dtype=torch.long),
            torch.zeros(200, dtype=torch.bool),
            COMMITDecoding(2, "linear", choice_temperature=400.0),
            seeded_noise(torch.tensor([seed]), "cpu"),
        )
        is_closed = model.seen[1][0] != 99
        assert is_closed.sum() == 100
        first.append(torch.arange(200).float()[is_closed].mean())
    assert abs(torch.stack(first).mean() - 99.5) < 6  # 2.4 is the deviation of such a mean


def test_samples_do_not_depend_on_their_batch_and_labels_matter() -> None:
    network = toy(std=1.0)  # or the label would change too little
    condition, is_condition = draw(3, N, key=1), torch.arange(N) < 8
    label = torch.tensor([0, 1, 2])

    def decode(rows: list[int], label: Tensor) -> Tensor:
        noise = seeded_noise(torch.tensor([5, 6, 7])[rows], "cpu")
        return commit_decode(network, condition[rows], is_condition, COMMITDecoding(4), noise, label[rows], 1)

    together = decode([0, 1, 2], label)
    assert torch.equal(decode([2, 0], label), together[[2, 0]])
    assert not torch.equal(decode([0, 1, 2], label.flip(0)), together)
    assert len(together.unique()) > 2


def test_top_k_of_one_draws_the_most_likely_codes() -> None:
    model, condition, is_condition = random_problem()
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    out = commit_decode(model, condition, is_condition, COMMITDecoding(3, top_k=1), noise)
    assert torch.equal(out, model.logits.argmax(dim=-1))


def test_more_steps_than_tokens_stop_when_nothing_is_open() -> None:
    model, condition, is_condition = random_problem()
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    out = commit_decode(model, condition, is_condition, COMMITDecoding(100), noise)
    assert len(model.seen) <= N
    assert out.max() < K


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_steps=0 must be at least 1 \(--model.sampling.num_steps\)"):
        COMMITDecoding(0)


def test_every_token_is_drawn_at_exactly_one_step() -> None:
    """A model that predicts the number of its call: the steps share the tokens out, and what is closed stays."""

    class Counter(Recorder):
        def forward(self, tokens: Tensor, label: Tensor | None, prompt: int, *prefix: Tensor) -> Tensor:
            super().forward(tokens, label, prompt, *prefix)
            call = torch.tensor(len(self.seen) - 1)
            return F.one_hot(call, 12).float().expand(2, 96, 1, 12) * 1000

    model = Counter(torch.empty(1, 1, 1))
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    is_condition = torch.arange(96) < 40
    out = commit_decode(model, torch.full((2, 96), 11), is_condition, COMMITDecoding(12), noise)
    open_after = [96, *(num_corrupted_tokens("cosine", step / 12, 96) for step in range(1, 12)), 0]
    expected = [before - after for before, after in pairwise(open_after)]
    assert out[0].bincount(minlength=12).tolist() == out[1].bincount(minlength=12).tolist() == expected
    assert expected[-1] == open_after[-2] > 0


def test_latent_decoding_keeps_the_known_tokens() -> None:
    model, condition, is_condition = random_problem()
    model.masking = "latent"
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    out = commit_decode(model, condition, is_condition, COMMITDecoding(4), noise)
    assert torch.equal(out[:, is_condition], condition[:, is_condition])
    assert [(tokens == 99).sum(dim=1).tolist()[0] for tokens in model.seen] == [16, 14, 11, 6]


def test_prefix_decoding_starts_from_masks_alone() -> None:
    model, condition, is_condition = random_problem()
    model.masking = "prefix"
    commit_decode(model, condition, is_condition, COMMITDecoding(3), seeded_noise(torch.tensor([1, 2]), "cpu"))
    assert (model.seen[0] == 99).all()
    assert all(torch.equal(asked[2], condition.where(is_condition, 99)) for asked in model.asked)


def test_guidance_compares_with_masks_and_without_class() -> None:
    model, condition, is_condition = random_problem()
    label = torch.tensor([1, 2])
    settings = COMMITDecoding(3, guidance_scale=2.0)
    commit_decode(model, condition, is_condition, settings, seeded_noise(label, "cpu"), label, 3, free_prompt=5)
    assert len(model.seen) == 6
    guided, free = model.seen[::2], model.seen[1::2]
    assert [asked[:2] for asked in model.asked] == [(label, 3), (None, 5)] * 3
    assert torch.equal(guided[0], condition.where(is_condition, 99))
    assert (free[0] == 99).all()
    is_drawn = guided[2] != guided[0]
    assert torch.equal(free[2][is_drawn], guided[2][is_drawn])
    assert (free[2][~is_drawn & is_condition] == 99).any()


def test_guidance_moves_away_from_the_free_prediction() -> None:
    """Logits l + w (l - f): with l = 0 and f for code 0, code 0 is never drawn."""

    class Two(Recorder):
        def forward(self, tokens: Tensor, label: Tensor | None, prompt: int, *prefix: Tensor) -> Tensor:
            return torch.zeros(1, N, 1, K) if label is not None else F.one_hot(torch.zeros(1, N, 1).long(), K) * 100.0

    out = commit_decode(
        Two(torch.empty(0)),
        draw(1, N),
        torch.zeros(N, dtype=torch.bool),
        COMMITDecoding(3, guidance_scale=1.0),
        seeded_noise(torch.tensor([1]), "cpu"),
        torch.tensor([0]),
    )
    assert (out > 0).all()
    assert len(out.unique()) > 3


@pytest.mark.parametrize("groups", [1, 4, 5])
def test_a_revise_round_draws_every_token_once_given_all_others(groups: int) -> None:
    model, condition, is_condition = random_problem()
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    settings = COMMITDecoding(1, revise_rounds=2, revise_groups=groups)
    out = commit_decode(model, condition, is_condition, settings, noise)
    assert len(model.seen) == 1 + 2 * groups
    start = condition.where(is_condition, 99)
    for round_ in range(2):
        shown = torch.stack(model.seen[1 + round_ * groups : 1 + (round_ + 1) * groups])  # [groups, 2, N]
        hidden = (shown == 99)[..., ~is_condition]
        assert (hidden.sum(dim=0) == 1).all()  # in one group each
        assert (shown == start).any(dim=0).all()
    assert 0 <= out.min() <= out.max() < K


def test_revising_at_no_temperature_takes_the_most_likely_codes() -> None:
    model, condition, is_condition = random_problem()
    noise = seeded_noise(torch.tensor([1, 2]), "cpu")
    settings = COMMITDecoding(2, revise_rounds=1, revise_temperature=1e-6)
    out = commit_decode(model, condition, is_condition, settings, noise)
    assert torch.equal(out, model.logits.argmax(dim=-1))


@pytest.mark.parametrize(("setting", "least"), [("revise_rounds", 0), ("revise_groups", 1)])
def test_settings_out_of_range_are_refused(setting: str, least: int) -> None:
    with pytest.raises(ValueError, match=rf"{setting}=-1 must be at least {least} \(--model.sampling.{setting}\)"):
        COMMITDecoding(**{setting: -1})
