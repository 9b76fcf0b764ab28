import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.attention import Attention
from models.priors import mebt
from models.priors.mebt import (
    PUBLISHED_STACK,
    MaskedWindow,
    MeBT,
    SampleMask,
    mask_window,
    masked_token_loss,
    target_mean,
)
from models.random import keyed_generator
from models.weights import official_mebt_name

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]
GOLDEN_STACK = ("latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec")
CODES = torch.tensor([[0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 0], [7, 10, 2, 5, 8, 0, 3, 6, 9, 1, 4, 7]])
ORDER = torch.tensor([[2, 7, 0, 5, 10, 3, 8, 1, 6, 11, 4, 9], [5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7, 0]])


def small_mebt(blocks: tuple = GOLDEN_STACK, num_tokens: int = 12, seed: int = 0) -> MeBT:
    torch.manual_seed(seed)
    network = MeBT(11, num_tokens, dim=16, num_heads=2, num_latents=3, blocks=blocks).double()
    for parameter in network.parameters():  # far from the initial values, so that nothing is nearly zero
        nn.init.normal_(parameter, std=0.5)
    return network


@pytest.fixture
def golden_mebt(golden_tensor: GoldenTensor) -> MeBT:
    network = MeBT(11, 12, dim=16, num_heads=2, num_latents=3, blocks=GOLDEN_STACK).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(golden_tensor(official_mebt_name(name), tuple(parameter.shape), 2.0))
    return network


def test_golden_weights_have_the_published_check_sums(golden_mebt: MeBT) -> None:
    values = torch.cat([parameter.detach().flatten() for parameter in golden_mebt.parameters()])
    assert len(list(golden_mebt.parameters())) == 103
    assert len(values) == 20_320
    assert values.sum().item() == pytest.approx(274.84398, abs=1e-4)
    assert values.abs().sum().item() == pytest.approx(7182.5457, abs=1e-3)


@pytest.mark.parametrize(
    ("num_context", "num_targets", "total", "absolute", "entries"),
    [
        (0, 12, 3.883953, 257.36461, {(0, 0, 0): -0.85184403, (0, 11, 10): 0.97792503, (1, 6, 2): -0.75653857}),
        (5, 7, -19.660546, 156.08168, {(0, 0, 7): 0.30852717, (1, 0, 4): 2.4039254, (1, 6, 9): 1.1683043}),
        (9, 2, -2.7353997, 51.479978, {(0, 0, 0): -0.36359885, (0, 1, 10): -1.7259237, (1, 1, 9): 1.3038958}),
    ],
)
def test_logits_equal_the_official_ones(
    golden_mebt: MeBT, num_context: int, num_targets: int, total: float, absolute: float, entries: dict
) -> None:
    logits = golden_mebt(CODES, ORDER[:, :num_context], ORDER[:, 12 - num_targets :])
    assert logits.shape == (2, num_targets, 11)
    assert logits.sum().item() == pytest.approx(total, abs=1e-5)
    assert logits.abs().sum().item() == pytest.approx(absolute, abs=1e-4)
    for index, value in entries.items():
        assert logits[index].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("length", "start", "num_masked", "targets", "ce_sum", "mean_loss", "plain_loss", "norms"),
    [
        (
            3,
            0,
            8,
            [[8, 9, 2, 3, 7, 0, 1, 5], [10, 3, 7, 8, 1, 2, 6, 7]],
            50.971684,
            3.1857303,
            2.1238202,
            [1.1265058, 1.1449998, 0.27353764, 0.90647965, 1.1936593, 1.0630727],
        ),
        (
            2,
            1,
            3,
            [[0, 1, 5], [8, 1, 6]],
            19.810089,
            3.3016816,
            1.2381306,
            [1.6026793, 1.5292009, 0.2137823, 0.68010983, 1.8900112, 0.82646142],
        ),
        (
            1,
            2,
            4,
            [[8, 2, 0, 5], [4, 9, 7, 1]],
            27.187536,
            3.398442,
            3.398442,
            [0.0, 0.14410686, 0.16186815, 2.5558845, 1.7707463, 0.0],
        ),
    ],
)
def test_loss_and_gradients_equal_the_official_ones(
    golden_mebt: MeBT,
    length: int,
    start: int,
    num_masked: int,
    targets: list,
    ce_sum: float,
    mean_loss: float,
    plain_loss: float,
    norms: list,
) -> None:
    first, last = 4 * start, 4 * (start + length)
    window = torch.stack([row[(row >= first) & (row < last)] for row in ORDER])
    context, masked = window.tensor_split([4 * length - num_masked], dim=1)
    assert CODES.gather(1, masked).tolist() == targets
    logits = golden_mebt(CODES, context, masked)
    nll = F.cross_entropy(logits.transpose(1, 2), CODES.gather(1, masked), reduction="none")
    assert nll.sum().item() == pytest.approx(ce_sum, abs=1e-5)
    window = MaskedWindow(context, masked, num_masked / (4 * length), None)
    assert masked_token_loss(nll, window, rho_power=0.0).item() == pytest.approx(plain_loss, abs=1e-6)
    loss = masked_token_loss(nll, window)
    assert loss.item() == pytest.approx(mean_loss, abs=1e-6)
    loss.backward()
    parameters = (
        golden_mebt.token_embedding.weight,
        golden_mebt.position_embedding,
        golden_mebt.mask_embedding,
        golden_mebt.latent_embedding,
        golden_mebt.head.weight,
        golden_mebt.blocks[0].attention.query.weight,
    )
    for parameter, norm in zip(parameters, norms, strict=True):
        assert parameter.grad is not None  # also with an empty context: DDP waits for every gradient
        assert parameter.grad.norm().item() == pytest.approx(norm, abs=1e-6)


@pytest.mark.parametrize(("num_tokens", "count"), [(1024, 337_177_600), (8192, 344_517_632)])
def test_published_sizes(num_tokens: int, count: int) -> None:
    with torch.device("meta"):
        network = MeBT(16384, num_tokens)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert sum(parameter.numel() for parameter in network.blocks[0].parameters()) == 12 * 1024**2 + 13 * 1024
    assert len(PUBLISHED_STACK) == 24
    assert [PUBLISHED_STACK.count(kind) for kind in ("latent_enc", "latent_self", "latent_dec", "lt2l")] == [7, 6, 6, 5]


@pytest.mark.parametrize("blocks", [GOLDEN_STACK, ("latent_enc", "maskgit", "latent_dec")])
def test_order_of_context_does_not_matter_and_order_of_targets_is_kept(blocks: tuple) -> None:
    network = small_mebt(blocks)
    context, targets = ORDER[:, :5], ORDER[:, 5:]
    shuffle_context, shuffle_targets = torch.randperm(5), torch.randperm(7)
    logits = network(CODES, context, targets)
    shuffled = network(CODES, context[:, shuffle_context], targets[:, shuffle_targets])
    assert (logits[:, shuffle_targets] - shuffled).abs().max() < 1e-11


def test_codes_outside_the_context_are_never_read() -> None:
    network = small_mebt()
    changed = CODES.scatter(1, ORDER[:, 5:], 3)
    assert torch.equal(network(CODES, ORDER[:, :5], ORDER[:, 5:]), network(changed, ORDER[:, :5], ORDER[:, 5:]))


def test_removing_targets_changes_logits_only_through_lt2l() -> None:
    with_lt2l = small_mebt()
    without = small_mebt(("latent_enc", "latent_self", "latent_dec"))
    context, targets = ORDER[:, :5], ORDER[:, 5:]
    for network, is_same in ((with_lt2l, False), (without, True)):
        difference = network(CODES, context, targets)[:, :3] - network(CODES, context, targets[:, :3])
        assert (difference.abs().max() < 1e-12) == is_same


def test_zeroed_blocks_are_layer_norms_not_identities() -> None:
    network = small_mebt()
    with torch.no_grad():
        for block in network.blocks:
            for parameter in (*block.attention.proj.parameters(), *block.mlp[2].parameters()):
                parameter.zero_()
            for norm in (block.norm1, block.norm2):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
    logits = network(CODES, ORDER[:, :5], ORDER[:, 5:])
    m = network.mask_embedding + network.position_embedding[0][ORDER[:, 5:]]
    for _ in range(GOLDEN_STACK.count("latent_dec")):
        m = F.layer_norm(m, (16,))
    assert torch.equal(logits, network.head(network.norm(m)))


def test_scale_of_the_embeddings_drops_out() -> None:
    network = small_mebt()
    embeddings = (
        network.token_embedding.weight,
        network.position_embedding,
        network.mask_embedding,
        network.latent_embedding,
    )
    outputs = []
    for _, scale in itertools.pairwise((1.0, 10.0, 1000.0)):
        with torch.no_grad():
            for parameter in embeddings:
                parameter.mul_(scale)
        outputs.append(network(CODES, ORDER[:, :5], ORDER[:, 5:]))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4 * outputs[0].abs().max()


def test_context_reaches_the_logits_only_through_the_latents() -> None:
    network = small_mebt()
    with torch.no_grad():
        for kind, block in zip(network.kinds, network.blocks, strict=True):
            if kind == "latent_enc":
                block.attention.proj.weight.zero_()
    changed = CODES.scatter(1, ORDER[:, :5], 3)
    assert torch.equal(network(CODES, ORDER[:, :5], ORDER[:, 5:]), network(changed, ORDER[:, :5], ORDER[:, 5:]))


def test_empty_context_leaves_only_the_output_bias() -> None:
    network = small_mebt()
    block = network.blocks[0]
    z = network.latent_embedding.expand(2, -1, -1)
    q = block.norm1(z)
    x = q + block.attention.proj.bias
    expected = x + block.mlp(block.norm2(x))
    assert (block(z, z[:, :0]) - expected).abs().max() < 1e-12


def test_zero_head_loses_log_of_the_codebook_size() -> None:
    network = MeBT(16384, 8, dim=8, num_heads=2, num_latents=2, blocks=("latent_enc", "latent_dec"))
    nn.init.zeros_(network.head.weight)
    order = torch.arange(8).expand(1, -1)
    features = network.features(torch.zeros(1, 8, dtype=torch.long), order[:, :4], order[:, 4:])
    nll = network.cross_entropy(features, torch.full((1, 4), 7))
    assert nll.mean().item() == pytest.approx(9.7041, abs=1e-4)


def score_entries(network: MeBT, codes: Tensor, context: Tensor, targets: Tensor) -> list[int]:
    """Queries times keys of each block in a forward pass."""
    entries: list[int] = []
    hooks = [
        part.register_forward_hook(lambda _, inputs, __: entries.append(inputs[0].shape[1] * inputs[1].shape[1]))
        for part in network.modules()
        if isinstance(part, Attention)
    ]
    with torch.no_grad():
        network(codes, context, targets)
    for hook in hooks:
        hook.remove()
    return entries


def test_scores_are_as_many_as_the_formula_says_and_grow_linearly() -> None:
    latents = 3
    network = MeBT(5, 64, dim=8, num_heads=2, num_latents=latents)
    counts = {}
    for num_tokens in (32, 64):
        order = torch.arange(num_tokens).expand(1, -1)
        c, m = num_tokens // 4, 3 * num_tokens // 4
        entries = score_entries(network, torch.zeros_like(order), order[:, :c], order[:, c:])
        expected = 7 * latents * c + 6 * latents**2 + 6 * latents * m + 5 * latents * (latents + m)
        assert sum(entries) == expected
        counts[num_tokens] = sum(entries)
    assert counts[64] - 11 * latents**2 == 2 * (counts[32] - 11 * latents**2)


def test_full_attention_has_the_square_of_all_tokens_in_each_block() -> None:
    network = small_mebt(("latent_enc", "maskgit", "maskgit", "latent_dec"))
    assert score_entries(network, CODES, ORDER[:, :5], ORDER[:, 6:])[1:3] == [11**2, 11**2]


# Samples with different numbers of tokens


@pytest.mark.parametrize("blocks", [GOLDEN_STACK, ("latent_enc", "maskgit", "latent_dec")])
def test_padded_samples_are_predicted_as_each_by_itself(blocks: tuple) -> None:
    network = small_mebt(blocks)
    counts = [(5, 3), (0, 7)]  # one sees nothing
    keep = (torch.arange(5) < torch.tensor([[5], [0]]), torch.arange(7) < torch.tensor([[3], [7]]))
    logits = network(CODES, ORDER[:, :5], ORDER[:, 5:], keep=keep)
    for row, (c, m) in enumerate(counts):
        alone = network(CODES[row : row + 1], ORDER[row : row + 1, :c], ORDER[row : row + 1, 5 : 5 + m])
        assert (logits[row, :m] - alone[0]).abs().max() < 1e-12
    logits[0, :3].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


def test_masks_split_the_window_and_respect_what_is_given_and_the_budget() -> None:
    noise = torch.rand(50, 24, generator=keyed_generator(1))
    window = mask_window(noise, [SampleMask(4, 16, 8, 5)] * 50, budget=3)
    assert window.keep is None
    assert (window.context.shape, window.targets.shape, window.mask_ratio) == ((50, 11), (50, 3), 5 / 16)
    for context, targets in zip(window.context.tolist(), window.targets.tolist(), strict=True):
        assert set(range(4, 12)) <= set(context) <= set(range(4, 20))  # given, and nothing from outside
        assert set(targets) <= set(range(12, 20)) - set(context)
    assert len(window.targets.unique()) == 8  # any of those that are not given
    # the last of the masked ones, in the order of the noise, as in the release
    unbounded = mask_window(noise, [SampleMask(4, 16, 8, 5)] * 50)
    assert torch.equal(unbounded.targets[:, 2:], window.targets)


def test_each_sample_can_have_a_window_and_a_ratio_of_its_own() -> None:
    noise = torch.rand(2, 24, generator=keyed_generator(2))
    masks = [SampleMask(0, 24, 0, 20), SampleMask(8, 4, 0, 1)]
    window = mask_window(noise, masks)
    assert window.keep is not None
    alone = [mask_window(noise[i : i + 1], masks[i : i + 1]) for i in range(2)]
    for row, one in enumerate(alone):
        for all_places, is_meant, own in (
            (window.context, window.keep[0], one.context),
            (window.targets, window.keep[1], one.targets),
        ):
            assert all_places[row][is_meant[row]].tolist() == own[0].tolist()
    assert window.mask_ratio.tolist() == pytest.approx([20 / 24, 1 / 4])
    assert set(range(8, 12)) >= set(window.targets[1][window.keep[1][1]].tolist())


@pytest.mark.parametrize("num_masked", [3, 8])
def test_alpha_weighs_the_mean_over_targets_by_what_was_masked(num_masked: int) -> None:
    nll = torch.rand(2, num_masked, generator=keyed_generator(3))
    window = MaskedWindow(ORDER[:, num_masked:], ORDER[:, :num_masked], num_masked / 12, None)
    mean, rho = nll.mean(), num_masked / 12
    for alpha, expected in ((1.0, mean), (0.0, mean * rho), (0.5, mean * rho**0.5)):
        assert masked_token_loss(nll, window, alpha).item() == pytest.approx(expected.item())
        assert expected.item() == pytest.approx((nll.sum() / (2 * 12 * rho**alpha)).item())  # the release's form


def test_the_loss_of_padded_samples_is_the_mean_over_samples() -> None:
    keep = (torch.ones(2, 1, dtype=torch.bool), torch.tensor([[True, True, False], [True, True, True]]))
    window = MaskedWindow(ORDER[:, :1], ORDER[:, :3], torch.tensor([0.5, 0.25]), keep)
    nll = torch.tensor([[1.0, 3.0, torch.nan], [1.0, 1.0, 4.0]])
    assert target_mean(nll, window).tolist() == [2.0, 2.0]
    assert masked_token_loss(nll, window, rho_power=0.0).item() == pytest.approx((2 * 0.5 + 2 * 0.25) / 2)


# Memory


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_in_parts_is_the_loss_at_once(monkeypatch: pytest.MonkeyPatch, label_smoothing: float) -> None:
    largest: list[int] = []
    gradients = []
    for chunk in (11 * 4, 2**25):
        network = small_mebt()
        network.head.register_forward_hook(lambda _, __, logits: largest.append(logits.numel()))
        monkeypatch.setattr(mebt, "LOSS_CHUNK_LOGITS", chunk)
        features = network.features(CODES, ORDER[:, :5], ORDER[:, 5:])
        nll = network.cross_entropy(features, CODES.gather(1, ORDER[:, 5:]), label_smoothing)
        nll.square().sum().backward()
        gradients.append([nll.detach(), *(parameter.grad for parameter in network.parameters())])
        if chunk < 100:
            assert max(largest) == 44  # never all 154
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    logits = network(CODES, ORDER[:, :5], ORDER[:, 5:])
    expected = F.cross_entropy(
        logits.transpose(1, 2), CODES.gather(1, ORDER[:, 5:]), reduction="none", label_smoothing=label_smoothing
    )
    torch.testing.assert_close(gradients[0][0], expected.detach(), rtol=1e-10, atol=1e-12)


def test_checkpointing_changes_what_is_kept_and_not_the_gradients() -> None:
    gradients, kept = [], []
    for is_on in (False, True):
        network = small_mebt()
        network.gradient_checkpointing = is_on
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = network(CODES, ORDER[:, :5], ORDER[:, 5:]).square().sum()
        kept.append(saved)
        loss.backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert kept[1] < kept[0] / 3
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


# Classes


def test_a_class_is_one_more_learned_latent() -> None:
    torch.manual_seed(0)
    blocks = ("latent_enc", "latent_dec")
    network = MeBT(11, 12, dim=16, num_heads=2, num_latents=3, blocks=blocks, num_classes=5, init_std=0.5)
    assert network.label_embedding.weight.shape == (5, 16)
    logits = [network(CODES, ORDER[:, :5], ORDER[:, 5:], torch.tensor([k, k])) for k in (1, 1, 4)]
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 1e-3
    # a network without classes whose latents include it
    plain = MeBT(11, 12, dim=16, num_heads=2, num_latents=4, blocks=blocks)
    state = network.state_dict()
    row = state.pop("label_embedding.weight")[1]
    state["latent_embedding"] = torch.cat([state["latent_embedding"], row.view(1, 1, -1)], dim=1)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(CODES, ORDER[:, :5], ORDER[:, 5:]), logits[0])


def test_labels_and_classes_go_together() -> None:
    with pytest.raises(ValueError, match="has no classes"):
        small_mebt()(CODES, ORDER[:, :5], ORDER[:, 5:], torch.tensor([0, 1]))
    network = MeBT(11, 12, dim=16, num_heads=2, num_latents=3, blocks=GOLDEN_STACK, num_classes=5)
    with pytest.raises(ValueError, match="has learned classes"):
        network(CODES, ORDER[:, :5], ORDER[:, 5:])
