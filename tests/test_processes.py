"""What one process tells the others of its run."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nerve.processes import gathered, highest, rank

CPU = torch.device("cpu")


def tell(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    heard = [rank(), gathered({"mine": index}), highest(5 - index, CPU)]
    Path(folder, f"{index}.json").write_text(json.dumps(heard))
    dist.destroy_process_group()


def test_one_process_hears_itself():
    assert (rank(), gathered("x"), highest(3, CPU)) == (0, ["x"], 3)


def test_two_processes_hear_each_other_in_order(tmp_path):
    mp.spawn(tell, args=(str(tmp_path),), nprocs=2)
    for index in range(2):
        heard = json.loads((tmp_path / f"{index}.json").read_text())
        assert heard == [index, [{"mine": 0}, {"mine": 1}], 5]
