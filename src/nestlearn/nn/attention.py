"""Causal softmax attention with rotary positions: the token mixer of Hope-Attention and of the baseline.

Shapes: B rows, T new tokens, S cached slots, H heads, d channels a head, D = H d channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.nn.lengths import counted


@dataclass
class AttentionState:
    """The keys and values of every token so far, or of a window; dimension 0 of each tensor is the batch.

    Keys are already rotated, in a window not yet.

    ``valid`` says which slots hold a token of the row and which only fill it up; None if all do.
    """

    keys: Float[Tensor, "B H S d"]
    values: Float[Tensor, "B H S d"]
    valid: Bool[Tensor, "B S"] | None = None

    def index_select(self, rows: Int[Tensor, " rows"]) -> AttentionState:
        """The state of the given rows, in that order."""
        valid = None if self.valid is None else self.valid.index_select(0, rows)
        return AttentionState(self.keys.index_select(0, rows), self.values.index_select(0, rows), valid)

    def detach(self) -> AttentionState:
        """The same values, cut from the graph that made them."""
        return AttentionState(self.keys.detach(), self.values.detach(), self.valid)


class CausalAttention(nn.Module):
    """Multi-head causal softmax attention (Eq. 62, 63) with RoPE, bias-free, in Llama's conventions.

    Args:
        dim: channels D.
        heads: heads H; each has D / H channels, an even number.
        rope_theta: base of the rotary wavelengths, which run from 2 pi tokens to about 2 pi theta tokens.
        window: how many tokens a query sees, itself included (Eq. 63); None means all before it. The state then
            holds no more than that.

    Raises:
        UserError: ``dim`` does not split into ``heads`` of even width, or a window below 1.

    >>> attention = CausalAttention(8, heads=2)
    >>> attention(torch.randn(2, 5, 8))[0].shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, rope_theta: float = 10_000.0, window: int | None = None) -> None:
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 2:
            raise UserError(f"attention of dim={dim} with heads={heads}: dim / heads must be an even integer")
        if window is not None and window < 1:
            raise UserError(f"attention with window={window}: must be at least 1 token, or None for all")
        self.heads, self.rope_theta, self.window = heads, rope_theta, window
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        state: AttentionState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], AttentionState]:
        """Attend from the new tokens to themselves, causally, and to the cached ones.

        Args:
            x_BTD: the new tokens, the valid ones of every row first.
            state: the tokens before them; None at the start of a sequence.
            lengths: how many leading columns of each row are valid; None if all are. Outputs of the other
                columns are finite and meaningless.

        Returns:
            The output and the state that continues the sequence in the next call.

        Raises:
            UserError: a state of another layer, or ``lengths`` that are not one number from 0 to T per row.
        """
        B, T, D = x_BTD.shape
        x_BTD = counted(x_BTD, lengths)
        if state is not None and not isinstance(state, AttentionState):
            raise UserError(f"the state is a {type(state).__name__}: give what an earlier call returned, or None")

        def split(y_BTD: Tensor) -> Tensor:
            return y_BTD.view(B, T, self.heads, D // self.heads).transpose(1, 2)

        q_BHTd, k_BHTd, v_BHTd = (split(layer(x_BTD)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.window is None:
            y_BHTd, state = attend(q_BHTd, k_BHTd, v_BHTd, state, lengths, self.rope_theta)
        else:
            y_BHTd, state = attend_within(self.window, q_BHTd, k_BHTd, v_BHTd, state, lengths, self.rope_theta)
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, D)), state


def attend(
    q_BHTd: Float[Tensor, "B H T d"],
    k_BHTd: Float[Tensor, "B H T d"],
    v_BHTd: Float[Tensor, "B H T d"],
    state: AttentionState | None,
    lengths: Int[Tensor, " B"] | None,
    theta: float,
) -> tuple[Float[Tensor, "B H T d"], AttentionState]:
    """Softmax attention (Eq. 62) from new queries to new and cached keys, causally, with rotary positions."""
    B, _, T, _ = q_BHTd.shape
    S = 0 if state is None else state.keys.shape[2]
    past_valid = None if state is None else state.valid
    columns = torch.arange(T, device=q_BHTd.device)
    # A row's next position is the number of its valid tokens so far, so filler moves nothing.
    positions = S + columns if past_valid is None else past_valid.sum(1, keepdim=True) + columns

    q_BHTd, k_BHSd, v_BHSd = rotate(q_BHTd, positions, theta), rotate(k_BHTd, positions, theta), v_BHTd
    if state is not None:
        k_BHSd = torch.cat([state.keys, k_BHSd.to(state.keys.dtype)], dim=2)
        v_BHSd = torch.cat([state.values, v_BHSd.to(state.values.dtype)], dim=2)

    mask = None
    # Among the new columns causality alone is enough: valid ones come first, so none of them sees filler.
    # Every query sees itself, so no row of the softmax is empty.
    if S and (T > 1 or past_valid is not None):
        causal = columns[:, None] >= columns
        if past_valid is None:
            mask = F.pad(causal, (S, 0), value=True)
        else:
            past = past_valid[:, None, None].expand(B, 1, T, S)
            mask = torch.cat([past, causal.expand(B, 1, T, T)], dim=-1)
    y_BHTd = F.scaled_dot_product_attention(
        q_BHTd.to(k_BHSd.dtype), k_BHSd, v_BHSd, attn_mask=mask, is_causal=S == 0 and T > 1
    )
    valid = past_valid
    if valid is not None or lengths is not None:
        valid = torch.ones(B, S, dtype=torch.bool, device=columns.device) if valid is None else valid
        valid = torch.cat([valid, _counted(columns, B, lengths)], dim=1)
    return y_BHTd, AttentionState(k_BHSd, v_BHSd, valid)


def attend_within(
    window: int,
    q_BHTd: Float[Tensor, "B H T d"],
    k_BHTd: Float[Tensor, "B H T d"],
    v_BHTd: Float[Tensor, "B H T d"],
    state: AttentionState | None,
    lengths: Int[Tensor, " B"] | None,
    theta: float,
) -> tuple[Float[Tensor, "B H T d"], AttentionState]:
    """:func:`attend` over the last ``window`` tokens, a query's own included (Eq. 63).

    The state holds at most ``window - 1`` tokens of each row, the newest last, and their keys before rotation:
    positions count from the oldest token kept, so they never grow. Long pieces are read in parts of a few windows.
    """
    outputs = []
    size = max(4 * window, 256)
    for i in range(0, max(q_BHTd.shape[2], 1), size):
        q, k, v = (t[:, :, i : i + size] for t in (q_BHTd, k_BHTd, v_BHTd))
        counts = None if lengths is None else (lengths - i).clamp(0, min(size, q_BHTd.shape[2] - i))
        y_BHTd, state = _part_within(window, q, k, v, state, counts, theta)
        outputs.append(y_BHTd)
    assert state is not None
    return torch.cat(outputs, dim=2), state


def _part_within(
    window: int,
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    v_BHTd: Tensor,
    state: AttentionState | None,
    lengths: Tensor | None,
    theta: float,
) -> tuple[Tensor, AttentionState]:
    B, _, T, _ = q_BHTd.shape
    S, valid = (0, None) if state is None else (state.keys.shape[2], state.valid)
    if state is not None:
        k_BHTd = torch.cat([state.keys, k_BHTd.to(state.keys.dtype)], dim=2)
        v_BHTd = torch.cat([state.values, v_BHTd.to(state.values.dtype)], dim=2)
    slots = torch.arange(S + T, device=q_BHTd.device)
    queries = slots[S:]
    behind = queries[:, None] - slots
    mask = (behind >= 0) & (behind < window)
    if valid is not None:
        mask = mask & F.pad(valid, (0, T), value=True)[:, None, None]
    q_BHTd, rotated = rotate(q_BHTd, queries, theta), rotate(k_BHTd, slots, theta)
    y_BHTd = F.scaled_dot_product_attention(q_BHTd.to(rotated.dtype), rotated, v_BHTd, attn_mask=mask)

    kept = min(window - 1, S + T)
    if lengths is None and valid is None:
        # Copies, so that the state does not keep the piece alive.
        return y_BHTd, AttentionState(k_BHTd[:, :, S + T - kept :].clone(), v_BHTd[:, :, S + T - kept :].clone())
    new = torch.full((B,), T, device=slots.device) if lengths is None else lengths.to(slots.device)
    valid = torch.ones(B, S, dtype=torch.bool, device=slots.device) if valid is None else valid
    valid = torch.cat([valid, _counted(slots[:T], B, lengths)], dim=1)
    # Row i ends at slot S + lengths[i]; where it has fewer tokens than are kept, the front stays empty.
    rows = (S + new)[:, None] - kept + slots[:kept]
    valid = valid.gather(1, rows.clamp_min(0)) & (rows >= 0)
    index = rows.clamp_min(0)[:, None, :, None]
    keys, values = (t.gather(2, index.expand(*t.shape[:2], kept, t.shape[3])) for t in (k_BHTd, v_BHTd))
    return y_BHTd, AttentionState(keys, values, valid)


def _counted(columns: Tensor, rows: int, lengths: Tensor | None) -> Tensor:
    """Which of the new ``columns`` (T,) count in each of the rows, (B, T)."""
    if lengths is None:
        return columns.new_ones(rows, len(columns), dtype=torch.bool)
    return columns < lengths[:, None].to(columns.device)


def rotate(x_BHTd: Float[Tensor, "B H T d"], positions: Int[Tensor, "... T"], theta: float) -> Tensor:
    """Rotary positions: channels i and i + d/2 turn by ``position * theta ** (-2i/d)`` radians (as in Llama).

    Args:
        x_BHTd: queries or keys.
        positions: in tokens, of shape (T,) for all rows or (B, T).
        theta: base of the wavelengths.
    """
    d = x_BHTd.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, d, 2, device=x_BHTd.device, dtype=torch.float32) / d)
    angle = positions[..., None].float() * frequency
    if angle.ndim == 3:
        angle = angle[:, None]  # (B, 1, T, d/2), the same for every head
    cos, sin = angle.cos().to(x_BHTd.dtype), angle.sin().to(x_BHTd.dtype)
    first, second = x_BHTd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
