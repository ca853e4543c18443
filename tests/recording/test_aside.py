"""What is done beside training reads what training made, and keeps it until then."""

import gc
import weakref

import pytest
import torch

from nerve.recording.aside import Aside


class Held:
    """Something that can be let go of."""


def test_on_a_cpu_nothing_is_beside_and_nothing_is_held():
    aside, held = Aside(torch.device("cpu")), Held()
    seen = weakref.ref(held)
    with aside.work_on(held):
        total = torch.ones(3).sum()
    del held
    gc.collect()
    assert (float(total), seen()) == (3.0, None)
    aside.close()


@pytest.mark.cuda
def test_what_is_read_beside_is_not_given_to_training_before():
    """Training is slow to make it, the stream beside slow to read it, and memory of that size is
    asked for at once."""
    device = torch.device("cuda")
    aside = Aside(device)
    given = torch.zeros(2**24, device=device)
    torch.cuda._sleep(10**8)
    given.fill_(1)
    with aside.work_on([given]):
        torch.cuda._sleep(10**8)
        total = given.sum()
    del given
    others = [torch.full((2**24,), 7.0, device=device) for _ in range(3)]
    aside.let_go()
    assert len(aside._held) == 1
    torch.cuda.synchronize()
    aside.let_go()
    assert not aside._held
    assert (float(total), float(others[0][0])) == (2**24, 7)
