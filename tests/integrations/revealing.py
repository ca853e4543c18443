"""Runs in a process forked from one from which transformers is hidden."""

import gc


def two_trainers(rank: int, folder: str) -> None:
    """One of the two processes of a Trainer."""
    import sitecustomize

    sitecustomize.reveal()
    from integrations.test_trainer import in_processes

    gc.freeze()  # the Trainer collects garbage after each training
    in_processes(rank, folder)
