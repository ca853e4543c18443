"""A trial whose training is a stand-in; everything around it is that of a real trial.

deeds.json in the working directory says what happens to it, by seed. Each start adds a line
to `starts` in the run directory.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nerve.cli.experiment.start import is_done, start
from nerve.cli.sweep import worker as trial
from nerve.errors import ConfigError
from nerve.storage.directory import RunDirectory

POOLS = ("NERVE_CORES", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


def run_experiment(config: Any, hydra_config: Any) -> float:
    run = RunDirectory(hydra_config.runtime.output_dir)
    deed = json.loads(Path("deeds.json").read_text()).get(str(config.seed), "train")
    if deed == "refuse":
        raise ConfigError("seed must be lucky")
    if deed == "start slowly":
        time.sleep(200)
    loss = 0.5 + config.seed
    if is_done(run, config):
        return loss
    with run.locked():
        record = start(run, config, hydra_config)
        if record.run_status == "done":
            return loss
        with open(run.path / "starts", "a") as starts:
            share = (os.environ.get(name) for name in (*POOLS, "CUDA_VISIBLE_DEVICES"))
            print(hydra_config.job.num, *share, file=starts)
        try:
            befall(deed, run.path)
        except (Exception, KeyboardInterrupt) as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            record.finish("interrupted" if interrupted else "failed", error=error)
            raise
        record.finish("done", step=config.trainer.max_steps, final={"val_loss": loss})
        return loss


def befall(deed: str, directory: Path) -> None:
    if deed == "raise":
        raise RuntimeError("no luck")
    if deed == "vanish":
        os._exit(3)
    if deed == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "hang deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if deed == "stop the sweep":
        os.kill(os.getppid(), signal.SIGINT)
    if deed in ("hang", "hang deaf", "stop the sweep"):
        (directory / "hangs").touch()
        time.sleep(200)
    if deed == "meet":
        while len(list(directory.parent.glob("*/starts"))) < 2:
            time.sleep(0.01)


def stand_in(module: str, name: str, function: Callable[..., Any]) -> None:
    """Replaces a module that imports torch and Lightning by one with only this function."""
    sys.modules[module] = ModuleType(module)
    setattr(sys.modules[module], name, function)


stand_in("nerve.cli.experiment.run", "run_experiment", run_experiment)
stand_in("nerve.cli.experiment.machine", "leads", lambda trainer: True)
trial.main()
