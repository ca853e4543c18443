"""How a run is recorded that ends while its main thread waits."""

import pytest

from nerve.cli.experiment.run import _give_up
from nerve.errors import NotGatheredError, StoppedError
from nerve.storage.record import RunRecord


@pytest.mark.parametrize(
    ("error", "run_status", "kind"),
    [
        (NotGatheredError("process 1 was killed by SIGKILL"), "failed", "NotGatheredError"),
        (StoppedError("process 1 was killed by SIGINT"), "interrupted", "Interrupted"),
    ],
)
def test_a_run_that_waits_for_a_process_that_is_gone_is_recorded(
    tmp_path, capfd, error, run_status, kind
):
    _give_up(RunRecord.create(tmp_path, {}), error)
    record = RunRecord.load(tmp_path)
    assert record.run_status == run_status
    assert record.error == {"type": kind, "message": str(error)}
    assert capfd.readouterr().err == f"nerve-run: {error}\n"


def test_a_process_that_does_not_record_the_run_only_says_so(capfd):
    _give_up(None, NotGatheredError("caf\udce9 is full"))
    assert capfd.readouterr().err == "nerve-run: caf\\udce9 is full\n"
