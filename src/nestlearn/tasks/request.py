"""What was asked for: checked before anything loads torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nestlearn.errors import UserError, nearest


def check(
    kind: str, only: Sequence[str], names: Iterable[str], scale: str, scales: Sequence[str], workers: int
) -> list[str]:
    """The names to run, in the order of ``names``; all of them if ``only`` has none.

    Raises:
        UserError: an unknown name or scale, or fewer processes than one.

    >>> check("task", ["mad"], ["formal", "mad"], "cpu", ["smoke", "cpu"], 2)
    ['mad']
    """
    known = list(names)
    for name in only:
        if name not in known:
            raise UserError(f"unknown {kind} '{name}'; {nearest(name, known)}")
    if scale not in scales:
        raise UserError(f"unknown scale '{scale}'; {nearest(scale, scales)}")
    if workers < 1:
        raise UserError(f"--workers is the number of processes, 1 or more, got {workers}")
    return [name for name in known if name in only or not only]
