"""Compiles GPU kernels that a later measurement may need, while training goes on."""

import logging
import threading
from collections.abc import Collection

import torch

from nerve.spectra.moments import prepare_centered
from nerve.spectra.product import has_kernels

log = logging.getLogger(__name__)


class Preparation:
    """Compiles the kernels of centered products in a thread, so that training never waits for them.

    Features in bfloat16 are multiplied uncentered, by other kernels, until their mean is large.

    Args:
        device: where the model trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread: threading.Thread | None = None

    def start(self, products: Collection[str]) -> None:
        """Starts once, if the products of a measurement are among those that may have to give way;
        returns immediately."""
        if self._thread is None and "bfloat16" in products and has_kernels(self._device):
            self._thread = threading.Thread(target=self._prepare, name="kernels", daemon=True)
            self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """With `wait`, waits until the thread has ended, because no compiler should be running when
        the process exits. After an error, this could hang as in `Aside.close`: loading a kernel may
        wait for the GPU's other work."""
        if wait and self._thread is not None:
            self._thread.join()

    def _prepare(self) -> None:
        try:
            prepare_centered(self._device)
        except Exception as error:
            log.warning(
                "kernels for features with a large mean could not be compiled beside training; "
                "training will wait for them if they are needed: %s",
                str(error) or type(error).__name__,
            )
