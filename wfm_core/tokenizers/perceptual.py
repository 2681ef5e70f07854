"""Perceptual and Gram losses on features of a fixed network, one that needs no download or one that a user gives."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.tokenizers.patch import to_float

GABOR = "gabor"
NUM_ORIENTATIONS, NUM_SCALES, KERNEL = 4, 3, 9
SQUARE = 4  # pixels along a side; a kernel and the rest of a square must fill whole squares
WAVELENGTH, BANDWIDTH = 4.0, 2.0  # pixels at each scale: the finest stripes a 9-pixel kernel tells from its neighbours
# Luminance and two colour differences of RGB, as in the YCbCr of JPEG, so that texture and colour are told apart.
OPPONENT = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


class GaborFeatures(nn.Module):
    """How much of each orientation there is at each place and scale: one layer of a scattering network, not learned.

    Luminance and two colour differences are filtered by pairs of Gabor kernels (even and odd) at 4 orientations and 3
    octaves; a feature is the modulus of a pair, which stays the same when a stripe shifts by a fraction of its width.
    It is no VGG: it knows edges and textures, no objects, and nothing of brightness, which is for L1 to keep.

    Source: the modulus of oriented wavelets is from Bruna and Mallat, "Invariant Scattering Convolution Networks"
    (PAMI 2013).
    """

    kernels: Tensor
    opponent: Tensor

    def __init__(self) -> None:
        super().__init__()
        reach = torch.arange(KERNEL) - KERNEL // 2
        y, x = torch.meshgrid(reach, reach, indexing="ij")
        window = torch.exp(-(x**2 + y**2) / (2 * BANDWIDTH**2))
        kernels = []
        for k in range(NUM_ORIENTATIONS):
            angle = math.pi * k / NUM_ORIENTATIONS
            phase = 2 * math.pi / WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle))
            even = window * phase.cos()
            kernels += [even - window * (even.sum() / window.sum()), window * phase.sin()]  # none sees a constant
        bank = torch.stack(kernels)[:, None]
        bank = bank / bank.abs().sum(dim=(-1, -2), keepdim=True)
        # Kernels over one channel leave a CPU idle. So squares of pixels become channels, and each kernel one for each
        # pixel of a square: the same sums, backwards in a sixth of the time.
        last = SQUARE - 1
        shifted = [F.pad(bank, (x, last - x, y, last - y)) for y in range(SQUARE) for x in range(SQUARE)]
        wide = F.pixel_unshuffle(torch.stack(shifted, dim=1).flatten(0, 1), SQUARE)
        self.register_buffer("kernels", wide, persistent=False)
        self.register_buffer("opponent", torch.tensor(OPPONENT)[..., None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) in [-1, 1] to a list of features (N, 12, H / 2**s, W / 2**s), the finest first."""
        x = F.conv2d(images, self.opponent)
        features = []
        for scale in range(NUM_SCALES):
            if scale > 0:
                x = F.avg_pool2d(x, 2)
            pairs = self._filter(x.flatten(0, 1)[:, None]).unflatten(1, (NUM_ORIENTATIONS, 2))
            modulus = (pairs.square().sum(dim=2) + 1e-6).sqrt()  # smooth at 0, where a gradient would be undefined
            features.append(modulus.unflatten(0, x.shape[:2]).flatten(1, 2))
        return features

    def _filter(self, planes: Tensor) -> Tensor:
        """(N, 1, H, W) to what each kernel makes of it, (N, 8, H, W)."""
        height, width = planes.shape[-2:]
        reach = KERNEL // 2
        margins = (reach, reach + -width % SQUARE, reach, reach + -height % SQUARE)
        squares = F.pixel_unshuffle(F.pad(planes, margins, mode="replicate"), SQUARE)
        return F.pixel_shuffle(F.conv2d(squares, self.kernels), SQUARE)[..., :height, :width]


def load_network(spec: str, known: dict[str, type[nn.Module]]) -> nn.Module:
    """Build a frozen network by name, or load it from a file.

    Args:
        spec: a key of `known`, or the path of a file written by `torch.export.save`.
        known: names and classes.

    Raises:
        ValueError: neither a known name nor such a file.
    """
    if spec in known:
        return known[spec]().requires_grad_(False)
    if not Path(spec).is_file():
        raise ValueError(f"a network must be one of {sorted(known)} or a file of torch.export, got {spec!r}")
    try:
        return torch.export.load(spec).module().requires_grad_(False)
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{spec} must be a file of torch.export: {error}") from error


def load_feature_network(spec: str = GABOR) -> nn.Module:
    """Load what maps images (N, 3, H, W) in [-1, 1] to a list of features (N, C, h, w); see `load_network`."""
    return load_network(spec, {GABOR: GaborFeatures})


@torch.no_grad()
def pooled_features(network: nn.Module, images: Tensor) -> Tensor:
    """Describe each image by the means of its features over all positions, for `wfm_core.metrics.frechet_distance`.

    Args:
        network: from `load_feature_network`.
        images: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, D), the channels of all layers end to end; 36 of `GaborFeatures`.
    """
    return torch.cat([maps.mean(dim=(2, 3)) for maps in network(images)], dim=1)


def frame_features(network: nn.Module, frames: np.ndarray) -> np.ndarray:
    """Pooled features (N, D) float64 of frames (N, H, W, 3) uint8, some at a time."""
    parts = np.array_split(frames, max(1, len(frames) // 64))
    seen = [pooled_features(network, to_float(torch.from_numpy(np.array(part)))).numpy() for part in parts]
    return np.concatenate(seen).astype(np.float64)


def clip_embedding(features: np.ndarray) -> np.ndarray:
    """Describe a clip (2 * D,) by the mean and the mean absolute change of its frames' features (T, D), T >= 1."""
    change = np.abs(np.diff(features, axis=0)).mean(axis=0) if len(features) > 1 else np.zeros(features.shape[1])
    return np.concatenate([features.mean(axis=0), change])


def perceptual_loss(predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the L1 distance of features, in units of the target's own mean magnitude in that layer."""
    return torch.stack([(p - t).abs().mean() / t.abs().mean() for p, t in zip(predicted, target, strict=True)]).mean()


def gram_loss(predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the L1 distance of Gram matrices, in units of the target's own mean magnitude.

    Source: Gatys et al., "Image Style Transfer Using Convolutional Neural Networks" (CVPR 2016), section 2.2.
    """
    pairs = [(gram(p), gram(t)) for p, t in zip(predicted, target, strict=True)]
    return torch.stack([(p - t).abs().mean() / t.abs().mean() for p, t in pairs]).mean()


def gram(features: Tensor) -> Tensor:
    """Correlations (N, C, C) of the channels of (N, C, h, w), averaged over positions."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[-1]
