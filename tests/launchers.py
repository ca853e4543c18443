"""Lightning's launcher, with processes of a line of Python in place of those of the command."""

import os
import subprocess
import sys

from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
"""Before `WAITS`: only a kill ends it."""

WAITS = "import time; print(flush=True); time.sleep(60)"


class Launcher(_SubprocessScriptLauncher):
    """Starts a process for each code, which has begun once it has printed an empty line."""

    def __init__(self, *codes: str) -> None:
        super().__init__(LightningEnvironment(), 1 + len(codes), 1)
        self.codes = codes

    def _call_children_scripts(self) -> None:
        os.environ["LOCAL_RANK"] = "0"
        for code in self.codes:
            command = [sys.executable, "-c", code]
            self.procs.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for each in self.procs:
            assert each.stdout is not None
            assert each.stdout.readline() == b"\n"
            each.stdout.close()
