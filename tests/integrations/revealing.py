"""What runs in a process that is forked from one to which transformers is hidden."""


def two_trainers(rank: int, folder: str) -> None:
    """One of two processes that a Trainer trains in."""
    import sitecustomize

    sitecustomize.reveal()
    from integrations.test_trainer import in_processes

    in_processes(rank, folder)
