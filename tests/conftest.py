"""What all tests share: shapes are checked as annotated, and no user's cache is touched."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

CHECKED = ("nerve.spectra", "nerve.nn", "nerve.models", "nerve.optim")
install_import_hook(list(CHECKED), "beartype.beartype")

torch.set_num_threads(1)  # tiny tensors; and several tests start processes of their own


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["NERVE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
