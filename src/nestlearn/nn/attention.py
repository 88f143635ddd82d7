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


@dataclass
class AttentionState:
    """The keys (already rotated) and values of every token so far; dimension 0 of each tensor is the batch.

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
    """Multi-head causal softmax attention (Eq. 62) with RoPE, bias-free, in Llama's conventions.

    Args:
        dim: channels D.
        heads: heads H; each has D / H channels, an even number.
        rope_theta: base of the rotary wavelengths, which run from 2 pi tokens to about 2 pi theta tokens.

    Raises:
        UserError: ``dim`` does not split into ``heads`` of even width.

    >>> attention = CausalAttention(8, heads=2)
    >>> attention(torch.randn(2, 5, 8))[0].shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, rope_theta: float = 10_000.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 2:
            raise UserError(f"attention of dim={dim} with heads={heads}: dim / heads must be an even integer")
        self.heads, self.rope_theta = heads, rope_theta
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
        """
        B, T, D = x_BTD.shape
        S = 0 if state is None else state.keys.shape[2]
        past_valid = None if state is None else state.valid
        columns = torch.arange(T, device=x_BTD.device)
        # A row's next position is the number of its valid tokens so far, so filler moves nothing.
        positions = S + columns if past_valid is None else past_valid.sum(1, keepdim=True) + columns

        def split(y_BTD: Tensor) -> Tensor:
            return y_BTD.view(B, T, self.heads, D // self.heads).transpose(1, 2)

        q_BHTd = rotate(split(self.q_proj(x_BTD)), positions, self.rope_theta)
        k_BHSd = rotate(split(self.k_proj(x_BTD)), positions, self.rope_theta)
        v_BHSd = split(self.v_proj(x_BTD))
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
        y_BTD = self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, D))

        valid = past_valid
        if valid is not None or lengths is not None:
            valid = torch.ones(B, S, dtype=torch.bool, device=x_BTD.device) if valid is None else valid
            new = torch.full((B, 1), T, device=x_BTD.device) if lengths is None else lengths[:, None]
            valid = torch.cat([valid, columns < new], dim=1)
        return y_BTD, AttentionState(k_BHSd, v_BHSd, valid)


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
