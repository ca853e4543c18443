"""Lightning's launcher, with processes of a line of Python in place of those of the command."""

import subprocess
import sys
from unittest.mock import patch

from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher, subprocess_script

IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
"""Before `WAITS`: only a kill ends it."""

WAITS = "import time; print(flush=True); time.sleep(60)"


class Launcher(_SubprocessScriptLauncher):
    """Starts a process for each code, which has begun once it has printed an empty line."""

    def __init__(self, *codes: str) -> None:
        super().__init__(LightningEnvironment(), 1 + len(codes), 1)
        self.codes = codes

    def _call_children_scripts(self) -> None:
        waiting = iter(self.codes)

        def start(command: object, **how: object) -> "subprocess.Popen[bytes]":
            return popen([sys.executable, "-c", next(waiting)], stdout=subprocess.PIPE, **how)

        popen = subprocess.Popen
        with patch.object(subprocess_script.subprocess, "Popen", start):
            super()._call_children_scripts()
        for each in self.procs:
            assert each.stdout is not None
            assert each.stdout.readline() == b"\n"
            each.stdout.close()
