"""A metric that a copy of the package has, from the measurement to the reports, in a process
forked from one that has imported the package itself."""

import sys
import warnings


def walk(folder: str) -> None:
    """Imports the package anew from this folder and uses it there."""
    import sitecustomize

    sitecustomize.reveal()  # matplotlib
    for name in [name for name in sys.modules if name.partition(".")[0] == "nerve"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    warnings.simplefilter("error", RuntimeWarning)

    import torch
    from torch import nn

    import nerve
    from nerve.cli.experiment.summary import print_summary
    from nerve.measuring.eigenproblem import ROW
    from nerve.recording.writer import logged_values
    from nerve.report import write

    assert nerve.__file__.startswith(folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    ffns = [nerve.FFNAdapter(0, "ffn", model[0], model[2])]
    for name in ("a", "b"):
        record = nerve.RunRecord.create(f"runs/{name}", {"activation": {"name": name}}, seed=0)
        store = nerve.RunStore(record.directory, record.run_id)
        for step in range(4):
            rows = nerve.measure(model, [torch.randn(99, 6)], ffns=ffns)[[*ROW]]
            rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
            at_step = {"step": step, "tokens_seen": step, "val_loss": 4.0 - step}
            store.append_metrics([rows[0] | at_step])
        store.flush(3)
        record.finish("done", step=3, final={"val_loss": 1.0})
    metrics, runs = nerve.load_metrics("runs"), nerve.load_runs("runs")
    assert 0 < metrics["first_post"].min() < 1
    assert "ffn/00/first_post" in logged_values(rows)
    assert "first_post" in nerve.metrics_by_depth(metrics, runs)
    assert "first_post_sd" in nerve.average_seeds(nerve.final_metrics(metrics, runs))
    assert "first_post" in set(nerve.correlate_within_runs(metrics, runs)["metric"])
    print_summary([rows[0] | at_step], {})
    write._save = lambda figure, path: b""  # drawn, and not rendered
    nerve.write_report("runs")
    nerve.write_report("runs/a")
