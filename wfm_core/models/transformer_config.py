"""Sizes of the Llama-style decoder: its configuration, presets from 7 M to 13 B, and what each costs to train."""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from wfm_core.data.actions import ACTION_DIM
from wfm_core.models.positions import RopeConfig

NEW_PARTS = ("norm_text", "text_attention", "draft_heads", "modulate_context", "context_attention", "embed_step")
"""Submodules that a trained model may be given later: it computes as before until they are trained."""
DECODINGS = ("raster", "speculative", "parallel")
LARGEST_VOCABULARY = 2**20


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `Transformer`, weights of its losses and how it decodes.

    `levels` are the FSQ levels of one token; a cell has `groups` tokens. A `factorised` model embeds and predicts each
    of a token's dimensions for itself; else a token is one of prod(levels) words. `num_kv_heads` heads of keys and
    values serve `num_heads` queries. `text_dim` above 0 adds attention to text after each self-attention, to features
    of that size, which `text_encoder` gives: "bytes" or a T5 folder (see `text.load_text_encoder`).
    `num_draft_heads` predict that many tokens beyond the next one; together they weigh `draft_weight` in the loss, each
    `draft_decay` times as much as the one before. `parallel` is the share of the loss that masked frames get, for
    decoding all tokens of a frame at once. In training, up to a fraction `corruption` of the levels that the context
    shows is off by one. `decoding` is "raster", "speculative" or "parallel", the last in `refine_steps` passes; words
    are sampled at `temperature` (0: the likeliest) from the likeliest `top_p` of the probability.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    groups: int = 3
    grid: tuple[int, int] = (8, 8)
    num_cameras: int = 1
    width: int = 256
    head_dim: int = 64
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 4
    ffn_dim: int = 768
    window: int = 8
    factorised: bool = True
    text_dim: int = 0
    text_encoder: str = ""
    num_draft_heads: int = 0
    draft_weight: float = 0.2
    draft_decay: float = 0.8
    parallel: float = 0.5
    z_loss: float = 3e-4
    corruption: float = 0.15
    decoding: str = "parallel"
    refine_steps: int = 2
    temperature: float = 0.0
    top_p: float = 1.0
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads}, {self.num_kv_heads}")
        if not 0 <= self.num_draft_heads < self.frame_tokens:
            raise ValueError(f"num_draft_heads must lie in [0, {self.frame_tokens}), got {self.num_draft_heads}")
        if not 0 <= self.parallel < 1:
            raise ValueError(f"parallel must lie in [0, 1), got {self.parallel}")
        if self.text_encoder and not self.text_dim:
            raise ValueError(f"text_encoder={self.text_encoder!r} needs its features' size as text_dim, got 0")
        if self.num_words > LARGEST_VOCABULARY:
            raise ValueError(
                f"the FSQ levels {self.levels} of a token make {self.num_words} words, above {LARGEST_VOCABULARY}: set "
                "factorised=true, or more groups a cell"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding must be one of {DECODINGS}, got {self.decoding!r}")
        if self.decoding == "speculative" and not self.num_draft_heads:
            raise ValueError("speculative decoding needs num_draft_heads above 0, got 0")
        if self.decoding == "parallel" and not self.parallel:
            raise ValueError("parallel decoding needs a share of the loss, parallel, above 0, got 0")

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame, S, without its action."""
        return self.num_cameras * self.grid[0] * self.grid[1] * self.groups

    @property
    def frame_slots(self) -> int:
        """Places of a frame in the sequence, L = S + 1: its action, then its tokens."""
        return self.frame_tokens + 1

    @property
    def cell_levels(self) -> tuple[int, ...]:
        """FSQ levels of a whole cell, as the tokenizer's."""
        return self.levels * self.groups

    @property
    def num_parts(self) -> int:
        """Words that say what a token is, P: one for each dimension of a factorised model, else one."""
        return len(self.levels) if self.factorised else 1

    @property
    def num_words(self) -> int:
        """Size of the vocabulary of each part."""
        return max(self.levels) if self.factorised else math.prod(self.levels)


# Video of 640 x 1024 pixels, 16 of them a cell along either axis, 8 frames a latent frame; 33 frames with YaRN.
_4B = TransformerConfig(
    groups=1,
    grid=(40, 64),
    width=4096,
    head_dim=128,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    ffn_dim=14336,
    window=5,
    factorised=False,
    parallel=0.0,
    decoding="raster",
    temperature=1.0,
    top_p=0.8,
    rope=RopeConfig(theta=500_000.0, trained_frames=3, extension=2.0),
)
_12B = replace(_4B, width=5120, num_layers=40)

PRESETS: dict[str, TransformerConfig] = {
    "nano": TransformerConfig(),
    "small": TransformerConfig(width=512, num_layers=12, num_heads=8, num_kv_heads=4, ffn_dim=1536),
    "base": TransformerConfig(width=1024, num_layers=16, num_heads=16, num_kv_heads=4, ffn_dim=3072),
    "1b": TransformerConfig(
        width=2048, head_dim=128, num_layers=16, num_heads=16, num_kv_heads=4, ffn_dim=6144, factorised=False
    ),
    "4b": _4B,
    "5b": replace(_4B, text_dim=1024, top_p=0.7),
    "12b": _12B,
    "13b": replace(_12B, text_dim=1024),
}
"""By class of size; "5b" and "13b" are "4b" and "12b" with text.

Source: the last four follow NVIDIA, "Cosmos World Foundation Model Platform for Physical AI" (2025), section 5.2, and
its released configurations (8 heads of keys and values).
"""


def frames_in_sight(frame: int, window: int) -> list[int]:
    """Frames before this one that its tokens attend to: the first, and the rest of the last `window`."""
    return [0, *range(max(1, frame - window + 1), frame)] if frame > 0 else []


class Cost(NamedTuple):
    """What it takes to train on a batch of clips.

    Attributes:
        parameters: how many.
        activation_bytes: what the forward pass keeps for the backward pass.
        token_flops: of the forward pass, for each token it predicts.
        frame_flops: likewise for each frame it predicts; the backward pass takes about twice as many.
    """

    parameters: int
    activation_bytes: int
    token_flops: float
    frame_flops: float


def count_parameters(config: TransformerConfig) -> int:
    """Parameters of `Transformer(config)`, drafts and text included."""
    width, out = config.width, config.num_parts * config.num_words
    norms = 2 + (1 if config.text_dim else 0)
    head_norms = 2 * config.head_dim * (2 if config.text_dim else 1)
    block = _block_matrices(config) + _text_matrices(config) + norms * width + head_norms
    embeddings = out + 1 + config.num_cameras * config.groups + 1 + (2 if config.parallel else 0) + width // 6 * 6
    action = ACTION_DIM * width + width + width**2 + width
    drafts = config.num_draft_heads * (width**2 + width)
    return config.num_layers * block + embeddings * width + action + drafts + width + out * width


def training_cost(
    config: TransformerConfig,
    *,
    num_frames: int,
    batch_size: int = 1,
    text_words: int = 0,
    activation_width: int = 2,
    fused: bool = True,
) -> Cost:
    """Estimate memory and arithmetic of a training step.

    Args:
        config: of the model.
        num_frames: of a clip, T.
        batch_size: clips.
        text_words: features of the text, W; 0 leaves text out.
        activation_width: bytes of an activation, 2 in bfloat16.
        fused: attention keeps no scores, as on a GPU; a CPU keeps them all.
    """
    slots, tokens, predicted = config.frame_slots, config.frame_tokens, num_frames - 1
    copies = predicted if config.parallel else 0
    length = (num_frames + copies) * slots
    width, mixed = config.width, config.num_heads * config.head_dim
    out = config.num_parts * config.num_words
    drafted = [predicted * (tokens - k) for k in range(1, config.num_draft_heads + 1)]
    scored = (predicted + copies) * tokens + sum(drafted)

    # Pairs of a query and a key, of frames and then of their copies, and how many keys are copied together for them.
    before = [len(frames_in_sight(frame, config.window)) for frame in range(num_frames)]
    of_copies = [1 + count for count in before[1:]] if copies else []
    pairs = slots**2 * (sum(before) + num_frames + sum(of_copies))
    joined = slots * (sum(of_copies) + sum(1 + count for count in before[config.window + 1 :]))

    block = 2 * length * _block_matrices(config) + 4 * pairs * mixed
    if text_words:
        from_text = config.text_dim * 2 * config.num_kv_heads * config.head_dim
        block += (
            2 * (1 + text_words) * from_text + 2 * length * 2 * width * mixed + 4 * length * (1 + text_words) * mixed
        )
    embedded = length if config.factorised else 0  # as a product with what is chosen of each part
    flops = config.num_layers * block + 2 * length * (width // 6 * 6) * width + 2 * (scored + embedded) * width * out
    flops += 2 * predicted * (ACTION_DIM * width + width**2) + 2 * sum(drafted) * width**2

    # Of a token in a block: inputs and outputs of both norms, queries before and after their norm and turn, keys and
    # values likewise, what attention gives, and four of the gated network's width.
    kept = 4 * width + 3 * mixed + 4 * config.num_kv_heads * config.head_dim + 4 * config.ffn_dim
    in_block = length * kept + 2 * joined * config.num_kv_heads * config.head_dim
    in_block += 0 if fused else config.num_heads * pairs
    if text_words:
        in_block += length * (2 * width + 3 * mixed + (0 if fused else config.num_heads * (1 + text_words)))
    activations = batch_size * activation_width * (config.num_layers * in_block + 2 * scored * out)

    frame_flops = flops / predicted
    return Cost(count_parameters(config), activations, frame_flops / tokens, frame_flops)


def _block_matrices(config: TransformerConfig) -> int:
    """Entries of the matrices that every token of a block goes through, text aside."""
    queries_and_out = 2 * config.width * config.num_heads * config.head_dim
    keys_values = 2 * config.width * config.num_kv_heads * config.head_dim
    return queries_and_out + keys_values + 3 * config.width * config.ffn_dim


def _text_matrices(config: TransformerConfig) -> int:
    if not config.text_dim:
        return 0
    keys_values = 2 * config.text_dim * config.num_kv_heads * config.head_dim
    return 2 * config.width * config.num_heads * config.head_dim + keys_values
