"""What a job of Slurm runs is forked from a process that has already imported everything, where the
test started one: importing Lightning takes four seconds of a core, twenty times.

Slurm starts an interpreter as ever, and sends its signals to it, waits for it or kills it. This one
only stands for the other: it passes on signals, and ends as the other does; if it is killed, so is
the other. What is sent as one message: the arguments, the working directory, the environment, and
the standard streams.
"""

import json
import os
import signal
import socket
import sys

SERVER = "NERVE_TESTS_JOBS"
"""The environment variable with the socket of the process to fork from."""

MAIN = "submitit.core._submit"
"""The module that a job runs."""

LONGEST = 2**18
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def stand_for_a_fork() -> None:
    """Does not return: this process ends as the one that it stands for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(os.environ[SERVER])
        arguments = sys.orig_argv[sys.orig_argv.index(MAIN) :]
        told = json.dumps([arguments, os.getcwd(), dict(os.environ)])
        socket.send_fds(other, [told.encode()], [0, 1, 2])
        for signum in PASSED_ON:
            signal.signal(signum, lambda signum, _: other.send(bytes([signum])))
        exitcode = int(other.recv(LONGEST))
    if exitcode < 0:
        for signum in PASSED_ON:
            signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), -exitcode)
    os._exit(exitcode)
