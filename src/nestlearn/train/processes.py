"""One run in the processes that torchrun starts: all read, one writes, and they stop together.

Every process has the same recipe, the same data and the same random numbers, and takes its part of each batch; so a
recipe means the same run in any number of processes, to rounding. The run folder is one that all of them see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

from nestlearn.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


def join() -> PartialState:
    """This process among those of the run, joined at the first call. Without torchrun it is alone.

    >>> join().is_main_process
    True
    """
    from accelerate import PartialState  # here, as it is an extra

    return PartialState(cpu=not torch.cuda.is_available())


def check_shares(batch_size: int) -> None:
    """Raise `UserError` if the processes cannot take equal shares of a batch."""
    processes = join().num_processes
    if batch_size % processes:
        raise UserError(
            f"train.batch_size is {batch_size}, which {processes} processes cannot share equally: "
            f"make it a multiple of {processes}, or start another number of processes"
        )


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; all of them must ask."""
    here = join()
    if here.num_processes == 1:
        return flag
    found = torch.tensor(float(flag), device=here.device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)
