"""Optical flow, for the loss that keeps a decoded video's motion: without weights, or from a network a user gives."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.tokenizers.perceptual import load_network

LUCAS_KANADE = "lucas_kanade"
NUM_LEVELS, NUM_ITERATIONS, WINDOW = 4, 3, 7
STIFFNESS = 1e-3
"""Added to the structure tensor: where nothing says how a window moves, it stays where it was."""
LUMINANCE = (0.299, 0.587, 0.114)


class LucasKanade(nn.Module):
    """Dense optical flow from image gradients, coarse to fine; differentiable in both images and not learned.

    Source: Lucas and Kanade (IJCAI 1981), in the pyramid of Bouguet (2001).
    """

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Estimate where the pixels of `first` are in `second`.

        Args:
            first: (N, 3, H, W) in [-1, 1].
            second: the same shape.

        Returns:
            (N, 2, H, W): pixels to the right and down.
        """
        weights = first.new_tensor(LUMINANCE)[:, None, None]
        grey = [(image * weights).sum(dim=1, keepdim=True) for image in (first, second)]
        flow = torch.zeros_like(first[:, :2])
        flow = F.interpolate(flow, scale_factor=1 / 2 ** (NUM_LEVELS - 1))
        for level in reversed(range(NUM_LEVELS)):
            a, b = (F.avg_pool2d(image, 2**level) for image in grey)
            if flow.shape[-2:] != a.shape[-2:]:
                flow = 2 * F.interpolate(flow, size=a.shape[-2:], mode="bilinear", align_corners=False)
            gx, gy = _gradients(a)
            xx, xy, yy = (_average(product) for product in (gx * gx, gx * gy, gy * gy))
            determinant = (xx + STIFFNESS) * (yy + STIFFNESS) - xy * xy
            for _ in range(NUM_ITERATIONS):
                change = warp(b, flow) - a
                tx, ty = _average(gx * change), _average(gy * change)
                dx = (xy * ty - (yy + STIFFNESS) * tx) / determinant
                dy = (xy * tx - (xx + STIFFNESS) * ty) / determinant
                # Gradients say nothing of longer ways; and windows overlap, so neighbours that disagree are both wrong.
                flow = _average(flow + torch.cat([dx, dy], dim=1).clamp(-2, 2))
        return flow


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Look up an image (N, C, H, W) at each position plus flow (N, 2, H, W) in pixels; edges are repeated."""
    height, width = image.shape[-2:]
    y = torch.arange(height, device=image.device, dtype=image.dtype)[:, None]
    x = torch.arange(width, device=image.device, dtype=image.dtype)
    grid = torch.stack([(2 * (x + flow[:, 0]) + 1) / width - 1, (2 * (y + flow[:, 1]) + 1) / height - 1], dim=-1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def load_flow_network(spec: str = LUCAS_KANADE) -> nn.Module:
    """Load what maps two images (N, 3, H, W) in [-1, 1] to flow (N, 2, H, W) in pixels; see `load_network`."""
    return load_network(spec, {LUCAS_KANADE: LucasKanade})


def flow_loss(network: nn.Module, predicted: Tensor, target: Tensor) -> Tensor:
    """How much the motion in a decoded video differs from the true one: L1 of flow, forwards and backwards, in pixels.

    Args:
        network: from `load_flow_network`.
        predicted: (B, T, 3, H, W) in [-1, 1], T >= 2.
        target: the same shape.
    """

    def both_ways(video: Tensor) -> Tensor:
        before, after = video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1)
        return network(torch.cat([before, after]), torch.cat([after, before]))

    with torch.no_grad():
        true = both_ways(target)
    return (both_ways(predicted) - true).abs().mean()


def _gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of (N, 1, H, W) to the right and down."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (WINDOW // 2,) * 4, mode="replicate"), WINDOW, stride=1)
