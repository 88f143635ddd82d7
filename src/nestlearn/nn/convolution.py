"""The short causal convolution in front of every token mixer of Hope (window 4 in the paper).

Shapes: B rows, T tokens, D channels, K taps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.nn.lengths import counted


class CausalConv(nn.Module):
    """Depthwise causal convolution ``y_t = sum_j w_j * x_(t-K+1+j)`` that streams exactly over any pieces.

    It starts near the identity (newest tap 1, older taps small): a fresh block hears its own token first.

    Args:
        dim: channels D.
        kernel: taps K, in tokens, at least 1; a token sees itself and the K-1 tokens before it.
        silu: apply SiLU to the result, as Titans does. Off, the layer can be an exact identity.

    Raises:
        UserError: ``dim`` or ``kernel`` below 1.

    >>> y, state = CausalConv(8, kernel=4)(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 3, 8]))
    """

    def __init__(self, dim: int, kernel: int = 4, *, silu: bool = False) -> None:
        super().__init__()
        if dim < 1 or kernel < 1:
            raise UserError(f"CausalConv got dim={dim} and kernel={kernel}: both must be at least 1")
        self.dim, self.kernel, self.silu = dim, kernel, silu
        # (K, D), oldest tap first: K shifted multiply-adds decode twice as fast as a grouped conv1d.
        self.weight = nn.Parameter(torch.empty(kernel, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Newest tap 1, older taps normal with standard deviation 0.1."""
        with torch.no_grad():
            self.weight.normal_(std=0.1)
            self.weight[-1] = 1.0

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel={self.kernel}, silu={self.silu}"

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        state: Float[Tensor, "B K1 D"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B K1 D"]]:
        """Convolve a piece of the sequence.

        Args:
            x_BTD: the piece; T may be anything, zero included.
            state: the K-1 inputs before the piece, oldest first; None at the start of a sequence (zeros).
            lengths: how many leading columns of each row are valid; None if all are. Outputs of the other
                columns are finite and meaningless.

        Returns:
            The output, and the last K-1 valid inputs of each row, which continue the sequence next time.

        Raises:
            UserError: ``lengths`` that are not one number from 0 to T per row.
        """
        B, T, D = x_BTD.shape
        x_BTD = counted(x_BTD, lengths)
        past = self.kernel - 1
        before = x_BTD.new_zeros(B, past, D) if state is None else state.to(x_BTD.dtype)
        window = torch.cat([before, x_BTD], dim=1)
        weight = self.weight.to(x_BTD.dtype)
        if T == 1:  # decoding: the window is what the taps see
            y_BTD = (window * weight).sum(1, keepdim=True)
        else:
            y_BTD = window[:, past:] * weight[past]
            for j in range(past):
                y_BTD = torch.addcmul(y_BTD, window[:, j : j + T], weight[j])
        if self.silu:
            y_BTD = F.silu(y_BTD)
        if lengths is None:
            return y_BTD, window[:, T:].clone()  # a copy, so that the state does not keep the piece alive
        # Row i has consumed lengths[i] inputs, so its last K-1 stand at window columns lengths[i] .. +K-2.
        columns = lengths[:, None] + torch.arange(past, device=x_BTD.device)
        return y_BTD, window.gather(1, columns[..., None].expand(B, past, D))
