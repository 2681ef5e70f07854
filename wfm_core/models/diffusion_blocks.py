"""Layers of the diffusion network: attention and a plain network that each frame's conditions shift, scale and gate."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wfm_core.models.blocks import MLP
from wfm_core.models.diffusion_config import WAVES_DIM, DiffusionConfig
from wfm_core.models.positions import attention_scale, rotate
from wfm_core.models.transformer_blocks import Attention, Piece, RMSNorm, Sight


def level_waves(told: Tensor) -> Tensor:
    """Sines and cosines (..., WAVES_DIM) float32 of numbers (...) of the order of 1, of frequencies from 1 to 256.

    Source: Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions" (NeurIPS 2020).
    """
    frequencies = 256 ** torch.linspace(0, 1, WAVES_DIM // 2, device=told.device)
    angles = told.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Conditions(NamedTuple):
    """What modulates the tokens of each frame.

    Attributes:
        features: (B, T, D) of the noise level and what else is known of the frame.
        shared: (B, T, 3 * D) shift, scale and gate that all sublayers have in common.
    """

    features: Tensor
    shared: Tensor


class Modulation(nn.Module):
    """Shift, scale and gate of one sublayer: what all share, and a correction of low rank of its own, zero at first.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023), section 3.2; the low rank is
    from NVIDIA, "Cosmos World Foundation Model Platform for Physical AI" (2025), section 5.1.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, 3 * width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Modulate tokens x (B, T, n, D): what goes into the sublayer (B, T * n, D), and the gate (B, T, 1, D)."""
        own = self.up(self.down(conditions.features))
        shift, scale, gate = (own + conditions.shared)[:, :, None].chunk(3, dim=-1)
        return (self.norm(x) * (1 + scale) + shift).flatten(1, 2), gate


class Heard(NamedTuple):
    """What tokens attend to beside frames: text, actions.

    Attributes:
        seen: keys and values (B, 2, N, M, d).
        pieces: which of them each of the tokens attends to.
    """

    seen: Tensor
    pieces: list[Piece]


class DiffusionBlock(nn.Module):
    """Attention to frames, to text and actions if there are any, and a plain network; the identity at first."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        width, heads = config.width, (config.num_heads, config.num_heads, config.head_dim)
        self.modulate_attention = Modulation(width, config.adaln_rank)
        self.attention = Attention(width, width, *heads)
        if config.context_dim:
            self.modulate_context = Modulation(width, config.adaln_rank)
            self.context_attention = Attention(width, config.context_dim, *heads)
            nn.init.zeros_(self.context_attention.out.weight)
        self.modulate_mlp = Modulation(width, config.adaln_rank)
        self.mlp = MLP(width, config.ffn_ratio)
        self.scale = attention_scale(config.rope) ** 2  # once for queries, once for keys

    def read(self, features: Tensor) -> Tensor:
        """Keys and values (B, 2, N, W, d) of features (B, W, context_dim) of text or actions."""
        return torch.stack(self.context_attention.keys_values(features), dim=1)

    def forward(
        self,
        x: Tensor,
        conditions: Conditions,
        sight: Sight,
        heard: Heard | None,
        look: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Map x (B, T, n, D) to the same shape.

        Args:
            x: tokens of T frames.
            conditions: of the frames.
            sight: of the T * n tokens.
            heard: see there; None leaves that attention out.
            look: takes the tokens' own keys and values (B, 2, N, T * n, d) to all that they may attend to, those among
                them, (B, 2, N, M, d); None: they are all.
        """

        def add(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
            return x + gate * change.unflatten(1, x.shape[1:3])

        given, gate = self.modulate_attention(x, conditions)
        keys, values = self.attention.keys_values(given)
        own = torch.stack([rotate(keys, sight.cosines, sight.sines), values]).transpose(0, 1)
        queries = rotate(self.attention.queries(given), sight.cosines, sight.sines) * self.scale
        x = add(x, gate, self.attention.mix(queries, look(own) if look else own, sight.pieces))
        if heard is not None:
            given, gate = self.modulate_context(x, conditions)
            x = add(x, gate, self.context_attention.mix(self.context_attention.queries(given), *heard))
        given, gate = self.modulate_mlp(x, conditions)
        return add(x, gate, self.mlp(given))
