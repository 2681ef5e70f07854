import pytest
import torch
from torch import nn

from wfm_core.checkpoint import load_world_model
from wfm_core.packing import PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 matrix kernels"
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 5, 24), (700, 24)])
def test_a_packed_layer_gives_the_same_bits(shape, bias):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(shape, generator=generator).bfloat16()
    packed = PackedLinear(linear)
    assert torch.equal(packed(x), linear(x))
    assert torch.equal(
        packed(x.transpose(0, -2).contiguous().transpose(0, -2)) if x.dim() > 2 else packed(x), linear(x)
    )


def test_only_layers_that_gain_are_packed():
    half = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())).bfloat16().requires_grad_(False)
    half[0].float()
    pack_linears(half)
    assert type(half[0]) is nn.Linear and type(half[1][0]) is PackedLinear and type(half[1][1]) is nn.ReLU


def test_a_packed_world_model_steps_as_a_plain_one():
    action = torch.tensor([[0.01, 0, 0, 0, 0, 0.1, 1.0]])
    steps = []
    for packed in (False, True):
        model = load_world_model("bridge-nano-ar", dtype=torch.bfloat16, packed=packed)
        assert any(isinstance(layer, PackedLinear) for layer in model.modules()) == packed
        state = model.start(torch.zeros(1, 1, *model.latent_shape), torch.zeros(1, 0, 7), [3])
        steps.append(model.step(state, action))
    (_, plain, doubt), (_, quick, also) = steps
    assert torch.equal(plain, quick) and torch.allclose(doubt, also, atol=1e-3)
