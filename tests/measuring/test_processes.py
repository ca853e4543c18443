"""What one process tells the others of its run."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together

from nerve.errors import StoreError
from nerve.measuring.distributed import Mailbox, gathered, highest, own_part, rank

CPU = torch.device("cpu")


def tell(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    parts = gathered({"mine": index})
    heard = [rank(), parts, own_part(parts), highest(5 - index, CPU)]
    for number in range(3):  # each exchange has its own, and what was read is let go
        assert gathered((number, index)) == [(number, 0), (number, 1)]
    box, other = Mailbox(), Mailbox()
    if index == 1:
        box.send("late")
        box.send(None)
        other.send(7)
        gathered(None)
    else:
        gathered(None)
        assert [other.take(wait=False), box.take(wait=True), box.take(wait=False)] == [
            *([7], ["late"], [None])
        ]
        assert box.take(wait=False) is None  # there is no more
    gathered(None)
    Path(folder, f"{index}.json").write_text(json.dumps(heard))
    dist.destroy_process_group()


def test_one_process_hears_itself():
    assert (rank(), gathered("x"), own_part(["x"]), highest(3, CPU)) == (0, ["x"], "x", 3)


@pytest.mark.parametrize("n_processes", [0, 2])
def test_what_another_number_of_processes_gathered_is_refused(n_processes):
    told = f"its checkpoint is of {n_processes}, now there are 1. Start it where it gets"
    with pytest.raises(StoreError, match=told):
        own_part(["x"] * n_processes)


def test_two_processes_hear_each_other_in_order(tmp_path):
    together(tell, 2, tmp_path)
    for index in range(2):
        heard = json.loads((tmp_path / f"{index}.json").read_text())
        assert heard == [index, [{"mine": 0}, {"mine": 1}], {"mine": index}, 5]
