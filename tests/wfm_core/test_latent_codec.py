import numpy as np
import pytest
import torch

from wfm_core.tokenizers.latent_codec import LatentCodec


def test_tokens_are_kept_in_raster_order():
    codec = LatentCodec((2, 3), (3, 5))
    level = torch.stack([torch.arange(6) % 3, torch.arange(6) % 5], dim=-1).view(1, 2, 3, 2)
    latents = level / torch.tensor([1.0, 2.0]) - 1
    kept = codec.pack(latents[:, None])
    assert kept.shape == (1, 1, 6, 2) and kept.dtype == np.uint8
    np.testing.assert_array_equal(kept[0, 0], level.view(6, 2))
    assert torch.equal(codec.unpack(kept), latents[:, None])


def test_continuous_latents_are_kept_in_half_precision():
    codec = LatentCodec((2, 3), ())
    latents = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    kept = codec.pack(latents)
    assert kept.shape == latents.shape and kept.dtype == np.float16
    assert codec.unpack(kept).dtype == torch.float32
    assert codec.unpack(kept).numpy() == pytest.approx(latents.numpy(), rel=1e-3)
