"""Layers of the Llama-style decoder: grouped-query attention, a gated network, and the block made of them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.data.actions import ACTION_DIM, ACTION_HIGH, ACTION_LOW
from wfm_core.models.blocks import attend
from wfm_core.models.positions import attention_scale, rotate
from wfm_core.models.transformer_config import TransformerConfig

EPSILON = 1e-5


class Piece(NamedTuple):
    """Tokens in a row that attend to the same keys: what none of them sees costs nothing.

    Attributes:
        length: how many tokens, after those of the piece before.
        keys: ranges of keys.
        bias: (B or 1, 1, 1 or length, M) additive, of the M keys of the ranges; None: all are in sight.
    """

    length: int
    keys: Sequence[slice]
    bias: Tensor | None


def whole(length: int, bias: Tensor) -> list[Piece]:
    """One piece for all tokens, which attend to all keys as the bias says."""
    return [Piece(length, [slice(None)], bias)]


def runs(frames: Sequence[int], size: int) -> list[slice]:
    """Ranges of keys of these frames, in ascending order and `size` keys each, as few as cover them."""
    ends = [k for k, frame in enumerate(frames, 1) if frame + 1 not in frames]
    parts = [frames[first:end] for first, end in zip([0, *ends], ends, strict=False)]
    return [slice(part[0] * size, (part[-1] + 1) * size) for part in parts]


def keys_then_values(parts: Sequence[Tensor]) -> Tensor:
    """Put keys and values (B, 2, N', L, d) of several frames end to end, (B, 2, N', M, d).

    All keys lie before all values, so that products take either as they lie.
    """
    return torch.cat([part.transpose(0, 1) for part in parts], dim=3).transpose(0, 1)


def gathered(seen: Tensor, ranges: Sequence[Sequence[slice]]) -> list[Tensor]:
    """Keys and values `seen` (B, 2, N', M, d) of some ranges of keys at a time, each (B, 2, N', m, d)."""
    if not seen.requires_grad:  # slices are views
        parts = [[seen[:, :, :, part] for part in mine] for mine in ranges]
        return [mine[0] if len(mine) == 1 else keys_then_values(mine) for mine in parts]
    # From one partition of the keys: gradients of slices of the whole would each be of its size.
    length = seen.shape[3]
    bounds = [[part.indices(length)[:2] for part in mine] for mine in ranges]
    cuts = sorted({0, length, *(cut for mine in bounds for part in mine for cut in part)})
    between = dict(zip(cuts, seen.split([b - a for a, b in pairwise(cuts)], dim=3), strict=False))
    return [
        keys_then_values([part for start, end in mine for cut, part in between.items() if start <= cut < end])
        for mine in bounds
    ]


def hiding(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive bias of what is visible (...) bool: 0, or -inf where not."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension, in the precision of what it gets.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019).
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to the same shape."""
        # Under autocast weights stay float32, and the fused kernels take no mixture.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised and have learned scales.

    Source: Ainslie et al., "GQA" (EMNLP 2023); Henry et al., "Query-Key Normalization for Transformers" (2020).
    """

    def __init__(self, width: int, context_dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.query = nn.Linear(width, num_heads * head_dim, bias=False)
        self.key_value = nn.Linear(context_dim, 2 * num_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, width, bias=False)
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def queries(self, x: Tensor) -> Tensor:
        """(B, L, D) to queries (B, N, L, d)."""
        return self.query_norm(self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) to keys and values (B, N', M, d)."""
        keys, values = self.key_value(context).unflatten(-1, (2, self.num_kv_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.key_norm(keys), values

    def mix(self, queries: Tensor, seen: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Attend with queries (B, N, L, d) to keys and values `seen` (B, 2, N', M, d); returns (B, L, D)."""
        shared = self.num_heads // self.num_kv_heads
        mixed = []
        in_sight = gathered(seen, [piece.keys for piece in pieces])
        split = queries.split([piece.length for piece in pieces], dim=2)
        for piece, mine, visible in zip(pieces, split, in_sight, strict=True):
            keys, values = visible.unbind(1)
            bias = piece.bias
            if bias is not None and bias.shape[2] > 1:
                bias = bias.repeat(1, 1, shared, 1)
            # The queries that share a key stand in line for it, so that no key is copied.
            lined_up = mine.unflatten(1, (self.num_kv_heads, shared)).flatten(2, 3)  # (B, N', shared * length, d)
            mixed.append(attend(lined_up, keys, values, bias).unflatten(2, (shared, -1)).flatten(1, 2))
        return self.out(torch.cat(mixed, dim=2).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated position-wise network (..., D) -> (..., D).

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(self, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Sight(NamedTuple):
    """What the tokens of one pass have in common, L of them beside M keys.

    Attributes:
        absolute: (B, L, D) absolute position embedding, added in every block.
        cosines: (B, 1, L, d / 2) by which queries and the pass's own keys are turned.
        sines: of the same shape.
        pieces: which keys each of the tokens attends to.
    """

    absolute: Tensor
    cosines: Tensor
    sines: Tensor
    pieces: Sequence[Piece]


class Text(NamedTuple):
    """Text as every block attends to it, W features after one that stands for "nothing".

    Attributes:
        layers: keys and values (B, 2, N', 1 + W, d) of each block.
        bias: (B, 1, 1, 1 + W) additive; -inf hides padding.
    """

    layers: list[Tensor]
    bias: Tensor


class Reader(Protocol):
    """A block that attends to text."""

    def read(self, features: Tensor) -> Tensor:
        """Keys and values (B, 2, N', W, d) of text features (B, W, text_dim)."""
        ...


def read_text(blocks: Sequence[Reader], text: Tensor, dtype: torch.dtype) -> Text:
    """Prepare text features (B, W, text_dim), all zero where there is no word, for the blocks."""
    # A feature of zeros has zero keys and values: who attends to it takes nothing. So a row without words is as if
    # there were no text.
    features = F.pad(text.to(dtype), (0, 0, 1, 0))
    hidden = (features == 0).all(dim=-1)
    hidden[:, 0] = False
    return Text([block.read(features) for block in blocks], hiding(~hidden, dtype)[:, None, None])


def text_entries(text: Text) -> dict[str, Tensor]:
    """A text as entries of a `wfm_core.world_model.ModelState`, for `text_in`."""
    return {f"text{i}": layer for i, layer in enumerate(text.layers)} | {"text_bias": text.bias}


def text_in(state: Mapping[str, Tensor], num_layers: int) -> Text | None:
    """The text of a state, or None if it holds none."""
    if "text_bias" not in state:
        return None
    return Text([state[f"text{i}"] for i in range(num_layers)], state["text_bias"])


class ActionEmbedding(nn.Sequential):
    """Physical actions (..., 7) to (..., D)."""

    low: Tensor
    extent: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(ACTION_DIM, width), nn.GELU(), nn.Linear(width, width))
        low, high = torch.from_numpy(ACTION_LOW), torch.from_numpy(ACTION_HIGH)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("extent", high - low, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., 7) to (..., D) in the type of the weights."""
        return super().forward(within_bounds(input, self.low, self.extent).to(self.low.dtype))


def within_bounds(action: Tensor, low: Tensor, extent: Tensor) -> Tensor:
    """Physical actions (..., 7) to the range [-1, 1] of their bounds, `low` and up by `extent`."""
    return (action - low) / extent * 2 - 1


class Block(nn.Module):
    """Self-attention, attention to text if there is any, and a gated network, each after a norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, heads = config.width, (config.num_heads, config.num_kv_heads, config.head_dim)
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, width, *heads)
        if config.text_dim:
            self.norm_text = RMSNorm(width)
            self.text_attention = Attention(width, config.text_dim, *heads)
        self.norm2 = RMSNorm(width)
        self.ffn = SwiGLU(width, config.ffn_dim)
        self.scale = attention_scale(config.rope) ** 2  # once for queries, once for keys
        for last in (self.attention.out, self.ffn.down):
            nn.init.normal_(last.weight, std=(2 * config.num_layers * last.in_features) ** -0.5)
        if config.text_dim:
            nn.init.zeros_(self.text_attention.out.weight)  # so a model that learns to read begins as it was

    def project(self, x: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """Queries (B, N, L, d), and keys and values (B, 2, N', L, d), of the tokens x (B, L, D) themselves."""
        normed = self.norm1(x)
        keys, values = self.attention.keys_values(normed)
        queries = rotate(self.attention.queries(normed), sight.cosines, sight.sines) * self.scale
        return queries, torch.stack([rotate(keys, sight.cosines, sight.sines), values]).transpose(0, 1)

    def read(self, features: Tensor) -> Tensor:
        """Keys and values (B, 2, N', W, d) of text features (B, W, text_dim)."""
        return torch.stack(self.text_attention.keys_values(features), dim=1)

    def forward(
        self, x: Tensor, sight: Sight, text: tuple[Tensor, Tensor] | None, look: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Map x (B, L, D) to the same shape.

        Args:
            x: the tokens.
            sight: see there.
            text: keys and values (B, 2, N', 1 + W, d) of a text and their bias (B, 1, 1, 1 + W), or None.
            look: takes the tokens' own keys and values (B, 2, N', L, d) to all that they may attend to, those among
                them, (B, 2, N', M, d); None: they are all.
        """
        queries, own = self.project(x, sight)
        x = x + self.attention.mix(queries, look(own) if look else own, sight.pieces)
        if text is not None:
            keys_values, bias = text
            heard = self.text_attention.queries(self.norm_text(x))
            x = x + self.text_attention.mix(heard, keys_values, whole(x.shape[1], bias))
        return x + self.ffn(self.norm2(x))
