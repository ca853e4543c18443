"""How library threads wait and how many there are, unless the user configured it; must be set
before the libraries are imported."""

import subprocess
import sys

import pytest

from nerve import cores


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, cores.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_how_long_threads_spin_is_set_where_nobody_said_it(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment: dict[str, str] = dict(given)
    monkeypatch.setattr(cores.os, "environ", environment)
    cores.spin_briefly()
    assert environment.get("GOMP_SPINCOUNT") == expected


def test_the_command_says_it_before_torch_is_imported():
    code = "import sys, nerve.cli.run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_report_says_how_many_threads_multiply_before_numpy_is_imported():
    code = "import sys, nerve.cli.report; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3")])
def test_products_take_one_thread_where_nobody_said_how_many(monkeypatch, given, expected):
    monkeypatch.setattr(cores.os, "environ", dict(given))
    cores.multiply_in_one_thread()
    assert cores.os.environ == {"OPENBLAS_NUM_THREADS": expected}
