"""The memory without parameters: its context itself is stored, and every read solves its objective anew."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def nadaraya_watson(similarity: Float[Tensor, "*b n"], v: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b d"]:
    """The Nadaraya-Watson estimate (Eq. 62, 63): ``argmin_m sum_i s_i ||v_i - m||^2 = sum_i s_i v_i / sum_i s_i``.

    With ``s_i = exp(<k_i, q> / sqrt(d))`` over all tokens so far it is softmax attention, over the last c of them
    sliding-window attention. It is the plain form that :class:`nestlearn.nn.CausalAttention` is tested against.

    Args:
        similarity: s_i >= 0 of a query to each of n keys; at least one is positive.
        v: the value of each key.

    >>> import torch
    >>> nadaraya_watson(torch.tensor([1.0, 3.0]), torch.tensor([[0.0], [4.0]]))
    tensor([3.])
    """
    return (similarity.unsqueeze(-1) * v).sum(-2) / similarity.sum(-1, keepdim=True)
