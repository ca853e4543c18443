"""Processes of a run, as threads."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d


@pytest.fixture
def two(monkeypatch):
    """Two processes, as threads that share a store; returns what a function of the rank returned or
    raised in each."""
    store, me = dist.HashStore(), threading.local()
    store.set_timeout(timedelta(seconds=100))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: getattr(me, "rank", 0))
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr("nerve.measuring.messages.BELIEVED_AFTER_S", 0.05)

    def call(function):
        ends = [None, None]

        def process(index: int) -> None:
            me.rank = index
            try:
                ends[index] = function(index)
            except Exception as error:
                ends[index] = error

        threads = [threading.Thread(target=process, args=(i,), daemon=True) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive()
        return ends

    def as_rank(index: int, function) -> None:
        me.rank = index
        function()
        me.rank = 0

    call.store = store
    call.as_rank = as_rank
    return call
