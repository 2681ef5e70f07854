"""Generation with the Llama-style decoder: token by token, token by token with drafts, or whole frames at once.

All three fill a frame against the cached keys and values of the frames in sight. Without drafts a pass takes one token
and gives the next; with K drafts it takes the next and K guesses beyond, and goes on after the last right guess, each
row at its own pace. As a sampled token is a function of its logits and of a number of its own, a guess is right when
it is the very token that would have been sampled: what comes out is what comes out without drafts (up to rounding, for
passes of another length add up in another order). Decoded at once, a frame is known only when its last pass is over; it
waits in the state, and its keys and values are made in the first pass of the next frame.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wfm_core.models.frame_cache import append, empty_cache, in_sight, in_sight_after
from wfm_core.models.positions import NATIVE_FPS
from wfm_core.models.transformer import Transformer
from wfm_core.models.transformer_blocks import Piece, Text, hiding, keys_then_values, text_entries, text_in
from wfm_core.sampling import choose, reveal_counts, row_uniform
from wfm_core.world_model import ModelState


class Waiting(NamedTuple):
    """A frame whose keys and values are still to be made; those of a `Canvas` have room for them.

    Attributes:
        words: (B, L, P) of its slots.
        lead: (B, D) what led to it.
        times: (B, 1) when it is.
        seen: (B, M - L) bool, which of the cached slots are in its sight.
    """

    words: Tensor
    lead: Tensor
    times: Tensor
    seen: Tensor


class Canvas(NamedTuple):
    """Working memory while one frame is filled; `memory` is written in place.

    Attributes:
        lead: (B, D) what led to the frame.
        times: (B, 1) when the frame is, in frames at the native rate.
        seen: (B, M) bool, which of the slots of earlier frames are in sight.
        memory: of each block, keys and values (B, 2, N', M + slots, d): earlier frames' ones, then the frame's own.
        text: see there.
        waiting: the frame before, the last of the M, if it is not in the cache yet.
    """

    lead: Tensor
    times: Tensor
    seen: Tensor
    memory: list[Tensor]
    text: Text | None
    waiting: Waiting | None


class TransformerModel(Transformer):
    """A `Transformer` that generates; its state is a value (see `wfm_core.world_model.ModelState`).

    The state holds the keys and values of the first frame and of the last window - 1 frames, however long the rollout.
    Where frames are decoded at once the last frame waits, and its "lead" with it.
    """

    @torch.no_grad()
    def start(
        self,
        tokens: Tensor,
        actions: Tensor,
        seeds: Sequence[int],
        *,
        text: Tensor | None = None,
        fps: float = NATIVE_FPS,
    ) -> ModelState:
        """Prefill the context.

        Args:
            tokens: (B, T, n, groups * C) level indices of T >= 1 frames.
            actions: (B, T - 1, 7) physical, between them.
            seeds: B ints; a row's samples depend on its own only.
            text: (B, W, text_dim) features, zero where there is no word; None: no text.
            fps: frames a second.

        Raises:
            ValueError: there is text, but the model reads none; or fps is not positive.
        """
        config, batch = self.config, tokens.shape[0]
        like = self.embed_no_action.weight
        state = empty_cache(config, config.num_kv_heads, config.frame_slots, seeds, fps, like)
        if text is not None:
            state |= text_entries(self.read(text))
        for t in range(tokens.shape[1]):
            lead = self.lead(actions[:, t - 1]) if t else self.embed_no_action.weight.repeat(batch, 1)
            state = self._settled(state) | {"tokens": tokens[:, t].to(torch.uint8, copy=True), "lead": lead}
        return state if config.decoding == "parallel" else self._settled(state)

    @torch.no_grad()
    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """Predict the next frame: physical action (B, 7) to the next state and the uncertainty (B,) in [0, 1].

        The new frame's tokens are `state["tokens"]` (B, n, groups * C) uint8. The uncertainty is one less the geometric
        mean probability of a token's words, averaged over tokens: each when it was chosen, or, of a frame decoded in
        parallel, when nothing of the frame was known.
        """
        return self._step(state, action, self.config.decoding)

    @torch.no_grad()
    def step_token_by_token(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """As `step`, in raster order without drafts: the reference for what the other ways gain."""
        return self._step(state, action, "raster")

    def _step(self, state: ModelState, action: Tensor, decoding: str) -> tuple[ModelState, Tensor]:
        lead = self.lead(action)
        if decoding == "parallel":
            canvas = self._open(state, lead)
            words, uncertainty = self._fill_at_once(state, canvas)
            if canvas.waiting is not None:
                state = self._commit(state, canvas, canvas.seen.shape[1] - self.config.frame_slots)
            state = {**state, "lead": lead}
        else:
            state = self._settled(state)
            num_drafts = self.config.num_draft_heads if decoding == "speculative" else 0
            canvas = self._open(state, lead, num_drafts)
            words, uncertainty = self._fill_in_order(state, canvas, num_drafts)
            state = self._commit(state, canvas, canvas.seen.shape[1])
        return {**state, "tokens": self.to_tokens(words), "step": state["step"] + 1}, uncertainty

    # --- the cache ---------------------------------------------------------------------------------------------------

    def _settled(self, state: ModelState) -> ModelState:
        """The state once no frame waits."""
        if "lead" not in state:
            return state
        rest = {name: value for name, value in state.items() if name != "lead"}
        canvas = self._open(rest, state["lead"])
        words = self._with_action_slot(self.to_words(state["tokens"]))
        self._pass(canvas, words, self._all_slots(words))
        return self._commit(rest, canvas, canvas.seen.shape[1])

    def _open(self, state: ModelState, lead: Tensor, num_drafts: int = 0) -> Canvas:
        """Lay out what the next frame may see. Its own slots are followed by some for drafts beyond its end."""
        config, text = self.config, text_in(state, self.config.num_layers)
        waits = "lead" in state
        times, seen, layers = in_sight(state, config, ahead=2 if waits else 1)
        room = config.frame_slots + 1 + num_drafts + (config.frame_slots if waits else 0)
        memory = []
        for parts in layers:
            own = parts[0].new_zeros(*parts[0].shape[:3], room, config.head_dim)
            memory.append(keys_then_values([*parts, own]))
        if not waits:
            return Canvas(lead, times, seen, memory, text, None)
        words = self._with_action_slot(self.to_words(state["tokens"]))
        waiting = Waiting(words, state["lead"], times, seen)
        seen, sees_it = in_sight_after(state, config)
        seen = torch.cat([seen, sees_it[:, None].expand(-1, config.frame_slots)], dim=1)
        return Canvas(lead, times + (NATIVE_FPS / state["fps"])[:, None], seen, memory, text, waiting)

    def _pass(
        self, canvas: Canvas, words: Tensor, slots: Tensor, hidden: Tensor | None = None, waiting: Waiting | None = None
    ) -> Tensor:
        """Run some slots of the frame and write their keys and values; those after slot S are for nobody's eyes.

        Args:
            canvas: see there.
            words: (B, Q, P).
            slots: (B, Q), increasing.
            hidden: (B, L) bool if this is a masked copy, which sees itself whole; Q is L then.
            waiting: the canvas's, whose keys and values are made first; None: there is none, or they are made.

        Returns:
            Features (B, Q, D).
        """
        first, num_slots = canvas.seen.shape[1], slots.shape[1]
        own = torch.arange(canvas.memory[0].shape[3] - first, device=slots.device)
        within = own <= slots[..., None] if hidden is None else (own < num_slots).expand(*slots.shape, -1)
        places, written = slots.clamp(max=self.config.frame_tokens), first + slots
        times = canvas.times.expand(slots.shape)
        x = self.inputs(words, canvas.lead, places, hidden)
        pieces = [Piece(num_slots, [slice(None)], self._bias(canvas.seen, within))]
        if waiting is not None:
            before = self._all_slots(words)
            causal = before[..., None] >= before[:, None]
            pieces.insert(0, Piece(before.shape[1], [slice(0, first)], self._bias(waiting.seen, causal)))
            x = torch.cat([self.inputs(waiting.words, waiting.lead, before), x], dim=1)
            places = torch.cat([before, places], dim=1)
            times = torch.cat([waiting.times.expand(before.shape), times], dim=1)
            written = torch.cat([first - before.shape[1] + before, written], dim=1)
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]

        def look(i: int, own: Tensor) -> Tensor:
            memory = canvas.memory[i]
            memory.permute(0, 3, 1, 2, 4)[rows, written] = own.permute(0, 3, 1, 2, 4)
            return memory

        return self.run(x, self.sight(times, places, pieces), canvas.text, look)[:, -num_slots:]

    def _bias(self, seen: Tensor, within: Tensor) -> Tensor:
        """Of earlier frames' slots, (B, M) bool, and of those of the frame itself, (B, Q, m) bool: (B, 1, Q, M + m)."""
        visible = torch.cat([seen[:, None].expand(-1, within.shape[1], -1), within], dim=-1)
        return hiding(visible, self.dtype)[:, None]

    def _commit(self, state: ModelState, canvas: Canvas, first: int) -> ModelState:
        """Append to the cache the keys and values of the frame that begins at slot `first` of the memory."""
        kept = slice(first, first + self.config.frame_slots)
        return append(state, self.config, [memory[:, :, :, kept].clone() for memory in canvas.memory])

    # --- filling a frame ---------------------------------------------------------------------------------------------

    def _fill_in_order(self, state: ModelState, canvas: Canvas, num_drafts: int) -> tuple[Tensor, Tensor]:
        """Fill the frame in raster order: words (B, S, P) and the uncertainty (B,)."""
        config, device = self.config, canvas.lead.device
        batch, num_slots = canvas.lead.shape[0], config.frame_slots
        # Slot 0 is the action's. The first guesses are the tokens of the frame before. Guesses may go beyond the frame;
        # they end up in slots that are cut off.
        words = F.pad(self.to_words(state["tokens"]), (0, 0, 1, num_drafts + 2))
        certainty = torch.zeros(words.shape[:2], device=device)
        ahead = torch.arange(num_drafts + 1, device=device)
        done = torch.zeros(batch, dtype=torch.int64, device=device)  # slots whose words, keys and values are final
        while bool((done < num_slots).any()):
            slots = done[:, None] + ahead
            given = _take(words, slots)
            features = self._pass(canvas, given, slots)
            logits = self.logits(features)
            chosen = self._choose(state, logits, slots)
            words = _put(words, slots + 1, chosen)
            certainty = certainty.scatter(1, slots + 1, _confidence(logits, chosen).exp().to(certainty.dtype))
            right = (given[:, 1:] == chosen[:, :-1]).all(dim=-1).long().cumprod(dim=1).sum(dim=1)
            done = (done + 1 + right).clamp(max=num_slots)
            last = _take(features, right[:, None])
            for k in range(1, num_drafts + 1):
                slot = done[:, None] + k
                words = _put(words, slot, self._choose(state, self.logits(self.draft(last, k)), slot - 1))
        return words[:, 1:num_slots], 1 - certainty[:, 1:num_slots].mean(dim=1)

    def _fill_at_once(self, state: ModelState, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """Fill the frame in `refine_steps` passes, the surest tokens first: words (B, S, P), uncertainty (B,)."""
        config, device = self.config, canvas.lead.device
        batch, num_tokens = canvas.lead.shape[0], config.frame_tokens
        words = torch.zeros(batch, num_tokens, config.num_parts, dtype=torch.int64, device=device)
        hidden = torch.ones(batch, num_tokens, dtype=torch.bool, device=device)
        uncertainty = torch.zeros(batch, device=device)
        slots = self._all_slots(words)
        for draw, count in enumerate(reveal_counts(num_tokens, config.refine_steps)):
            waiting = canvas.waiting if draw == 0 else None
            features = self._pass(canvas, self._with_action_slot(words), slots, F.pad(hidden, (1, 0)), waiting)
            logits = self.logits(features[:, 1:])
            proposal = self._choose(state, logits, slots[:, :-1], draw)
            confidence = _confidence(logits, proposal)
            if draw == 0:
                uncertainty = 1 - confidence.exp().mean(dim=1)
            surest = confidence.masked_fill(~hidden, float("-inf")).topk(count, dim=1).indices
            reveal = torch.zeros_like(hidden).scatter(1, surest, True)
            words = torch.where(reveal[..., None], proposal, words)
            hidden = hidden & ~reveal
        return words, uncertainty

    def _choose(self, state: ModelState, logits: Tensor, tokens: Tensor, draw: int = 0) -> Tensor:
        """Choose words (B, Q, P) for the tokens (B, Q) of a frame, each by its own random number."""
        config = self.config
        if config.temperature == 0:
            return choose(logits, 0.0, None)
        numbers = row_uniform(state["seed"], state["step"], draw, config.frame_tokens * config.num_parts)
        numbers = numbers.unflatten(1, (config.frame_tokens, config.num_parts))
        mine = _take(numbers, tokens.clamp(max=config.frame_tokens - 1))
        return choose(logits, config.temperature, mine, config.top_p)

    def _with_action_slot(self, words: Tensor) -> Tensor:
        """(..., S, P) to (..., L, P)."""
        return F.pad(words, (0, 0, 1, 0))

    def _all_slots(self, words: Tensor) -> Tensor:
        """Every slot of a frame, (B, L), for words (B, ...)."""
        return torch.arange(self.config.frame_slots, device=words.device).expand(words.shape[0], -1)


def _take(x: Tensor, where: Tensor) -> Tensor:
    """Entries (B, Q, P) of x (B, M, P) at (B, Q)."""
    return x.gather(1, where[..., None].expand(-1, -1, x.shape[-1]))


def _put(x: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """A copy of x (B, M, P) with values (B, Q, P) at (B, Q)."""
    return x.scatter(1, where[..., None].expand_as(values), values)


def _confidence(logits: Tensor, words: Tensor) -> Tensor:
    """Mean log-probability (...) of a token's words (..., P)."""
    return logits.log_softmax(dim=-1).gather(-1, words[..., None]).squeeze(-1).mean(dim=-1)
