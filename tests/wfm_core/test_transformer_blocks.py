"""Layers of the decoder against formulas written out by hand."""

import math

import torch

from wfm_core.models.positions import RopeConfig
from wfm_core.models.transformer_blocks import Attention, Block, Piece, Sight, SwiGLU, gathered, whole
from wfm_core.models.transformer_config import TransformerConfig

SIZES = {"width": 24, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 20}


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_by_hand():
    torch.manual_seed(0)
    layer = Attention(24, 10, num_heads=4, num_kv_heads=2, head_dim=8).double().requires_grad_(False)
    layer.query_norm.weight.uniform_(0.5, 2)
    layer.key_norm.weight.uniform_(0.5, 2)
    x, context, bias = some(1, 3, 24), some(1, 5, 10, seed=1), some(1, 1, 3, 5, seed=2)
    got = layer.mix(layer.queries(x), torch.stack(layer.keys_values(context), dim=1), whole(3, bias))

    def normed(vector, weight):
        return vector / torch.sqrt((vector**2).mean() + 1e-5) * weight

    heads = torch.zeros(3, 32, dtype=torch.float64)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        shared = slice(8 * (head // 2), 8 * (head // 2) + 8)  # of heads 0 and 1, then of 2 and 3
        keys = [normed(layer.key_value.weight[:16][shared] @ c, layer.key_norm.weight) for c in context[0]]
        values = [layer.key_value.weight[16:][shared] @ c for c in context[0]]
        for i in range(3):
            query = normed(layer.query.weight[rows] @ x[0, i], layer.query_norm.weight)
            weights = torch.stack([query @ key / math.sqrt(8) + bias[0, 0, i, j] for j, key in enumerate(keys)])
            heads[i, rows] = sum(w * v for w, v in zip(weights.softmax(dim=0), values, strict=True))
    torch.testing.assert_close(got[0], heads @ layer.out.weight.T)


def test_pieces_are_rows_of_the_whole():
    torch.manual_seed(0)
    layer = Attention(24, 24, num_heads=6, num_kv_heads=2, head_dim=8).double()
    x = some(2, 7, 24)
    queries, seen = layer.queries(x), torch.stack(layer.keys_values(x), dim=1)
    bias = torch.full((1, 1, 7, 7), float("-inf"), dtype=torch.float64)
    bias[..., :3, 1:4] = own = some(1, 1, 3, 3, seed=1)
    bias[..., 3:, :2] = bias[..., 3:, 5:] = 0
    pieces = [Piece(3, [slice(1, 4)], own), Piece(4, [slice(0, 2), slice(5, 7)], None)]
    torch.testing.assert_close(layer.mix(queries, seen, pieces), layer.mix(queries, seen, whole(7, bias)))


def test_shared_keys_are_repeated_keys():
    torch.manual_seed(0)
    few = Attention(24, 24, num_heads=6, num_kv_heads=2, head_dim=8).double()
    full = Attention(24, 24, num_heads=6, num_kv_heads=6, head_dim=8).double()
    weights = few.state_dict()
    heads = weights["key_value.weight"].unflatten(0, (2, 2, 8)).repeat_interleave(3, dim=1)
    full.load_state_dict(weights | {"key_value.weight": heads.flatten(0, 2)})
    x, bias = some(2, 4, 24), some(1, 1, 4, 4, seed=1)
    assert few.keys_values(x)[0].shape == (2, 2, 4, 8) and full.keys_values(x)[0].shape == (2, 6, 4, 8)
    everything = whole(4, bias)
    both = [layer.mix(layer.queries(x), torch.stack(layer.keys_values(x), dim=1), everything) for layer in (few, full)]
    torch.testing.assert_close(*both)


def test_swiglu_by_hand():
    layer = SwiGLU(6, 5).double().requires_grad_(False)
    x = some(6)
    gate, up = layer.gate_up.weight[:5] @ x, layer.gate_up.weight[5:] @ x
    torch.testing.assert_close(layer(x), layer.down.weight @ (gate / (1 + torch.exp(-gate)) * up))


def test_a_block_normalises_before_each_part_and_adds():
    torch.manual_seed(0)
    block = Block(TransformerConfig(**SIZES)).double().requires_grad_(False)
    for norm in (block.norm1, block.norm2):
        norm.weight.uniform_(0.5, 2)
    x = some(1, 4, 24)
    half = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    sight = Sight(x, half + 1, half, whole(4, half))  # no turn, everything in sight
    got = block(x, sight, None, lambda own: own)

    def normed(rows, weight):
        return rows / torch.sqrt((rows**2).mean(dim=-1, keepdim=True) + 1e-5) * weight

    first = normed(x, block.norm1.weight)
    keys_values = torch.stack(block.attention.keys_values(first), dim=1)
    middle = x + block.attention.mix(block.attention.queries(first), keys_values, whole(4, half))
    torch.testing.assert_close(got, middle + block.ffn(normed(middle, block.norm2.weight)))


def test_longer_contexts_sharpen_attention():
    plain = Block(TransformerConfig(**SIZES)).double()
    longer = Block(TransformerConfig(**SIZES, rope=RopeConfig(extension=2.0))).double()
    longer.load_state_dict(plain.state_dict())
    x, turn = some(1, 2, 24), torch.ones(1, 1, 2, 4, dtype=torch.float64)
    sight = Sight(x, turn, 0 * turn, whole(2, turn))
    torch.testing.assert_close(longer.project(x, sight)[0], plain.project(x, sight)[0] * (1 + 0.1 * math.log(2)) ** 2)
    assert torch.equal(longer.project(x, sight)[1], plain.project(x, sight)[1])


def test_keys_in_sight_and_their_gradients_are_those_of_slices():
    ranges = [[slice(0, 3)], [slice(0, 3), slice(5, 8)], [slice(7, 10)], [slice(None)]]
    seen = some(2, 2, 3, 10, 4).requires_grad_()
    expected = [torch.cat([seen[:, :, :, part] for part in parts], dim=3) for parts in ranges]
    found = gathered(seen, ranges)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, gathered(seen.detach(), ranges), expected))
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in made), seen)[0] for made in (found, expected)]
    torch.testing.assert_close(*gradients)
