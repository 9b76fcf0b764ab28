import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.priors.mebt import PUBLISHED_STACK, MaskedWindow, MeBT, masked_token_loss
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
