"""A report shows what its runs contain, says what is missing, and replaces only a report."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import pandas as pd
import pytest
from support import StaticPage

from nerve.errors import ConfigError, StoreError
from nerve.report.content import Content
from nerve.report.write import PNG_DPI, _save, _save_table, gather, write_report
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

NAMES = ("se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js")
DEAD = {**dict.fromkeys(NAMES), "status": "no variance"}

Make = Callable[..., RunRecord]


@pytest.fixture
def make(tmp_path: Path, row: Callable[..., dict[str, Any]]) -> Make:
    """Makes a finished run under `runs/`; its loss falls with the steps and increases with the
    seed."""

    def make(
        name: str,
        activation: str = "gelu",
        seed: int = 0,
        steps: tuple[int, ...] = (0, 10, 20, 30),
        loss: float = 5.0,
        run_status: str = "done",
        error: Exception | None = None,
        config: dict[str, Any] | None = None,
        **values: Any,
    ) -> RunRecord:
        settings = {
            "activation": {"name": activation},
            "normalization": {"kind": "layernorm"},
            "optimizer": {"schedule": {"warmup": 0.05}},
            "trainer": {"max_steps": 30},
            **(config or {}),
            "seed": seed,
        }
        corpus = values.pop("corpus", "c")
        text = {"corpus": corpus, "tokenizer": "t"} if corpus else {}
        record = RunRecord.create(
            tmp_path / "runs" / name,
            settings,
            seed=seed,
            unigram_loss=4.9,
            fingerprints={**text, "heldout": "h"},
        )
        store = RunStore(record.directory, record.run_id)
        for i, step in enumerate(steps):
            at_step = {"val_loss": loss - i / 3 + seed / 10, "pr_pre": 2 + i / 7, **values}
            store.append_metrics(row(step, layer, **at_step) for layer in range(2))
            store.append_scalars([{"step": step, "name": "train_loss", "value": 4.0}])
        if steps:
            store.flush(steps[-1])
        if run_status != "running":
            record.finish(run_status, error, step=30, final={"val_loss": loss})
        return record

    return make


def report(tmp_path: Path, **options: Any) -> tuple[Path, StaticPage]:
    """Writes a report on `runs/`; returns its folder and its page."""
    index = write_report(tmp_path / "runs", **options)
    return index.parent, StaticPage(index.read_text(encoding="utf-8"))


def table(content: Content, name: str) -> pd.DataFrame:
    (found,) = [table for table in content.tables if table.name == name]
    return found.frame.reset_index(drop=True)


def drawings(content: Content) -> list[str]:
    return [drawing.name for drawing in content.drawings]


def note(content: Content, part: str) -> str:
    (found,) = [text for text in content.notes if part in text]
    return found


def test_one_run_has_its_own_figures_and_tables_in_files_and_page(make, tmp_path):
    record = make("a")
    store = RunStore(record.directory, record.run_id)
    spectrum = {"layer": 0, "ffn": "ffn", "eigenvalues": [2.0, 1.0]}
    store.append_spectra(
        {**spectrum, "step": step, "site": site} for step in (0, 30) for site in ("pre", "post")
    )
    store.flush(30)
    folder, page = report(tmp_path)
    assert folder == tmp_path / "report"  # beside the path
    assert page.title == f"Run {record.run_id}"
    names = page.figures
    assert names == ["overview", "gain", "spectra", "training"]
    assert page.notes == []
    for name in names:
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text()
    for name, (_, *rows) in page.tables.items():
        csv = pd.read_csv(folder / "tables" / f"{name}.csv")
        parquet = pd.read_parquet(folder / "tables" / f"{name}.parquet")
        assert len(csv) == len(parquet) == len(rows)
        assert list(csv.columns) == list(parquet.columns)
    assert [row[2] for row in page.tables["layers"]] == ["step", "30", "30"]
    assert set(page.tables) == {"layers", "within", "within_by_layer", "run"}
    facts = page.facts
    assert (facts["flag"], facts["final validation loss (nats)"]) == ("ok", "4")
    missed = note(gather(tmp_path / "runs", steps=(0, 7)), "the nearest stored ones are drawn")
    assert missed.startswith("No spectra were stored at step 7;")


def test_a_seed_is_no_amount(make, tmp_path):
    """And has no thousands separator."""
    make("a", seed=12_345)
    assert dict(gather(tmp_path / "runs").facts)["seed"] == "12345"


def test_captions_say_sampling_rank_limits_and_seeds(make, tmp_path):
    """The rows of the fixture have N = 100, D = 8, d_in = 4."""
    make("a")
    content = gather(tmp_path / "runs")
    for drawing in content.drawings[:2]:
        assert "N = 100 samples, D = 8 features, N/D = 12.5." in drawing.caption
        assert "rank(pre) ≤ min(d_in, D, N − 1) = 4" in drawing.caption
        assert "rank(post) ≤ 8" in drawing.caption
        assert "One run, one seed." in drawing.caption


def test_a_figure_of_one_corpus_describes_the_sampling_of_its_runs(make, tmp_path):
    make("a", "gelu")
    make("b", "relu")
    make("c", "gelu", corpus="other", n_samples=50)
    make("d", "relu", corpus="other", n_samples=50)
    captions = {each.name: each.caption for each in gather(tmp_path / "runs").drawings}
    assert "N = 50 to 100 samples" in captions["curves_by_activation.name"]
    found = {captions[name].partition("N = ")[2].split()[0] for name in ("loss_0", "loss_1")}
    assert found == {"50", "100"}


def test_figures_omit_metrics_and_data_that_were_not_stored(make, tmp_path):
    """Runs of other code may not record their data; older runs have not stored every metric."""
    for name, corpus in (("a", None), ("b", "b"), ("c", None), ("d", "b")):
        make(name, ("gelu", "relu")[name > "b"], corpus=corpus, variance_outside=None)
    drawn = {each.name: each for each in gather(tmp_path / "runs").drawings}
    losses = [drawn[name].caption for name in ("loss_0", "loss_1")]
    assert sum("measured step, data unknown. " in caption for caption in losses) == 1
    layers = drawn["layers_by_activation.name"]
    panels = [panel.get_title() for panel in layers.draw().axes]
    assert panels == ["PR pre", "PR post", "PR gain"]
    assert f"by activation.name: {', '.join(panels)}. N = " in layers.caption


def test_several_runs_are_compared_by_what_varies(make, tmp_path):
    for activation in ("gelu", "relu"):
        for seed in (0, 1):
            name = f"{9 - seed}{activation[::-1]}"  # the order of directories is another
            make(name, activation, seed, pr_post=5.0 + len(activation) + seed)
    content = gather(tmp_path / "runs")
    names = ["curves_by_activation.name", "layers_by_activation.name", "loss"]
    assert drawings(content) == [*names, "contrasts_by_activation.name"]
    assert dict(content.facts)["runs"] == "4 ok"
    assert dict(content.facts)["activation.name"] == "gelu, relu"
    assert "normalization.kind = layernorm" in dict(content.facts)["the same in all runs"]
    assert "2 designs with 2 seeds each." in content.drawings[0].caption
    runs = table(content, "runs")
    assert list(runs["activation.name"]) == ["gelu", "gelu", "relu", "relu"]
    assert list(runs["seed"]) == [0, 1, 0, 1]
    assert set(runs["flag"]) == {"ok"}
    assert list(runs["final_loss"].round(3).unique()) == [4.0, 4.1]
    designs = table(content, "designs")
    assert list(designs["n_seeds"]) == [2, 2]
    assert designs["val_loss_sd"][0] == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    assert set(table(content, "across")["points"]) == {"designs", "runs"}
    assert table(content, "within_summary")["window"][0] == "after_warmup"
    assert len(table(content, "layers")) == 8


def test_figures_of_an_ffn_are_by_the_factors_that_vary_among_its_runs(make, tmp_path):
    """Of a Mixer beside GPTs, and the other way around."""
    for activation in ("gelu", "relu"):
        make(activation, activation)
    for kind in ("none", "rmsnorm"):
        make(kind, ffn="token_mixing", config={"normalization": {"kind": kind}})
    assert [name for name in drawings(gather(tmp_path / "runs")) if "_by_" in name] == [
        *("curves_by_activation.name", "layers_by_activation.name"),
        "curves_token_mixing_by_normalization.kind",
        "layers_token_mixing_by_normalization.kind",
    ]


def test_null_models_early_ranking_and_contrasts_are_shown_where_there_is_enough(make, tmp_path):
    """Four learning rates of each activation, ten steps: a figure and a table for each comparison.

    The first rate has a second seed, which gives an error with one degree of freedom.
    """
    names = ("gelu", "relu")
    for i, activation, seed in [*product(range(4), names, [0]), *product([0], names, [1])]:
        config = {"optimizer": {"lr": 0.001 * (i + 1), "schedule": {"warmup": 0.05}}}
        loss = 5.0 - i / 20 + (activation == "relu") / 90
        more = {"loss": loss, "pr_post": 5.0 + i / 9 + (i % 3) / 20}
        make(f"{activation}{i}{seed}", activation, seed, tuple(range(10)), config=config, **more)
    content = gather(tmp_path / "runs")
    assert drawings(content)[-6:] == [
        "loss",
        "nulls_within",
        "nulls_across",
        "early",
        "contrasts_by_activation.name",
        "contrasts_by_optimizer.lr",
    ]
    for drawing in content.drawings[-5:]:
        drawing.draw()
    assert "10 runs of 8 designs" in content.drawings[-3].caption
    assert set(table(content, "early")["step"]) == set(range(10))
    contrasts = table(content, "contrasts")
    assert list(contrasts["factor"].unique()) == ["activation.name", "optimizer.lr"]
    assert (contrasts["df"] == 1).all()
    assert set(contrasts["outcome"]) == {"undecided"}
    across = table(content, "across")
    own = across[(across["metric"] == "pr_post") & (across["points"] == "designs")]
    assert own["r_optimizer.lr"].iloc[0] < -0.8
    summary = table(content, "within_summary")
    assert (summary["r_clock_median"] < -0.8).any()


def test_a_reference_is_in_every_figure_of_its_metric(make, tmp_path):
    make("gelu", "gelu")
    make("relu", "relu")
    path = tmp_path / "paper.csv"
    path.write_text("metric,value,label,step\npr_post,9,the paper,20\n")
    content = gather(tmp_path / "runs", reference=path)
    assert list(table(content, "reference")["label"]) == ["the paper"]
    figure = content.drawings[0].draw()
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert "the paper" in texts
    with pytest.raises(ConfigError, match="cannot be read"):
        gather(tmp_path / "runs", reference=tmp_path / "none.csv")


def test_runs_that_cannot_be_compared_are_flagged_and_left_out(make, tmp_path):
    make("ok0")
    make("ok1", "relu")
    make("failed", "silu", run_status="failed", error=ValueError("out of memory"))
    make("running", "identity", run_status="running")
    make("untrained", "leaky_relu", loss=9.0)
    make("empty", "relu_squared", steps=())
    content = gather(tmp_path / "runs")
    assert note(content, "“failed”").endswith(
        "ValueError: out of memory (last measured at step 30)"
    )
    for flag in ("running", "untrained", "no metrics"):
        assert "excluded from figures and statistics" in note(content, f"“{flag}”")
    assert dict(content.facts)["runs"].startswith("2 ok, ")
    assert sorted(table(content, "runs")["flag"]) == [
        "failed",
        "no metrics",
        "ok",
        "ok",
        "running",
        "untrained",
    ]
    designs = table(content, "designs").set_index("activation.name")
    assert designs["val_loss"].notna().sum() == 2
    assert "2 designs, one seed each: no intervals" in content.drawings[0].caption


def test_if_no_run_can_be_compared_the_flagged_ones_are_drawn(make, tmp_path):
    make("a", run_status="running")
    make("b", "relu", run_status="running")
    content = gather(tmp_path / "runs")
    assert "figures show the flagged ones" in note(content, "No run can be compared")
    assert drawings(content) == ["curves_by_activation.name", "layers_by_activation.name"]


def test_runs_that_do_not_differ_are_not_said_to_differ_in_the_seed(make, tmp_path):
    make("a")
    make("b", run_status="interrupted")
    content = gather(tmp_path / "runs")
    assert note(content, "Nothing varies among these runs")


def test_runs_that_differ_only_in_the_seed_are_separate_lines(make, tmp_path):
    make("a", seed=0)
    make("b", seed=1)
    content = gather(tmp_path / "runs")
    assert note(content, "Only the seed varies among these runs")
    assert drawings(content)[:2] == ["curves_by_seed", "layers_by_seed"]


def test_one_seed_only_gives_no_interval(make, tmp_path):
    make("a")
    make("b", "relu")
    make("c", "relu", seed=1)
    content = gather(tmp_path / "runs")
    assert note(content, "only one seed").startswith("1 of 2 designs have only one seed")
    assert table(content, "designs")["val_loss_sd"].isna().tolist() == [True, False]


def test_dead_layers_are_named_and_the_rest_is_shown(make, tmp_path):
    make("a")
    make("dead", "relu", **DEAD)
    content = gather(tmp_path / "runs")
    assert note(content, "nothing could be measured").startswith("In 8 of 16 rows")
    assert len([drawing.draw() for drawing in content.drawings]) == 3
    shutil.rmtree(tmp_path / "runs" / "a")
    content = gather(tmp_path / "runs")
    assert "In all rows" in note(content, "nothing could be measured")
    assert drawings(content) == ["overview", "gain", "training"]
    assert all(drawing.draw().axes for drawing in content.drawings)


def test_spectra_dominated_by_a_few_samples_are_reported_with_the_worst(make, tmp_path):
    make("a")
    assert not any("a few samples" in text for text in gather(tmp_path / "runs").notes)
    record = make("b", "relu", largest_share_post=0.5, top_share_post=0.75)
    text = note(gather(tmp_path / "runs"), "a few samples")
    assert text.startswith(
        "In 8 of 16 rows of metrics, a few samples may dominate the spectrum of post"
    )
    assert f"run {record.run_id}, layer" in text
    assert "holds 50.0% of the variance, the farthest 0.1% of the samples hold 75.0%" in text


def test_a_run_without_metrics_has_a_page(make, tmp_path):
    make("a", steps=(), run_status="failed", error=ValueError("early"))
    content = gather(tmp_path / "runs")
    assert drawings(content) == []
    assert "“failed”" in note(content, "flagged")
    assert note(content, "Runs without metrics")
    assert table(content, "layers").empty


def test_warnings_of_loaders_are_on_the_page(make, tmp_path):
    """Copies, damaged records and parts, newer schemas, other data: each once."""
    record = make("a")
    make("b", "relu", corpus="other")
    runs = tmp_path / "runs"
    shutil.copytree(record.directory, runs / "copy")
    (runs / "damaged").mkdir()
    (runs / "damaged" / "run.json").write_text("{")
    newer = json.loads((record.directory / "run.json").read_text())
    (runs / "newer").mkdir()
    (runs / "newer" / "run.json").write_text(json.dumps({**newer, "schema_version": 99}))
    part = make("cut", "silu").directory / "metrics" / "part-000000000040.parquet"
    part.write_bytes(b"PAR1")
    content = gather(tmp_path / "runs")
    for part_of_note in ("two directories", "damaged/run.json", "version 99", "part-000000000040"):
        note(content, part_of_note)
    assert "fingerprints.corpus" in note(content, "not comparable")
    assert "incomplete" in note(content, "“incomplete”")
    assert len(table(content, "runs")) == 3
    # Losses on different data are not in one figure, and one design shows no relation.
    assert not [name for name in drawings(content) if name.startswith("loss")]


def test_both_ffns_of_a_block_have_figures(make, tmp_path, row):
    record = make("a", steps=())
    store = RunStore(record.directory, record.run_id)
    store.append_metrics(
        row(step, layer, ffn=ffn)
        for step in (0, 10)
        for layer in (0, 1)
        for ffn in ("token_mixing", "channel_mixing")
    )
    store.flush(10)
    content = gather(tmp_path / "runs")
    assert drawings(content) == [
        "overview_token_mixing",
        "gain_token_mixing",
        "overview_channel_mixing",
        "gain_channel_mixing",
        "training",
    ]


def test_widths_are_fitted_if_there_are_two(make, tmp_path):
    for width in (1, 2, 4):
        make(str(width), config={"ffn": {"width": width}}, d_ff=4 * width)
    relu = {"ffn": {"width": 4}, "activation": {"name": "relu"}}
    make("relu", config=relu, d_ff=16)  # of one width: no line
    content = gather(tmp_path / "runs")
    scaling = table(content, "scaling")
    assert set(scaling["n"]) == {3}
    assert set(scaling["activation.name"]) == {"gelu"}
    assert "curves_by_ffn.width" in drawings(content)


def test_a_varying_value_that_cannot_be_a_factor_is_named(make, tmp_path):
    """`lr` has the name of a column of the metrics."""
    for i, lr in enumerate((1e-4, 1e-3)):
        make(str(i), config={"lr": lr})
    notes = " ".join(gather(tmp_path / "runs").notes)
    assert "lr varies, but cannot be a factor" in notes
    assert "Only the seed varies" not in notes


def test_hostile_names_stay_data(make, tmp_path):
    """No string of a run is interpreted as markup, a file name, or mathematics."""
    bad = "</script><script>alert(1)</script>"
    for i, value in enumerate((bad, "$\\frac{$_{", "_x\u202e\n漢")):
        make(str(i), config={f"../../{bad}": {"x y": value}, "threads": 4 if i else "8/3"})
    folder, page = report(tmp_path)
    text = (folder / "index.html").read_text()
    assert text.count("</script>") == 1
    assert "alert(1)</" not in text
    head, *rows = page.tables["runs"]
    assert bad in {row[head.index(f"../../{bad}.x y")] for row in rows}
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert all(set(name) <= set(map(chr, range(33, 127))) - set("<>/$") for name in names)
    assert not list(tmp_path.glob("*script*"))
    csv = pd.read_csv(folder / "tables" / "runs.csv")
    assert "_x\u202e\n漢" in set(csv[f"../../{bad}.x y"])
    parquet = pd.read_parquet(folder / "tables" / "runs.parquet")
    assert sorted(parquet["threads"]) == ["4", "4", "8/3"]


@pytest.mark.parametrize("values", [[2**70, 1], [2**53 + 1, 1.5], [True, None], [3, 2.5]])
def test_a_table_holds_integers_of_any_size(tmp_path, values):
    """As text in place of numbers that Parquet cannot hold exactly."""
    _save_table(pd.DataFrame({"x": pd.Series(values, dtype=object)}), tmp_path / "t")
    kept = pd.read_parquet(tmp_path / "t.parquet")["x"]
    exact = max(map(abs, filter(None, values))) < 2**53
    assert [*kept] == (values if exact else [str(value) for value in values])


def test_the_folder_of_a_table_need_not_be_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    _save_table(pd.DataFrame({"x": [1]}), folder / "t")
    assert {path.name for path in folder.iterdir()} == {"t.csv", "t.parquet"}


@pytest.mark.parametrize("n_runs", [1, 2])
def test_a_report_parses_each_record_once(make, tmp_path, monkeypatch, n_runs):
    made = [make(f"r{i}", seed=i).directory for i in range(n_runs)]
    load, read = RunRecord.load, []
    monkeypatch.setattr(RunRecord, "load", lambda path: read.append(path) or load(path))
    gather(tmp_path / "runs")
    assert read == made


def test_only_a_report_is_replaced(make, tmp_path):
    make("a", steps=())
    folder, _ = report(tmp_path, output=tmp_path / "out")
    (folder / "figures" / "stale.svg").write_text("old")
    (folder / "notes.txt").write_text("mine")
    report(tmp_path, output=tmp_path / "out")
    assert not (folder / "figures" / "stale.svg").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(StoreError, match="may only replace an earlier report"):
        write_report(tmp_path / "runs", tmp_path / "runs")
    assert not (tmp_path / "runs" / "figures").exists()


def test_invalid_input_gives_one_message(make, tmp_path):
    with pytest.raises(StoreError, match="there is none at"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"none was found under .*empty"):
        write_report(tmp_path / "empty")
    with pytest.raises(StoreError, match="none was found under no path"):
        write_report([])
    assert not (tmp_path / "report").exists()
    make("a")
    with pytest.raises(ConfigError, match="window must be one of all, after_warmup, differences"):
        write_report(tmp_path / "runs", window="warmup")
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "report", tmp_path / (300 * "n")):
        with pytest.raises(StoreError, match=r"must be writable.*-o"):
            write_report(tmp_path / "runs", output)


def test_progress_goes_from_nothing_to_all(make, tmp_path):
    make("a", steps=())
    seen: list[tuple[str, int, int]] = []
    report(tmp_path, progress=lambda *step: seen.append(step))
    assert seen[0] == ("reading runs", 0, 3)
    assert seen[-1][1] == seen[-1][2]
    work = [what for what, _, _ in seen]
    assert list(dict.fromkeys(work))[-3:] == ["writing tables", "writing the page", "done"]
    assert work.count("writing tables") > 1  # of which a log has one line


def test_a_figure_is_drawn_once_for_each_file_and_both_are_those_of_savefig(
    make, tmp_path, monkeypatch
):
    monkeypatch.setattr("nerve.report.write.PNG_DPI", PNG_DPI)  # that of real reports
    make("a")
    drawing = gather(tmp_path / "runs").drawings[0]
    figure, expected = drawing.draw(), drawing.draw()
    with matplotlib.rc_context({"svg.hashsalt": "the same names"}):
        with mock.patch.object(figure, "draw", wraps=figure.draw) as draw:
            _save(figure, tmp_path / "figure")
        assert draw.call_count == 2
        expected.savefig(tmp_path / "expected.png", dpi=PNG_DPI)
        expected.set_layout_engine("none")  # that of the PNG is the one of both
        expected.savefig(tmp_path / "expected.svg", metadata={"Date": None})
    for suffix in (".png", ".svg"):
        written = (tmp_path / f"figure{suffix}").read_bytes()
        assert written == (tmp_path / f"expected{suffix}").read_bytes()


def test_reports_do_not_import_pyplot_and_torch():
    code = (
        "import sys, nerve.report.write;"
        "print({'matplotlib.pyplot', 'torch', 'hydra'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("steps", [(0,), (0, 10), (5, 5)])
def test_steps_of_several_runs_are_refused(tmp_path, make_run, steps):
    """Steps select the spectra of a single run; nothing is written."""
    for name in ("a", "b", "c"):
        make_run(tmp_path / "runs" / name)
    with pytest.raises(
        ConfigError, match=f"for a single run; got {', '.join(map(str, steps))} for 3 "
    ):
        write_report(tmp_path / "runs", tmp_path / "report", steps=steps)
    assert not (tmp_path / "report").exists()
