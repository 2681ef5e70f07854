"""Layers of diffusion networks: attention and a plain network that each frame's conditions shift, scale and gate."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.models.blocks import MLP, attend
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


class LevelEmbedding(nn.Sequential):
    """Numbers (...) of the order of 1, a noise level or the size of a step, to (..., D) in the type of the weights."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(WAVES_DIM, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, input: Tensor) -> Tensor:
        """Map (...) to (..., D)."""
        return super().forward(level_waves(input).to(next(self.parameters()).dtype))


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


class DiTBlock(nn.Module):
    """Plain attention, over space or over time, and a plain network; the identity at first.

    Source: Peebles and Xie (2023), section 3.2.
    """

    def __init__(self, width: int, num_heads: int, ffn_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ffn_ratio * width, width)
        )
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, conditions: Tensor, *, over_time: bool = False) -> Tensor:
        """Map x (B, T, n, D) to the same shape; conditions are (B, T or 1, D)."""
        mine = self.modulate(F.silu(conditions))[:, :, None].chunk(6, dim=-1)
        given = self.norm1(x) * (1 + mine[1]) + mine[0]
        given = given.transpose(1, 2) if over_time else given
        query, key, value = self.query_key_value(given).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        mixed = attend(*(part.transpose(-2, -3) for part in (query, key, value))).transpose(-2, -3).flatten(-2)
        x = x + mine[2] * self.out(mixed.transpose(1, 2) if over_time else mixed)
        return x + mine[5] * self.ffn(self.norm2(x) * (1 + mine[4]) + mine[3])
