"""Two processes that meet, each with what it found: for tests of optimizers under `torch.distributed`."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


@contextmanager
def met(rank: int, folder: str) -> Iterator[None]:
    """Process ``rank`` of two, joined by a file in ``folder``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    yield
    gc.collect()  # a DistributedDataParallel that outlives its process group can hang when it is freed
    distributed.barrier()
    distributed.destroy_process_group()


def in_two(work: Callable[[int, str], None], folder: Path) -> list[dict[str, Any]]:
    """What ``work(rank, folder)`` saved as ``folder/RANK.pt`` in each of two processes."""
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
