"""The options of groups: one is chosen where one is taken, and what they share is the same."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from nerve.cli.config.compose import CONF, SWEEPS
from nerve.cli.config.hydra_internals import ConfigLoaderImpl
from nerve.cli.config.overrides import refuse_lists
from nerve.errors import ConfigError


def parsed(*overrides: str):
    return OverridesParser.create().parse_overrides(list(overrides))


LISTS = [
    ("activation=[gelu,relu]", "activation=gelu,relu"),
    ("normalization=[preln]", "normalization=preln"),
    ("+optimizer=[adamw,muon]", "optimizer=adamw,muon"),
    ("model=[gpt_tiny,gpt_mini],[gpt_tiny]", "model=gpt_tiny,gpt_mini,gpt_tiny"),
    ("data=[digits,cifar100]", "data=digits,cifar100"),
    ("hydra/sweeper=[cells,basic]", "hydra/sweeper=cells,basic"),
    ("design=[preln_gelu,normfree_gelu]", "design=preln_gelu,normfree_gelu"),
    ("scale/paper=[cpu,gpu]", "scale/paper=cpu,gpu"),
]


@pytest.mark.parametrize(("override", "meant"), LISTS)
def test_a_list_for_a_group_is_refused_with_a_suggestion(override, meant):
    with pytest.raises(ConfigError, match="takes one option; got a list") as error:
        refuse_lists(parsed("seed=0", override))
    assert f"-m {meant}" in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "logger=[csv,wandb]",
        "activation=gelu,relu",
        "checkpoint.keep=[0,100]",
        "monitor.layers=[0,1]",
        "data.corpus.roots=[stdlib,site-packages]",
        "callbacks=[a,b]",
        "hydra/callbacks=[a,b]",
        "of_my_own=[a,b]",
        "~activation",
    ],
)
def test_other_lists_and_groups_with_several_options_are_accepted(override):
    refuse_lists(parsed(override))


@pytest.mark.parametrize(
    "override",
    [
        *(
            "model=null",
            "optimizer=null",
            "logger=null",
            "activation=5",
            "data=true",
            "+design=1.5",
        ),
        "activation=gelu,null",
        "logger=[csv,1]",
        "logger=[[csv]]",
        "logger=[null]",
    ],
)
def test_a_value_that_names_no_option_is_refused(override):
    """Hydra would raise a ValueError that names no group."""
    with pytest.raises(ConfigError, match="takes the name of an option; got") as error:
        refuse_lists(parsed("seed=0", override))
    assert override in str(error.value)


def test_an_argument_without_a_key_is_refused():
    with pytest.raises(ConfigError, match=r"must be key=value; got '=3', which has no key"):
        refuse_lists(parsed("=3"))


def test_every_shipped_group_is_known():
    groups = {path.parent for root in (CONF, SWEEPS) for path in root.rglob("*/*.yaml")}
    assert len(groups) > 10
    for folder in groups:
        root = CONF if folder.is_relative_to(CONF) else SWEEPS
        group = folder.relative_to(root).as_posix()
        if group != "logger":
            with pytest.raises(ConfigError, match=f"^{group} takes one option"):
                refuse_lists(parsed(f"{group}=[a,b]"))


SWEEP = """
defaults: [config, _self_{more}]
hydra:
  mode: MULTIRUN
  sweeper:
    params: {params}
"""


@pytest.mark.parametrize(
    ("more", "params", "arguments"),
    [
        ("", "{activation: [gelu, relu]}", []),
        ("", "{seed: '0,1', ffn: [dense, gated]}", []),
        ("", "{seed: '0'}", ["+hydra.sweeper.params.position=[rope,alibi]"]),
        ("", "{}", ["activation=[gelu,relu]"]),
        ("", "{}", ["activation=[gelu,relu],silu"]),
        (", override activation: [gelu, relu]", "{seed: '0,1'}", []),
        (", override optimizer: [adamw, muon]", "{seed: '0,1'}", ["seed=0"]),
    ],
)
def test_a_sweep_with_a_list_of_options_is_refused_before_it_starts(
    run, tmp_path, more, params, arguments
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(SWEEP.format(more=more, params=params))
    status, out, err = run("--config-dir=own", "--config-name=mine", *arguments, "check=true")
    assert status == 1
    assert "takes one option; got a list" in err
    assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("override", ["activation=[gelu,relu]", "trainer=[cpu]"])
def test_a_run_with_a_list_of_options_leaves_no_directory(run, tmp_path, override):
    status, _, err = run(override)
    assert (status, list(tmp_path.iterdir())) == (1, [])
    assert err.startswith("nerve-run: ")
    assert "takes one option; got a list" in err


@pytest.fixture(params=["--config-dir={}", "hydra.searchpath=[file://{}]"])
def own_files(request, tmp_path) -> str:
    """The argument that adds the user's options `both`, which has a list, and `one`."""
    folder = tmp_path / "own" / "design"
    folder.mkdir(parents=True)
    for name, options in (("both", "[gelu, relu]"), ("one", "relu")):
        text = f"# @package _global_\ndefaults: [override /activation: {options}]"
        (folder / f"{name}.yaml").write_text(text)
    return request.param.format(folder.parent)


@pytest.mark.parametrize("more", [(), ("seed=0,1", "-m")])
def test_a_list_of_options_in_a_file_of_the_user_is_refused(run, tmp_path, own_files, more):
    status, _, err = run(own_files, "+design=both", *more)
    assert (status, [path.name for path in tmp_path.iterdir()]) == (1, ["own"])
    assert err.startswith("nerve-run: activation takes one option; got a list, [gelu,relu]")


def test_an_option_in_a_file_of_the_user_is_run(run, experiments, own_files):
    assert run(own_files, "+design=one")[0] == 0
    assert [config.activation.name for config, _ in experiments] == ["relu"]


def test_no_shipped_file_has_a_list_of_options():
    """This is why nothing is looked for among shipped files."""
    n_found = 0
    for path in [path for root in (CONF, SWEEPS) for path in root.rglob("*.yaml")]:
        defaults = OmegaConf.to_container(OmegaConf.load(path)).get("defaults", [])
        options = [each for each in defaults if isinstance(each, dict)]
        groups = [group.split()[-1].lstrip("/") for each in options for group in each]
        assert len(set(groups)) == len(groups), path
        for group, option in ((group, each[group]) for each in options for group in each):
            assert isinstance(option, str) or group.split()[-1] == "logger", path
        n_found += len(groups)
    assert n_found > 50


def test_a_start_with_shipped_files_alone_composes_no_further_defaults(
    run, experiments, monkeypatch
):
    monkeypatch.setattr(ConfigLoaderImpl, "compute_defaults_list", lambda *_: pytest.fail("done"))
    assert run("seed=1")[0] == 0
    assert len(experiments) == 1


def test_presets_share_the_keys_that_do_not_distinguish_them():
    """Each is written out, since a file for the common part would be an option of its own."""
    texts = [path.read_text() for path in (CONF / "data").glob("*.yaml")]
    of_text = {text.partition("\nseq_len:")[2] for text in texts if "TextDataModule" in text}
    of_images = {text.partition("\nbatch_size:")[2] for text in texts if "ImageData" in text}
    optimizers = [path.read_text() for path in (CONF / "optimizer").glob("*.yaml")]
    schedules = {text.partition("\nschedule:")[2] for text in optimizers}
    rests = {text.partition("\n  rest:")[2] for text in optimizers} - {""}
    assert len(of_text) == len(schedules) == len(rests) == 1
    assert len({text.partition("\n")[2] for text in of_images}) == 1
