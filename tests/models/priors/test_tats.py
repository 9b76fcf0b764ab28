"""TATS' transformer: the official code's numbers, what sees what, and the published sizes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.priors.tats import TATS, attention_mask
from models.weights import official_tats_name

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]
GoldenNetwork = Callable[..., TATS]
TOKENS = (7 * torch.arange(2)[:, None] + 3 * torch.arange(15)) % 13  # [2, 15]


@pytest.fixture
def golden_tats(golden_tensor: GoldenTensor) -> GoldenNetwork:
    """Networks of two layers of width 12, with the weights that the numbers were computed with."""

    def make(codebook_size: int = 13, grid: tuple[int, int, int] = (15, 1, 1), **changes) -> TATS:
        network = TATS(codebook_size, grid, dim=12, depth=2, num_heads=2, **changes).double()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(golden_tensor(official_tats_name(name), tuple(parameter.shape), 2.0))
        return network.eval()

    return make


def close(actual: Tensor, expected: float) -> bool:
    return actual.item() == pytest.approx(expected, abs=2e-7)


def small_tats(grid: tuple[int, int, int] = (3, 2, 2), depth: int = 2, **changes) -> TATS:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TATS(9, grid, dim=16, depth=depth, num_heads=2, **changes).double()
        for parameter in network.parameters():  # far from the initial values, so that nothing is nearly zero
            nn.init.normal_(parameter, std=0.5)
    return network.eval()


# Numbers of the official code (float64 on a CPU)


def test_golden_network_has_its_4284_parameters(golden_tats: GoldenNetwork) -> None:
    network = golden_tats()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4284
    assert close(network.position_embedding[0, 0, 0], -0.48590845)
    assert close(network.blocks[1].mlp[0].weight[0, 0], -0.19328403)


@pytest.mark.parametrize(
    ("grid", "mask", "total", "absolute", "entries"),
    [
        (
            (15, 1, 1),
            "causal",
            6.1328334,
            576.8631,
            [1.2472641, 1.1167164, 2.0080796, 0.46617011, 1.1526748, -0.72295514],
        ),
        (
            (5, 1, 3),
            "closed_boundaries",
            0.79586349,
            628.81812,
            [-0.50641838, 0.92841704, -0.66379296, 0.65141073, 0.89247829, -2.7957304],
        ),
    ],
)
def test_logits_equal_the_official_ones(
    golden_tats: GoldenNetwork, grid: tuple, mask: str, total: float, absolute: float, entries: list[float]
) -> None:
    logits = golden_tats(grid=grid, mask=mask)(TOKENS)
    assert logits.shape == (2, 15, 13)
    assert logits.sum().item() == pytest.approx(total, abs=1e-5)
    assert logits.abs().sum().item() == pytest.approx(absolute, abs=1e-4)
    places = [(0, 0, 0), (0, 7, 5), (0, 14, 12), (1, 0, 3), (1, 8, 9), (1, 14, 1)]
    assert [logits[place].item() for place in places] == pytest.approx(entries, abs=1e-6)


def test_cross_entropy_equals_the_official_one(golden_tats: GoldenNetwork) -> None:
    logits = golden_tats()(TOKENS)[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), TOKENS[:, 1:])
    assert loss.item() == pytest.approx(3.2625142, abs=1e-6)


def test_class_conditional_logits_equal_the_official_ones(golden_tats: GoldenNetwork) -> None:
    network = golden_tats(9, (3, 2, 2), condition_size=4)
    codes = (7 * torch.arange(2)[:, None] + 3 * torch.arange(12)) % 9
    logits = network.code_logits(codes, torch.tensor([[2], [1]]))
    assert logits.shape == (2, 12, 13)
    assert logits.sum().item() == pytest.approx(-20.012118, abs=1e-5)
    assert logits.abs().sum().item() == pytest.approx(460.20948, abs=1e-4)
    places = [(0, 0, 0), (0, 11, 12), (1, 5, 6)]
    assert [logits[p].item() for p in places] == pytest.approx([-0.33825687, -0.30181397, -1.4021528], abs=1e-6)
    assert F.cross_entropy(logits.transpose(1, 2), codes + 4).item() == pytest.approx(3.4712156, abs=1e-6)


# Sizes


@pytest.mark.parametrize(
    ("grid", "settings", "block", "parameters"),
    [
        ((4, 16, 16), {}, 1024, 336_914_432),
        ((4, 16, 16), {"condition_size": 101}, 1024, 337_121_280),
        ((5, 16, 16), {"mask": "closed_boundaries"}, 1280, 337_176_576),
        ((4, 16, 16), {"condition_size": 49408, "condition_length": 256, "block_size": 1280}, 1280, 438_364_160),
    ],
)
def test_published_sizes(grid: tuple, settings: dict, block: int, parameters: int) -> None:
    with torch.device("meta"):
        network = TATS(16384, grid, **settings)
    assert network.block_size == block
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert sum(parameter.numel() for parameter in network.blocks[0].parameters()) == 12_596_224


def test_every_parameter_has_an_official_name() -> None:
    names = [official_tats_name(name) for name in small_tats(mask="closed_boundaries").state_dict()]
    per_block = ["ln1", "ln2", "attn.key", "attn.query", "attn.value", "attn.proj", "mlp.0", "mlp.2"]
    expected = {f"transformer.{name}" for name in ("tok_emb.weight", "pos_emb", "ln_f.weight", "ln_f.bias")}
    expected |= {"transformer.head.weight"}
    for i in range(2):
        expected |= {f"transformer.blocks.{i}.{part}.{kind}" for part in per_block for kind in ("weight", "bias")}
    assert set(names) == expected
    assert len(names) == len(expected)


# Initial values


def test_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    network = TATS(500, (4, 4, 4), dim=64, depth=1, num_heads=2)
    assert not network.position_embedding.any()
    assert network.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not network.blocks[0].attention.query.bias.any()
    assert (network.norm.weight == 1).all()


@pytest.mark.parametrize(("classes", "nats"), [(0, 9.7041), (101, 9.7102)])
def test_a_zero_head_knows_nothing(classes: int, nats: float) -> None:
    network = TATS(16384, (2, 1, 1), dim=8, depth=1, num_heads=2, condition_size=classes)
    nn.init.zeros_(network.head.weight)
    codes = torch.tensor([[3, 5]])
    logits = network.code_logits(codes, torch.tensor([[7]]) if classes else None)
    assert logits.shape == (1, 2, classes + 16384)
    loss = F.cross_entropy(logits.transpose(1, 2), codes + classes)
    assert loss.item() == pytest.approx(nats, abs=1e-4)
    assert loss.item() == pytest.approx(math.log(classes + 16384), abs=1e-6)


def test_without_positions_one_layer_sees_earlier_tokens_as_a_set() -> None:
    torch.manual_seed(0)
    network = TATS(9, (3, 2, 2), dim=16, depth=1, num_heads=2, init_std=0.5).double()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    permuted = torch.tensor([[3, 1, 4, 2, 5]])
    assert torch.allclose(network(tokens)[:, -1], network(permuted)[:, -1])
    nn.init.normal_(network.position_embedding)
    assert not torch.allclose(network(tokens)[:, -1], network(permuted)[:, -1])


def test_sinusoidal_positions_stand_where_the_codes_are_inputs() -> None:
    network = TATS(9, (2, 4, 4), dim=16, depth=1, num_heads=2, condition_length=3, condition_size=2, block_size=40,
                   position_init="sinusoidal")  # fmt: skip
    used = network.position_embedding[0].abs().sum(dim=1) > 0
    assert used.nonzero().flatten().tolist() == list(range(3, 34))  # 31 of 32 codes are inputs


# What sees what


def seen_by(network: TATS, column: int) -> list[int]:
    """Rows whose logits change with the input token at `column`."""
    tokens = torch.arange(network.block_size)[None] % 9
    changed = tokens.clone()
    changed[0, column] = (tokens[0, column] + 4) % 9
    difference = (network(tokens) - network(changed)).abs().sum(dim=-1)[0]
    return difference.nonzero().flatten().tolist()


@pytest.mark.parametrize("column", [0, 4, 11])
def test_the_future_does_not_leak_into_the_past(column: int) -> None:
    assert seen_by(small_tats(), column) == list(range(column, 12))


@pytest.mark.parametrize(
    ("column", "rows"),
    [(0, range(20)), (4, range(20)), (5, range(5, 17)), (16, range(16, 17)), (17, range(20)), (19, range(20))],
)
def test_boundary_frames_are_seen_by_all_and_see_nothing_between_them(column: int, rows: range) -> None:
    assert seen_by(small_tats((5, 2, 2), mask="closed_boundaries"), column) == list(rows)


def test_open_boundaries_see_the_frames_between() -> None:
    mask = attention_mask("open_boundaries", 20, 1, 4)
    assert mask[5:17, :].tolist() == attention_mask("closed_boundaries", 20, 1, 4)[5:17, :].tolist()
    assert mask[18, 5:17].all()
    assert not mask[3, 5:17].any()


@pytest.mark.parametrize(("block", "frame", "ones"), [(1280, 256, 950_656), (15, 3, 135)])
def test_interpolation_mask_has_the_official_number_of_ones(block: int, frame: int, ones: int) -> None:
    assert attention_mask("closed_boundaries", block, 1, frame).sum() == ones


def test_the_released_first_pass_sees_a_corner_of_the_mask() -> None:
    """Past 257 and future 256 tokens: the corner hides the future from the past, and makes it causal in itself."""
    corner = attention_mask("closed_boundaries", 1280, 1, 256)[:513, :513]
    assert not corner[:257, 257:].any()
    assert corner[257:, :257].all()
    assert torch.equal(corner[257:, 257:], torch.ones(256, 256).tril().bool())


def test_of_1280_targets_511_are_leaked() -> None:
    network = TATS(4, (5, 16, 16), dim=4, depth=1, num_heads=1, mask="closed_boundaries")
    leaked = network.leaked_targets()
    assert leaked.nonzero().flatten().tolist() == [*range(256), *range(1024, 1279)]
    assert not small_tats().leaked_targets().any()


# The cache


@pytest.mark.parametrize("is_static", [False, True])
def test_cached_features_equal_those_of_the_whole_sequence(is_static: bool) -> None:
    network = small_tats()
    tokens = torch.arange(24).view(2, 12) % 9
    cache = network.new_cache(is_static)
    parts = [(0, 5), (5, 6), (6, 7), (7, 10), (10, 12)]
    cached = [network.extend(tokens[:, a:b], torch.arange(a, b), cache) for a, b in parts]
    assert torch.allclose(network.head(torch.cat(cached, dim=1)), network(tokens), atol=1e-12)


def test_a_cleared_cache_begins_anew() -> None:
    network = small_tats()
    cache = network.new_cache(is_static=True)
    network.extend(torch.ones(1, 12, dtype=torch.int64), torch.arange(12), cache)
    cache.clear()
    tokens = torch.tensor([[1, 5, 2]])
    assert torch.allclose(network.head(network.extend(tokens, torch.arange(3), cache)), network(tokens), atol=1e-12)


def test_a_static_cache_has_one_shape_for_every_step() -> None:
    network = small_tats()
    cache = network.new_cache(is_static=True)
    shapes = set()
    for position in range(12):
        network.extend(torch.ones(1, 1, dtype=torch.int64), torch.tensor([position]), cache)
        shapes.add((tuple(cache.mask.shape), cache._end))
    assert shapes == {((1, 12), 12)}


def test_a_full_cache_refuses_more() -> None:
    network = small_tats()
    cache = network.new_cache()
    network.extend(torch.ones(1, 12, dtype=torch.int64), torch.arange(12), cache)
    with pytest.raises(ValueError, match="12 \\+ 2 tokens do not fit a cache of length 12"):
        network.extend(torch.ones(1, 2, dtype=torch.int64), torch.arange(2), cache)


# Conditions, and what is refused


def test_a_long_condition_comes_before_the_codes() -> None:
    network = small_tats(condition_size=6, condition_length=3)
    codes, condition = torch.arange(12)[None] % 9, torch.tensor([[5, 1, 0]])
    logits = network.code_logits(codes, condition)
    assert logits.shape == (1, 12, 15)
    tokens = torch.cat([condition, codes + 6], dim=1)[:, :-1]
    assert torch.allclose(logits, network(tokens)[:, 2:], atol=1e-12)


def test_the_start_token_shares_its_embedding_with_code_0() -> None:
    network = small_tats()
    network.code_logits(torch.full((1, 12), 3)).sum().backward()
    touched = network.token_embedding.weight.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize(
    ("settings", "condition", "message"),
    [
        ({}, torch.tensor([[1]]), r"shape \(1, 1\), this network expects none"),
        ({"condition_size": 4}, None, r"shape none, this network expects \(1, 1\) ids below 4"),
        ({"condition_size": 4}, torch.tensor([[1, 2]]), r"shape \(1, 2\), this network expects \(1, 1\)"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(settings: dict, condition: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_tats(**settings).code_logits(torch.zeros(1, 12, dtype=torch.int64), condition)


def test_too_many_or_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="13 input tokens do not fit this network: at most 12"):
        small_tats()(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="11 input tokens do not fit this network: exactly 12"):
        small_tats(mask="closed_boundaries")(torch.zeros(1, 11, dtype=torch.int64))


@pytest.mark.parametrize(
    ("grid", "settings", "message"),
    [
        ((3, 2, 2), {"block_size": 11}, "block_size=11 does not fit .* expected 12 or more"),
        ((3, 2, 2), {"block_size": 13, "mask": "closed_boundaries"}, "expected 12\\."),
        ((2, 2, 2), {"mask": "closed_boundaries"}, "between the first and the last of 2"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(grid: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_tats(grid, **settings)
