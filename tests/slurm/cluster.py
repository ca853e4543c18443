"""A real Slurm of three virtual nodes on this machine."""

import os
import pwd
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import TypeVar

import pytest

TEMPLATES = Path(__file__).parent / "etc"
NODES = ("n0", "n1", "n2")
PROGRAMS = ("munged", "mariadb-install-db", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch")
DYING_WITH_US = ("setpriv", "--pdeathsig", "TERM")
"""What a command begins with that must not outlive the tests, however they end."""
PATH = f"{os.environ['PATH']}:/usr/sbin"

Value = TypeVar("Value")


class Cluster:
    """Slurm with accounting, in a temporary directory, on free ports.

    Its daemons are children of this process, die with it, and are the only ones that are stopped.
    Clients and what they start need `environment`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.user = pwd.getpwuid(os.getuid()).pw_name
        outer = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "SUBMITIT"))
        }
        self.environment = outer | {
            "PATH": PATH,
            "SLURM_CONF": str(root / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(root / "mariadb.socket"),  # where slurmdbd finds the database
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._configure()
        self._start_munge()
        self._start_database()
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self.wait("slurmdbd", lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"))
        self._daemon("slurmctld", "slurmctld", "-D")
        self.wait("slurmctld", lambda: self._succeeds("scontrol", "ping"))
        for node in NODES:
            self._daemon(node, "slurmd", "-D", "-N", node)
        states = ("sinfo", "--noheader", "--Node", "--format=%t")
        self.wait("nodes", lambda: set(self.call(*states).split()) == {"idle"})

    def stop(self) -> None:
        """Ends the jobs, then the daemons, then all remaining processes of this cluster."""
        if "slurmctld" in self._daemons:
            self._cancel_jobs()
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_leftovers()

    def call(self, *command: object) -> str:
        """The output of a client of Slurm."""
        result = self._run(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        line = self.call("scontrol", "--oneliner", "show", "job", job_id)
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def wait(self, what: str, reached: Callable[[], Value], seconds: float = 240) -> Value:
        """The first true value of `reached`; fails with the logs if there is none in time."""
        until = time.monotonic() + seconds
        while not (value := reached()):
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > until:
                why = f"{', '.join(dead)} ended" if dead else f"not within {seconds} s"
                pytest.fail(f"waiting for {what}: {why}\n{self._logs()}")
            time.sleep(0.1)
        return value

    def _configure(self) -> None:
        ports = ("slurmctld_port", "slurmdbd_port", *(f"{node}_port" for node in NODES))
        values = dict(zip(ports, _free_ports(len(ports)), strict=True))
        for template in TEMPLATES.iterdir():
            text = Template(template.read_text()).substitute(values, root=self.root, user=self.user)
            path = self.root / template.name
            path.touch(mode=0o600 if path.name == "slurmdbd.conf" else 0o644)
            path.write_text(text)
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self.root / folder).mkdir()

    def _start_munge(self) -> None:
        socket_path, key = self.root / "munge.socket", self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {
            "key-file": key,
            "socket": socket_path,
            "pid-file": self.root / "munged.pid",
            "seed-file": self.root / "munge.seed",
            "log-file": self.root / "munge.log",
        }
        self._daemon("munged", "munged", "--foreground", *_options(files))
        self.wait("munged", lambda: self._succeeds("munge", "-n", "-S", socket_path))

    def _start_database(self) -> None:
        where = {"user": self.user, "datadir": self.root / "mariadb"}
        self.call("mariadb-install-db", "--no-defaults", "--skip-test-db", *_options(where))
        files = {"socket": self.root / "mariadb.socket", "pid-file": self.root / "mariadb.pid"}
        self._daemon(
            "mariadbd",
            "mariadbd",
            "--no-defaults",
            "--skip-networking",
            "--skip-grant-tables",
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",
            *_options(where | files),
        )
        self.wait("mariadbd", files["socket"].exists)

    def _daemon(self, name: str, *command: object) -> None:
        with open(self.root / f"{name}.log", "w") as log:
            self._daemons[name] = subprocess.Popen(
                [*DYING_WITH_US, *map(str, command)],
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _cancel_jobs(self) -> None:
        def left() -> list[str]:
            return self._run("squeue", "--noheader", "--format=%A").stdout.split()

        if left():
            self._run("scancel", "--full", *left())
        until = time.monotonic() + 15
        while left() and time.monotonic() < until:
            time.sleep(0.2)

    def _kill_leftovers(self) -> None:
        """Steps outlive their slurmd; all processes of this cluster have its SLURM_CONF."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue  # ended in between, or not ours to look at

    def _run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def _succeeds(self, *command: object) -> bool:
        return self._run(*command).returncode == 0

    def _logs(self) -> str:
        queue = self._run("squeue").stdout if "slurmctld" in self._daemons else ""
        tails = (
            f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.root.glob("*.log"))
        )
        return "\n".join([queue, *tails])


def _free_ports(n: int) -> list[int]:
    """Below those that the system assigns, so that none is taken in the meantime."""
    ports: set[int] = set()
    while len(ports) < n:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.add(port)
    return list(ports)


def _options(values: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]
