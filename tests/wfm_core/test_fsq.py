import itertools

import pytest
import torch

from wfm_core.tokenizers.fsq import FSQ

LEVELS = (5, 2, 8)


def every_index() -> torch.Tensor:
    return torch.tensor(list(itertools.product(*map(range, LEVELS))))


def test_every_code_survives_the_round_trip():
    fsq = FSQ(LEVELS)
    codes = fsq.to_codes(every_index())
    assert torch.equal(fsq.to_indices(codes), every_index())
    assert codes.dtype == torch.float32 and fsq.to_indices(codes).dtype == torch.int64
    assert len(codes.unique(dim=0)) == 5 * 2 * 8 and codes.min() == -1 and codes.max() == 1
    torch.testing.assert_close(codes[:, 0].unique(), torch.tensor([-1, -0.5, 0, 0.5, 1]))
    half = fsq.to_codes(every_index()).bfloat16()  # the precision in which latents may travel
    assert torch.equal(fsq.to_indices(half), every_index())


def test_quantisation_reaches_every_level_and_rounds_to_the_nearest():
    fsq = FSQ(LEVELS)
    x = torch.linspace(-6, 6, 4001)[:, None].expand(-1, 3)
    codes = fsq(x)
    indices = fsq.to_indices(codes)
    torch.testing.assert_close(codes, fsq.to_codes(indices))
    assert [len(column.unique()) for column in indices.T] == list(LEVELS)
    assert (codes.diff(dim=0) >= -1e-6).all()  # monotone
    squashed = 2 * torch.sigmoid(1.6 * x) - 1
    assert ((codes - squashed).abs() <= 1 / torch.tensor([4.0, 1.0, 7.0]) + 1e-6).all()


def test_a_unit_normal_spreads_evenly():
    x = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    share = FSQ((5, 5, 5)).to_indices(FSQ((5, 5, 5))(x)).flatten().bincount() / x.numel()
    # The outermost levels round from one side only.
    torch.testing.assert_close(share, torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125]), atol=0.02, rtol=0)


def test_gradients_pass_as_if_nothing_were_rounded():
    x = torch.linspace(-3, 3, 30).view(10, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(FSQ(LEVELS)(x).sum(), x)
    s = torch.sigmoid(1.6 * x.detach())
    torch.testing.assert_close(gradient, 2 * 1.6 * s * (1 - s))


def test_half_precision_input_gives_float32_codes():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(FSQ(LEVELS).bfloat16()(x), FSQ(LEVELS)(x.float()))


def test_nothing_of_it_is_in_a_checkpoint_and_one_level_is_refused():
    assert not FSQ(LEVELS).state_dict()
    with pytest.raises(ValueError, match=r"at least 2 levels, got \(8, 1\)"):
        FSQ((8, 1))
