"""How a model predicts the windows of a text: what it sees, and the loss of every token.

Shapes: B rows, n tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel
from nestlearn.errors import UserError
from nestlearn.learner.cross_entropy import NOTHING, cross_entropy
from nestlearn.learner.stream import Text, Windows, opening
from nestlearn.train.positions import longest


@dataclass(frozen=True)
class Reading:
    """How text is read.

    Args:
        window: tokens predicted at a time, at which point levels may be updated.
        context: how many of the tokens before a window are visible and not predicted again.
        opening: token ids before everything, visible and not predicted.
        deviations: how far above its running scale a surprise may be, in standard deviations.
    """

    window: int
    context: int
    opening: tuple[int, ...]
    deviations: float

    @classmethod
    def of(
        cls,
        model: ContinualModel,
        tokenizer: PreTrainedTokenizerBase,
        window: int | None,
        context: int,
        deviations: float,
    ) -> Reading:
        """With a window of the fastest level's period, or what of it divides all periods and fits, if it is None.

        Raises `UserError` for a number out of range.
        """
        periods = [level.config.period for level in model.levels]
        start = tuple(opening(tokenizer))
        most = longest(model.base) or math.inf
        room = most - len(start) - context
        if context < 0 or room < 1:
            raise UserError(f"context={context}: it must be 0 or more and leave room for a window in {most} tokens")
        whole = math.gcd(*periods)
        if window is None:
            window = whole if whole <= room else max(size for size in range(1, int(room) + 1) if whole % size == 0)
        if window < 1 or whole % window:
            raise UserError(f"window={window}: the periods of the levels, {periods}, must be whole numbers of windows")
        if window > room:
            raise UserError(f"window={window} and context={context} do not fit into the model's {most} tokens")
        if window + context + len(start) < 2:
            raise UserError(
                f"periods {periods} make windows of {window} token, which with nothing before it has none to predict: "
                "give multiples of 2 tokens or more, or a context"
            )
        reading = cls(window, context, start, deviations)
        if not deviations > 0:
            raise UserError(f"max_surprise={deviations}: give standard deviations above 0; infinity refuses nothing")
        return reading

    @property
    def before(self) -> int:
        """The largest number of tokens before a window."""
        return len(self.opening) + self.context

    def after(self, context: Tensor, window: Tensor) -> Tensor:
        """The context of the next window."""
        joined = torch.cat([context, window])
        return joined[max(0, len(joined) - self.context) :]


def token_losses(
    model: ContinualModel,
    contexts: Sequence[Tensor],
    windows: Sequence[Tensor],
    reading: Reading,
    *,
    fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of every token of the windows in nats, (B, n), zero where none is predicted, and where one is.

    A token is predicted from what comes before it in its own row; the first of a text is not, unless the tokenizer
    opens every text with a token.
    """
    # A state may come from a reading with a longer context.
    before = [[*reading.opening, *context[max(0, len(context) - reading.context) :].tolist()] for context in contexts]
    # With a fixed shape the first column is padding in every row: an attention mask without any is treated otherwise.
    left = reading.before + 1 if fixed else max(map(len, before))
    right = reading.window if fixed else max(map(len, windows))
    ids = torch.zeros(len(windows), left + right, dtype=torch.int64)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for b, (head, window) in enumerate(zip(before, windows, strict=True)):
        ids[b, left - len(head) : left] = torch.tensor(head, dtype=torch.int64)
        ids[b, left : left + len(window)] = window
        real[b, left - len(head) : left + len(window)] = True
    scored = real[:, 1:] & real[:, :-1]
    scored = scored[:, -right:] if left else scored
    if not scored.any():
        return torch.zeros(scored.shape, device=model.device), scored
    device = model.device
    padding = {}
    if fixed or not real.all():
        padding = {"attention_mask": real.to(device, torch.int64)}
        padding["position_ids"] = (real.cumsum(1) - 1).clamp(min=0).to(device)
    kept = scored.shape[1] + 1
    logits = model(ids.to(device), use_cache=False, logits_to_keep=kept, **padding).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The last token predicts nothing here; its logits stay where they are, since a cut would copy all of them.
    targets = F.pad(ids[:, 1 - kept :].masked_fill(~scored, NOTHING), (0, 1), value=NOTHING).to(device)
    losses = cross_entropy(wide.flatten(0, 1), targets.flatten())
    return losses.view_as(targets)[:, :-1], scored


@torch.no_grad()
def mean_loss(
    model: ContinualModel,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    weights: Mapping[str, Tensor],
    text: Text,
) -> float:
    """Nats per token of a text with some weights, none of it learned.

    Raises `UserError` for a text without a token to predict.
    """
    total, count = 0.0, 0
    context = torch.empty(0, dtype=torch.int64)
    with model.using(weights):
        for window in Windows(text, tokenizer, reading.window):
            losses, scored = token_losses(model, [context], [window], reading)
            total += float(losses.sum())
            count += int(scored.sum())
            context = reading.after(context, window)
    if count == 0:
        raise UserError("the text has no token to predict: give two tokens or more")
    return total / count
