"""`nerve-run` as the first of several processes, which starts the others itself.

The others are forked from it, where Lightning would start the same command again: importing what it
needs takes five seconds of a core.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies.launchers import subprocess_script
from processes import start


def launched(arguments: Sequence[str], cwd: Path, **environment: str) -> Any:
    """Starts the first process, whose `name` is that of the log of all.

    Args:
        arguments: of the command, with `trainer.devices`.
        environment: is added to this one's.
    """
    log = cwd / "launched.log"
    log.unlink(missing_ok=True)
    return start(_launch, [*arguments], cwd=cwd, log=log, environment={**os.environ, **environment})


def _launch(arguments: list[str]) -> None:
    # Others also start processes, such as git.
    with patch.object(subprocess_script, "subprocess", SimpleNamespace(Popen=_Forked)):
        _nerve_run(arguments)


def _nerve_run(arguments: list[str]) -> None:
    from nerve.cli.run import main

    os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv = ["nerve-run", *arguments]
    main()


class _Forked(subprocess.Popen[bytes]):
    """A fork that runs the command."""

    def _execute_child(self, command: list[str], *how: Any) -> None:
        *_, env = how[:6]
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            return
        status = 1
        try:
            os.environ.clear()
            os.environ.update(env)
            rank_zero_only.rank = int(env["LOCAL_RANK"])
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            _nerve_run([each for each in command if "=" in each])
            status = 0
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
