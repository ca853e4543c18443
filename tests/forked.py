"""What every process that tests fork finds imported and cached: see processes.py.

That a composition is cached changes nothing (test_composing.py); the commit and the versions of
packages do not change while tests run.
"""

import gc

import composing
import processes  # noqa: F401 - else each process imports it, and pytest with it
from support import ask_once_for_provenance, composed, never_sync

composing.remember()
ask_once_for_provenance()
never_sync()
composed(with_hydra=True)
gc.freeze()
