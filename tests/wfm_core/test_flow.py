import pytest
import torch
import torch.nn.functional as F

from wfm_core.tokenizers.flow import flow_loss, load_flow_network, warp


def texture(seed: int = 0) -> torch.Tensor:
    """A smooth random picture (1, 3, 96, 96) in [-1, 1]."""
    coarse = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=96, mode="bicubic", align_corners=False).clamp(-1, 1)


def moved(image: torch.Tensor, right: float, down: float) -> torch.Tensor:
    flow = torch.tensor([-right, -down]).view(1, 2, 1, 1).expand(1, 2, *image.shape[-2:])
    return warp(image, flow)


@pytest.mark.parametrize(("right", "down"), [(0.0, 0.0), (0.4, -0.7), (3.0, 1.0), (-6.0, 5.0)])
def test_a_shift_is_found_to_a_fraction_of_a_pixel(right, down):
    image = texture()
    flow = load_flow_network()(image, moved(image, right, down))[..., 16:-16, 16:-16]
    error = (flow - torch.tensor([right, down]).view(1, 2, 1, 1)).norm(dim=1)
    assert error.median() < 0.1 and error.quantile(0.9) < 0.5


def test_what_moves_is_told_from_what_stands_still():
    def scene(right: int) -> torch.Tensor:
        image = texture()
        image[..., 24:56, 24 + right : 56 + right] = texture(seed=1)[..., 24:56, 24:56]
        return image

    flow = load_flow_network()(scene(0), scene(3))[0]
    assert flow[0, 32:48, 32:48].median() == pytest.approx(3, abs=0.3)
    assert flow[1, 32:48, 32:48].abs().median() < 0.3
    assert flow[:, 76:, 76:].abs().max() < 0.2


def test_warping_by_whole_pixels_is_indexing():
    image = texture()
    flow = torch.zeros(1, 2, 96, 96)
    flow[:, 0], flow[:, 1] = 3, -2
    torch.testing.assert_close(warp(image, flow)[..., 2:, :-3], image[..., :-2, 3:], atol=1e-4, rtol=0)


def test_the_loss_is_of_motion_not_of_looks():
    still = torch.stack([texture()] * 3, dim=1)
    going = torch.stack([moved(texture(), 1.5 * t, 0.0) for t in range(3)], dim=1)
    network = load_flow_network()
    assert flow_loss(network, going, going) == 0
    assert flow_loss(network, 0.8 * going, going) < 0.1  # paler, but it moves alike
    assert flow_loss(network, still, going) == pytest.approx(0.75, abs=0.15)  # 1.5 px in one of two directions


def test_the_loss_has_a_finite_gradient():
    going = torch.stack([moved(texture(), 1.5 * t, 0.0) for t in range(2)], dim=1)
    guess = (0.5 * going).requires_grad_(True)
    flow_loss(load_flow_network(), guess, going).backward()
    assert guess.grad.isfinite().all() and guess.grad.abs().max() > 0
