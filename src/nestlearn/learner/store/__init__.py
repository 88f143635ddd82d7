"""The memory store: what a learner has learned, as immutable snapshots that are named, compared and rolled back.

It knows nothing of models: names, tensors, JSON. ``docs/memory-store.md`` has the format on disk and the guarantees.
"""

from nestlearn.learner.store.snapshot import LevelRecord, Snapshot
from nestlearn.learner.store.store import Store

__all__ = ["LevelRecord", "Snapshot", "Store"]
