"""A Llama-style decoder over the tokens of past frames, in raster order: network and training loss.

A frame is an action token, which carries the action that led to it, then its tokens: cameras one after the other, cells
in raster order, `groups` tokens a cell. Every token attends to those before it in the last `window` frames and in the
first, which stays in sight as an attention sink. A second stream may hold masked copies of the frames, which see
themselves whole and of the first stream only what is earlier. How frames are generated is `decoding.py`'s business.

Source: NVIDIA, "Cosmos World Foundation Model Platform for Physical AI" (2025), section 5.2; the sink is from Xiao et
al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.models.positions import NATIVE_FPS, bounded_sinusoids, rotations
from wfm_core.models.transformer_blocks import (
    ActionEmbedding,
    Block,
    Piece,
    RMSNorm,
    Sight,
    Text,
    hiding,
    read_text,
    runs,
)
from wfm_core.models.transformer_config import TransformerConfig, frames_in_sight
from wfm_core.sampling import random_hidden
from wfm_core.world_model import Layout


def join_levels(indices: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Level indices (..., C) to one number (...) in [0, prod(levels)), the first dimension the least significant."""
    places = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=indices.device)
    return (indices.long() * places).sum(dim=-1)


def split_levels(words: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Invert `join_levels`: (...) to int64 (..., C)."""
    places = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=words.device)
    return words[..., None] // places % torch.tensor(levels, device=words.device)


class Transformer(nn.Module):
    """The decoder.

    Tokens are FSQ level indices (..., n, groups * C), n cells of all cameras; actions are physical (see
    `wfm_core.data.actions`). Inside, a frame is S tokens of P words each (see `to_words`), in S + 1 slots, the first
    the action's.
    """

    places: Tensor
    kinds: Tensor
    unreachable: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, num_out = config.width, config.num_parts * config.num_words
        self.embed_words = nn.Embedding(num_out, width)
        self.embed_kind = nn.Embedding(1 + config.num_cameras * config.groups, width)  # the first is the action's
        self.embed_action = ActionEmbedding(width)
        self.embed_no_action = nn.Embedding(1, width)
        if config.parallel:
            self.embed_masked = nn.Embedding(2, width)  # in a masked copy: what it shows, what it hides
        for embedding in (m for m in self.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(embedding.weight, std=0.02)
        self.embed_position = nn.Linear(width // 6 * 6, width, bias=False)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.blocks: Sequence[Block] = blocks  # ty: ignore[invalid-assignment]  # torch's stubs forget what it holds
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, num_out, bias=False)
        self.draft_heads = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_draft_heads))
        places, kinds = _slots(config)
        constants = {
            "places": places,
            "kinds": kinds,
            "unreachable": torch.arange(max(config.levels)) >= torch.tensor(config.levels)[:, None],
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed_no_action.weight.dtype

    @property
    def layout(self) -> Layout:
        """Of the tokens that it reads and writes."""
        return Layout((self.config.num_cameras, *self.config.grid), self.config.cell_levels)

    # --- tokens and actions ------------------------------------------------------------------------------------------

    def to_words(self, tokens: Tensor) -> Tensor:
        """Level indices (..., n, groups * C) to int64 words (..., S, P): P = C if factorised, else 1."""
        levels = tokens.long().unflatten(-1, (self.config.groups, -1)).flatten(-3, -2)
        return levels if self.config.factorised else join_levels(levels, self.config.levels)[..., None]

    def to_tokens(self, words: Tensor) -> Tensor:
        """Invert `to_words`; uint8."""
        levels = words if self.config.factorised else split_levels(words[..., 0], self.config.levels)
        return levels.unflatten(-2, (-1, self.config.groups)).flatten(-2).to(torch.uint8)

    def lead(self, action: Tensor) -> Tensor:
        """Embed physical actions (..., 7) as what leads to a frame, (..., D)."""
        return self.embed_action(action)

    def inputs(self, words: Tensor, lead: Tensor, slots: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Embed some slots of frames.

        Args:
            words: (..., Q, P) of each slot; those of slot 0 and hidden ones mean nothing.
            lead: (..., D) what led to the frame.
            slots: (Q,) or (..., Q) int64 in [0, S], 0 the action's.
            hidden: (..., Q) bool of a masked copy; None: not a copy.

        Returns:
            (..., Q, D).
        """
        tokens = self._embed(words)
        if hidden is not None:
            tokens = tokens * ~hidden[..., None] + self.embed_masked(hidden.long())
        x = torch.where((slots == 0)[..., None], lead[..., None, :], tokens)
        return x + self.embed_kind(self.kinds[slots])

    def _embed(self, words: Tensor) -> Tensor:
        """Sum of the embeddings of the parts of words (..., P), (..., D)."""
        if not self.config.factorised:
            return self.embed_words(words[..., 0])
        # As a product: looked up, every part of every word would have a vector of its own, and a gradient.
        chosen = F.one_hot(words, self.config.num_words).flatten(-2).to(self.dtype)
        return chosen @ self.embed_words.weight

    # --- network -----------------------------------------------------------------------------------------------------

    def sight(self, times: Tensor, slots: Tensor, pieces: Sequence[Piece]) -> Sight:
        """Describe a pass.

        Args:
            times: (B or 1, L) when each token's frame is, in frames at the native rate since the first.
            slots: (L,) or (B, L) of each token within its frame.
            pieces: which keys each token attends to.
        """
        places = self.places[slots].expand(*times.shape, 2).float()
        positions = torch.cat([times[..., None].float(), places], dim=-1)
        config = self.config
        cosines, sines = rotations(positions, config.head_dim, config.rope)
        waves = bounded_sinusoids(positions, config.width // 6 * 6, config.rope).to(self.dtype)
        return Sight(self.embed_position(waves), cosines[:, None], sines[:, None], pieces)

    def read(self, text: Tensor) -> Text:
        """Prepare text features (B, W, text_dim), all zero where there is no word, for the blocks.

        Raises:
            ValueError: the model reads no text.
        """
        if not self.config.text_dim:
            raise ValueError("text needs a model with text_dim above 0, got 0")
        return read_text(self.blocks, text, self.dtype)

    def run(
        self, x: Tensor, sight: Sight, text: Text | None, look: Callable[[int, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Map tokens x (B, L, D) to features (B, L, D).

        Args:
            x: embedded.
            sight: see there.
            text: see there.
            look: takes the number of a block and the tokens' own keys and values (B, 2, N', L, d) there to all that
                the tokens may attend to, (B, 2, N', M, d); None: there are none but their own.
        """
        for i, block in enumerate(self.blocks):
            heard = None if text is None else (text.layers[i], text.bias)
            x = block(x + sight.absolute, sight, heard, look and partial(look, i))
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Features (..., D) to logits (..., P, words), at least float32; levels that do not exist are -inf."""
        logits = self.head(features).unflatten(-1, (self.config.num_parts, self.config.num_words))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.masked_fill(self.unreachable, float("-inf")) if self.config.factorised else logits

    def draft(self, features: Tensor, distance: int) -> Tensor:
        """Features (..., D) of a token, turned to what predicts the token `distance` >= 1 after its next.

        Source: Cai et al., "Medusa" (ICML 2024), section 2.1.
        """
        return features + F.silu(self.draft_heads[distance - 1](features))

    def clip_features(
        self,
        words: Tensor,
        action: Tensor,
        *,
        masked: tuple[Tensor, Tensor] | None = None,
        text: Tensor | None = None,
        fps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run a whole clip.

        Args:
            words: (B, T, S, P) of its frames.
            action: (B, T - 1, 7) physical, between the frames.
            masked: of copies of the T' predicted frames, their words (B, T', S, P) and which of their tokens they do
                not show, (B, T', S) bool; None leaves copies out.
            text: (B, W, text_dim), or None.
            fps: (B,) frames a second; None is the native rate.

        Returns:
            Features that predict each token of the frames after the first, or of the only one if T is 1, (B, T', S, D),
            from all before it, and those of the copies, from earlier frames and what the copy shows, or None.
        """
        batch, time = words.shape[:2]
        given = min(1, time - 1)
        num_slots = self.config.frame_slots
        slots = torch.arange(num_slots, device=words.device)
        lead = torch.cat([self.embed_no_action.weight.expand(batch, 1, -1), self.lead(action)], dim=1)  # (B, T, D)
        x = self.inputs(F.pad(words, (0, 0, 1, 0)), lead, slots)
        frames = torch.arange(time, device=words.device)
        if masked is not None:
            copied, hidden = masked
            copies = self.inputs(F.pad(copied, (0, 0, 1, 0)), lead[:, given:], slots, F.pad(hidden, (1, 0)))
            x = torch.cat([x, copies], dim=1)
            frames = torch.cat([frames, frames[given:]])
        times = frames.repeat_interleave(num_slots)[None] * (1 if fps is None else NATIVE_FPS / fps[:, None])
        pieces = self._pieces_of_clip(time, 0 if masked is None else time - given)
        sight = self.sight(times, slots.repeat(len(frames)), pieces)
        read = None if text is None else self.read(text)
        features = self.run(x.flatten(1, 2), sight, read).unflatten(1, (-1, num_slots))
        return features[:, given:time, :-1], None if masked is None else features[:, time:, 1:]

    def _pieces_of_clip(self, num_clean: int, num_copies: int) -> list[Piece]:
        """What each frame of a clip attends to, and then each copy, which are those of the last frames."""
        num_slots = self.config.frame_slots
        order = torch.arange(num_slots, device=self.places.device)
        causal = hiding(order[:, None] >= order, self.dtype)
        pieces = []
        for i in range(num_clean + num_copies):
            is_copy = i >= num_clean
            frames = [*frames_in_sight(i - num_copies if is_copy else i, self.config.window), i]
            bias = None if is_copy else F.pad(causal, ((len(frames) - 1) * num_slots, 0))[None, None]
            pieces.append(Piece(num_slots, runs(frames, num_slots), bias))
        return pieces

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `tokens` (B, T, n, groups * C) uint8 of consecutive frames, or of single ones (T = 1), which are then
                told from the text; `action` (B, T, 7), sent after each; `seed`, int64 scalar for what is random; and,
                if wanted, `text` (B, W, text_dim) and `fps` (B,).

        Raises:
            ValueError: the clip is longer than the rotary positions cover.
        """
        config, tokens, fps = self.config, batch["tokens"], batch.get("fps")
        config.rope.check_span(tokens.shape[1], fps)
        seen, hidden = self._draw(tokens, batch["seed"])
        words = self.to_words(tokens)
        given = min(1, words.shape[1] - 1)
        target = words[:, given:]
        features, copies = self.clip_features(
            self.to_words(seen),
            batch["action"][:, :-1],
            masked=None if hidden is None else (target, hidden),
            text=batch.get("text"),
            fps=fps,
        )
        logits = self.logits(features)
        nll, square = nll_and_square(logits, target)
        loss = (1 - config.parallel) * (nll + config.z_loss * square).mean()
        with torch.no_grad():
            before = words[:, :-1] if given else torch.full_like(target, -1)
            changed = (target != before).any(dim=-1, keepdim=True)
            hits = ((logits.argmax(dim=-1) == target) & changed).sum()
            accuracy = hits / (changed.sum() * config.num_parts).clamp(min=1)
        metrics = {"nll": nll.mean().detach(), "changed_accuracy": accuracy}
        for k in range(1, config.num_draft_heads + 1):
            nll, _ = nll_and_square(self.logits(self.draft(features[:, :, :-k], k)), target[:, :, k:])
            loss = loss + config.draft_weight * config.draft_decay ** (k - 1) * nll.mean()
            metrics[f"draft{k}_nll"] = nll.mean().detach()
        if copies is not None and hidden is not None:
            nll, square = nll_and_square(self.logits(copies), target)
            num_hidden = hidden.sum().clamp(min=1)
            loss = loss + config.parallel * ((nll + config.z_loss * square) * hidden).sum() / num_hidden
            metrics["masked_nll"] = (nll * hidden).sum().detach() / num_hidden
        return loss, metrics

    # A generator is new in every step: one that reached compiled code would have it compiled anew in every step.
    @torch.compiler.disable(recursive=False)
    def _draw(self, tokens: Tensor, seed: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is random in a step: the context as shown (B, T, n, groups * C), the predicted frames' hidden tokens."""
        generator = torch.Generator(device=tokens.device).manual_seed(int(seed))
        seen = self._corrupt(tokens.long(), generator)
        if not self.config.parallel:
            return seen, None
        shape = (tokens.shape[0], max(1, tokens.shape[1] - 1))
        return seen, random_hidden(shape, self.config.frame_tokens, generator, tokens.device)

    def _corrupt(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Move some levels of (B, T, n, groups * C) up or down by one, but in the first frame, which is always real."""
        batch, time = tokens.shape[:2]
        draws = torch.rand(2, *tokens.shape, generator=generator, device=tokens.device)
        rate = torch.rand(batch, time, 1, 1, generator=generator, device=tokens.device) * self.config.corruption
        shift = torch.where(draws[0] < rate, torch.where(draws[1] < 0.5, -1, 1), 0)
        top = torch.tensor(self.config.cell_levels, device=tokens.device) - 1
        return torch.cat([tokens[:, :1], (tokens + shift).clamp(min=0).minimum(top)[:, 1:]], dim=1)


def nll_and_square(logits: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and the square of the logarithm of the softmax's normaliser, the z-loss.

    Args:
        logits: (..., P, words).
        words: (..., P) int64.

    Returns:
        Two tensors (...), each the mean over the parts.

    Source: Chowdhery et al., "PaLM" (JMLR 2023), section 5, for the z-loss.
    """
    normaliser = logits.logsumexp(dim=-1)
    picked = logits.gather(-1, words[..., None]).squeeze(-1)
    return (normaliser - picked).mean(dim=-1), normaliser.square().mean(dim=-1)


def _slots(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Row and column (L, 2) and kind (L,) of a frame's slots: kind 0 is the action's, then one a camera and group."""
    sizes = (config.num_cameras, *config.grid, config.groups)
    camera, row, column, group = (x.flatten() for x in torch.meshgrid(*map(torch.arange, sizes), indexing="ij"))
    places = torch.stack([row, column], dim=-1)
    return F.pad(places, (0, 0, 1, 0)), F.pad(1 + camera * config.groups + group, (1, 0))
