"""Generation with the autoregressive network: a frame's tokens at once, or the surest first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wfm_core.models.autoregressive import Autoregressive
from wfm_core.models.blocks import TimeBlock
from wfm_core.models.motion import Contact, is_blocked
from wfm_core.models.text import pooled
from wfm_core.sampling import choose, reveal_counts, row_uniform
from wfm_core.world_model import ModelState

CONTACT_DRAW = 1023
"""Index of the draw that decides contact; refinement draws come below."""


class AutoregressiveModel(Autoregressive):
    """An `Autoregressive` that generates; its state is a value (see `wfm_core.world_model.ModelState`)."""

    def start(self, tokens: Tensor, actions: Tensor, seeds: Sequence[int], text: Tensor | None = None) -> ModelState:
        """Prefill the context: tokens (B, T, n, C), actions (B, T - 1, A) between the frames, B row seeds.

        A model that reads may be given `text` (B, W, text_dim). One that is told from where frames are seen looks for
        `state["rays"]` (B, n, RAYS_DIM), from `rays_ahead`, which the caller puts there; until then
        it is told nothing.
        """
        batch, time = tokens.shape[:2]
        space = self.config.actions
        heads, window = self.config.num_heads, self.config.window
        cache_shape = (batch, 2, self.num_patches, heads, self.config.width // heads)
        device, dtype = tokens.device, self.position.dtype
        state: ModelState = {
            f"cache{i}.{k}": torch.zeros(cache_shape, device=device, dtype=dtype)
            for i in self.config.time_layers
            for k in range(window)
        }
        state |= {
            "tokens": tokens[:, 0].to(torch.uint8),
            "contact": torch.full((batch,), Contact.UNKNOWN, device=device),
            "next_contact": torch.full((batch,), Contact.UNKNOWN, device=device),  # a caller may say what comes
            "previous_action": torch.full((batch, space.dim), float("nan"), device=device),  # nan: there was none
            "travel": torch.zeros(batch, space.travel_dim, device=device),
            "count": torch.zeros(batch, dtype=torch.int64, device=device),
            "seed": torch.as_tensor(list(seeds), dtype=torch.int64, device=device),
            "step": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        if text is not None and self.config.text_dim:
            state["text"] = pooled(text)
        for t in range(time - 1):
            state, _ = self._trunk_step(state, actions[:, t], self.one_hot(state["tokens"]))
            state["tokens"] = tokens[:, t + 1].to(torch.uint8)
            state["travel"] = state["travel"] + self._moves(actions[:, t])
        return state

    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """Predict the next frame: physical action (B, A) to the next state and the uncertainty (B,) in [0, 1].

        The new frame's tokens are `state["tokens"]`, its contact is `state["contact"]`: drawn, or else what the caller
        put into `state["next_contact"]`. The uncertainty is one less the geometric mean probability of the tokens
        chosen when nothing of the frame is known yet, averaged over cells.
        """
        counts = reveal_counts(self.num_cells * self.config.groups, self.config.refine_steps)
        return self._step(state, action, counts)

    def step_token_by_token(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """As `step`, but a cell's worth of tokens a pass: the reference for what parallel decoding gains."""
        return self._step(state, action, [self.config.groups] * self.num_cells)

    def _step(self, state: ModelState, action: Tensor, counts: list[int]) -> tuple[ModelState, Tensor]:
        """As `step`; `counts[i]` tokens are revealed at refinement step i."""
        current = self.one_hot(state["tokens"])
        state, features = self._trunk_step(state, action, current)
        uniform = row_uniform(state["seed"], state["step"], CONTACT_DRAW, 1)[:, 0]
        drawn = choose(self.contact_logits(features), self.config.contact_temperature, uniform)
        told = state["next_contact"]
        state["contact"] = torch.where(told == Contact.UNKNOWN, drawn, told)
        went = ~is_blocked(state["contact"])[:, None]
        state["travel"] = state["travel"] + self._moves(action) * went
        state["next_contact"] = torch.full_like(told, Contact.UNKNOWN)
        tokens, uncertainty = self._reveal(self.tell(features, state["contact"]), current, state, counts)
        return {**state, "tokens": tokens, "step": state["step"] + 1}, uncertainty

    def _moves(self, action: Tensor) -> Tensor:
        """The steps in an action (B, A), (B, P), none where it is not known."""
        return action[:, : self.config.actions.travel_dim].nan_to_num()

    def _trunk_step(self, state: ModelState, action: Tensor, current: Tensor) -> tuple[ModelState, Tensor]:
        """Commit the current frame and its action to the caches; returns features (B, p, D)."""
        before = state["previous_action"]
        still = torch.cat([torch.zeros_like(state["travel"]), action[:, self.config.actions.travel_dim :]], dim=1)
        previous = torch.where(before.isnan(), still, before)  # nothing came before
        rays = state["rays"][:, None] if "rays" in state else None
        told = self.told(state.get("text"), rays)
        x = self.input_features(
            *(each[:, None] for each in (current, action, previous, state["travel"], state["contact"])), told
        )
        count = state["count"]
        # A clone, because the caller may write its next action into the same memory.
        state = {**state, "previous_action": action.clone(), "count": count + 1}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, TimeBlock):
                names = [f"cache{i}.{k}" for k in range(self.config.window)]
                x, cache = layer.step(x, [state[name] for name in names], count)
                state |= zip(names, cache, strict=True)
            else:
                x = layer(x)
        return state, x[:, 0]

    def _reveal(self, features: Tensor, current: Tensor, state: ModelState, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Choose the next frame's tokens, `counts[i]` (cell, group) tokens at refinement step i, the surest first."""
        batch = features.shape[0]
        groups, per_group = self.config.groups, self.num_dims // self.config.groups
        hidden = torch.ones(batch, self.num_cells, groups, dtype=torch.bool, device=features.device)
        tokens = torch.zeros(batch, self.num_cells, self.num_dims, dtype=torch.int64, device=features.device)
        known = torch.zeros_like(current)
        uncertainty = torch.zeros(batch, device=features.device)
        for draw, count in enumerate(counts):
            logits = self.refine(features, current, known, hidden).float()
            uniform = None
            if self.config.temperature > 0:
                uniform = row_uniform(state["seed"], state["step"], draw, tokens[0].numel()).view(tokens.shape)
            proposal = choose(logits, self.config.temperature, uniform)
            last = draw == len(counts) - 1
            if draw == 0 or not last:
                log_p = logits.log_softmax(dim=-1).gather(-1, proposal[..., None]).squeeze(-1)
                confidence = log_p.unflatten(-1, (groups, per_group)).mean(dim=-1)  # (B, n, groups)
            if draw == 0:
                uncertainty = 1 - confidence.exp().mean(dim=(1, 2))
            if last:
                reveal = hidden
            else:
                ranked = confidence.masked_fill(~hidden, float("-inf")).flatten(1)
                chosen = ranked.topk(count, dim=1).indices
                reveal = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, chosen, True).view_as(hidden)
            tokens = torch.where(reveal.repeat_interleave(per_group, dim=-1), proposal, tokens)
            hidden = hidden & ~reveal
            if not last:
                dims_known = ~hidden.repeat_interleave(per_group, dim=-1)
                known = (self.one_hot(tokens).unflatten(-1, (self.num_dims, -1)) * dims_known[..., None]).flatten(-2)
        return tokens.to(torch.uint8), uncertainty
