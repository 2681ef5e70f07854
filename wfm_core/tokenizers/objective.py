"""What a video tokenizer is trained on: videos and images in turn, and how far what it decodes is from them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wfm_core.tokenizers.flow import LUCAS_KANADE, flow_loss, load_flow_network
from wfm_core.tokenizers.patch import to_float
from wfm_core.tokenizers.perceptual import GABOR, gram_loss, load_feature_network, perceptual_loss
from wfm_core.tokenizers.video import VideoTokenizer


@dataclass(frozen=True)
class ReconstructionConfig:
    """Weights of the losses beside L1, which has weight 1; and the networks that some of them look through.

    The first stage of training uses the perceptual loss, the second adds those of Gram matrices and of flow.

    Source: NVIDIA, "Cosmos World Foundation Model Platform for Physical AI" (2025), section 4.2.
    """

    perceptual_weight: float = 0.1
    gram_weight: float = 0.0
    flow_weight: float = 0.0
    feature_network: str = GABOR
    flow_network: str = LUCAS_KANADE


class ReconstructionObjective(nn.Module):
    """A tokenizer with its loss, in the form that `wfm_core.train.fit` wants."""

    def __init__(self, tokenizer: VideoTokenizer, config: ReconstructionConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config
        # In tuples, so that they are no part of the weights that are trained and saved.
        self._features = (load_feature_network(config.feature_network),)
        self._flow = (load_flow_network(config.flow_network),)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `frames` (B, T, H, W, 3) uint8; T is 1 in a batch of images.
        """
        shape = batch["frames"].shape[:2]
        video = to_float(batch["frames"].flatten(0, 1)).unflatten(0, shape)  # (B, T, 3, H, W)
        decoded = self.tokenizer.decode(self.tokenizer.encode(video)[0])[0]
        # Features and flow are small differences of large numbers, which bfloat16 rounds away.
        with torch.autocast(video.device.type, enabled=False):
            loss, parts = self._compare(decoded.float(), video)
        return loss, {name: value.detach() for name, value in parts.items()}

    def _compare(self, decoded: Tensor, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts, of two videos (B, T, 3, H, W)."""
        config = self.config
        parts = {"l1": (decoded - video).abs().mean()}
        loss = parts["l1"]
        if config.perceptual_weight or config.gram_weight:
            network = self._features[0].to(video.device)
            seen, aim = network(decoded.flatten(0, 1)), network(video.flatten(0, 1))
            parts |= {"perceptual": perceptual_loss(seen, aim), "gram": gram_loss(seen, aim)}
            loss = loss + config.perceptual_weight * parts["perceptual"] + config.gram_weight * parts["gram"]
        if config.flow_weight and video.shape[1] > 1:
            parts["flow"] = flow_loss(self._flow[0].to(video.device), decoded, video)
            loss = loss + config.flow_weight * parts["flow"]
        with torch.no_grad():
            parts["psnr"] = -10 * ((decoded - video).square().mean(dim=(2, 3, 4)) / 4).log10().mean()
        return loss, parts
