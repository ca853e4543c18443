"""`nerve.watch`: measures a model during a plain training loop, and records the run."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nerve.config import require, require_count
from nerve.integrations.heldout import Forward, batches_of
from nerve.integrations.loop import WatchedLoop
from nerve.integrations.wrapping import device_of, unwrapped
from nerve.measuring.choice import Choice
from nerve.measuring.ffns import FFN
from nerve.measuring.find import find_ffns
from nerve.measuring.forward import call
from nerve.measuring.given import (
    check_given,
    explicit,
    require_mapping,
    require_model,
    told,
)
from nerve.measuring.masks import Masks
from nerve.measuring.streams import count_tokens
from nerve.recording.given import check_token_counts, watched_config
from nerve.recording.run import device_name, recorded_run, seed_of
from nerve.recording.settings import MonitorSettings

log = logging.getLogger(__name__)


@explicit(
    source="Give heldout= the batches to measure; without it, the training batches are measured.",
    select="Give ffns=nerve.find_ffns(model, batch, select=…).",
    labels="Give config=, which distinguishes your runs.",
)
def watch(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    every_n_steps: int | None = MonitorSettings.every_n_steps,
    steps: Sequence[int] | str | None = None,
    config: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    optimizer: Optimizer | None = None,
    heldout: Iterable[Any] | None = None,
    forward: Forward | None = None,
    mask: Callable[[Any], Masks] | None = None,
    exclude: Collection[int] = (),
    only_labeled: bool = False,
    ffns: Sequence[FFN] | None = None,
    layers: Sequence[int] | None = None,
    spectra: bool | str = MonitorSettings.spectra,
    shortcut: bool | str = MonitorSettings.shortcut,
    skip_first: int = MonitorSettings.skip_first,
    groups: Sequence[str] = (),
    groups_every: int = MonitorSettings.groups_every,
    sites: Sequence[str] = (),
    token_counts: Tensor | None = None,
    resume: Mapping[str, Any] | None = None,
    last_step: int | None = None,
) -> AbstractContextManager[WatchedLoop]:
    """Measures a model's FFNs at steps 0, k, 2k, … of a training loop, and records the run.

    ```
    config = {"optimizer": {"lr": lr}}
    with nerve.watch(model, "outputs/mine", config=config, heldout=val_batches) as run:
        for inputs, targets in batches:
            ...
            optimizer.step()
            run.step(loss, targets.numel())
    ```

    A row with step s holds the features computed with the weights after s steps: those of the next
    training batch, with all its micro-batches, in train mode; or those of held-out batches, in eval
    mode, in which case the last step is measured, too. Measuring draws no random numbers and leaves
    weights, gradients and modes unchanged. The run is done when the block ends; if the block
    raises, the run is failed or interrupted, and everything measured so far is stored.

    Several processes (DistributedDataParallel) pool their samples, and rank 0 records the run. All
    of them must make the same calls, including `state_dict`.

    Args:
        model: the module that the loop calls, with its weights at the first step; it may be
            compiled or distributed.
        directory: the run directory.
        every_n_steps: steps between measurements; None if `steps` gives all of them.
        steps: further single steps to measure, in any order; or `log:n`: n geometrically spaced
            steps from 1 to `last_step`, and step 0.
        config: anything that distinguishes your runs, by name: two runs with an equal configuration
            are repeats of one run, unless their seeds differ. The measurement settings are added as
            `monitor`, with the layers and names of `ffns`, but not what `mask` and `forward` do.
            Its `seed`, if it is an integer, is the seed of the run. A name of a column of
            `nerve.load_metrics`, such as `lr`, is for a value inside a group. Each value has a name
            of its own: `{"a.b": 1, "a": {"b": 2}}` is refused.
        fingerprints: hashes, or other texts, that identify the `corpus` and the `tokenizer` of the
            training text, and the `heldout` data, under these names; stored in the record, as
            nerve-run does, and as `text` in the configuration. Comparisons never pool runs that
            differ in corpus or tokenizer.
        optimizer: provides the learning rate of the rows; null without it, or if its groups differ.
        heldout: batches to measure instead of the training batches; with several processes, each
            gives its own part. Without them there is no validation loss, and comparisons of runs
            leave the run out (flag `no loss` of `nerve.flag_runs`).
        forward: runs the model on a held-out batch; by default `model(batch)`, or `model(**batch)`
            for a mapping. If the result has a `loss`, it is the validation loss, weighted by
            `n_targets` if the result has that, too.
        mask: returns a batch's mask, as in `nerve.measure`. A training batch is what the model is
            called with: its only argument, the tuple of its positional arguments, or the mapping of
            all keyword arguments. By default the attention masks among the arguments, by the names
            that the model gives them.
        exclude, only_labeled: as in `nerve.measure`.
        ffns: descriptions of the FFNs; None for those that `nerve.find_ffns` finds.
        layers: the layers in which to find FFNs; None for all.
        spectra: whether to store the eigenvalues, too; `auto` for d_ff up to 1024, since those of
            many steps take much space.
        shortcut, skip_first, groups, sites: as in `nerve.measure`. If a model does not declare its
            residual stream, it is looked for with the first held-out batch.
        groups_every: groups and sites are part of every n-th measurement, starting with the first.
        token_counts: number of occurrences of each token id in the training text, for groups by
            frequency; None counts the tokens of the held-out batches.
        resume: the result of `state_dict`; rows after its step are dropped. Without it, training
            and the run begin at step 0.
        last_step: the last step of training, required by `steps="log:30"`.

    Raises:
        ConfigError: for a setting that is out of range, or an argument of the wrong kind.
        MeasurementError: for a model without FFNs, or features, masks or descriptions that are
            inconsistent.
        StoreError: if the directory holds a run with another configuration, or one that is done or
            has measured something and is not continued.
    """
    settings = MonitorSettings.of(
        every_n_steps=every_n_steps,
        steps=steps,
        source="train" if heldout is None else "heldout",
        spectra=spectra,
        layers=layers,
        shortcut=shortcut,
        skip_first=skip_first,
        groups=groups,
        groups_every=groups_every,
        sites=sites,
    )
    check_given(ffns=ffns, mask=mask, forward=forward, exclude=exclude, layers=layers)
    check_token_counts(groups, token_counts, are_counted=heldout is not None)
    recorded = watched_config(
        directory,
        config,
        settings,
        fingerprints=fingerprints,
        mask=mask,
        exclude=exclude,
        only_labeled=only_labeled,
        ffns=ffns,
        token_counts=token_counts,
    )
    return _Watch(
        watched(
            model,
            directory,
            settings,
            recorded,
            optimizer=optimizer,
            batches=None if heldout is None else batches_of(heldout),
            forward=forward,
            mask=mask,
            ffns=ffns,
            resume=resume,
            last_step=last_step,
            fingerprints=fingerprints,
            token_counts=token_counts,
            how_to_resume="resume= and the state of a checkpoint",
        )
    )


class _Watch(AbstractContextManager[WatchedLoop]):
    """What `watch` returns: one run, which begins and ends with a `with` block."""

    def __init__(self, run: AbstractContextManager[WatchedLoop]) -> None:
        self._run: AbstractContextManager[WatchedLoop] = run
        self._was_entered = False

    def __enter__(self) -> WatchedLoop:
        require(
            not self._was_entered,
            "nerve.watch(...) is one run, for one with block; the same one was entered a second "
            "time. Call nerve.watch again, with resume= to continue the run.",
        )
        self._was_entered = True
        return self._run.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._run.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        require(
            name.startswith("_") or not hasattr(WatchedLoop, name),
            f"A watched loop is inside a with block; {name} was used without one. Write: with "
            "nerve.watch(...) as run.",
        )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@contextmanager
def watched(
    model: nn.Module,
    directory: str | os.PathLike[str],
    settings: MonitorSettings,
    config: Mapping[str, Any],
    *,
    optimizer: Optimizer | None,
    batches: Sequence[Any] | None,
    forward: Forward | None,
    mask: Callable[[Any], Masks] | None,
    ffns: Sequence[FFN] | None,
    resume: Mapping[str, Any] | None,
    last_step: int | None,
    how_to_resume: str,
    fingerprints: Mapping[str, str] | None,
    first: int = 0,
    token_counts: Tensor | None = None,
) -> Iterator[WatchedLoop]:
    """Implements `watch` for any kind of loop.

    Args:
        settings: those of the monitor.
        config: of the run, as of `watched_config`.
        batches: held-out batches; None to measure passes that the loop runs, in train or eval mode
            depending on the source.
        how_to_resume: how the caller's user continues a run, as in `recorded_run`.
        first: the first step of a loop without `resume`.
        others: as in `watch`.
    """
    require_model(model)
    _check_loop(optimizer, resume, last_step)
    steps = settings.measured_steps(last_step)
    if resume is None and first == 0:
        settings.require_some(last_step)
    choose = partial(
        Choice,
        mask=mask,
        exclude=config["monitor"]["exclude"],
        only_labeled=config["monitor"]["only_labeled"],
        skip_first=settings.skip_first,
        groups=settings.groups,
    )
    inner = unwrapped(model)
    if ffns is None:
        example = None if batches is None else batches[0]
        found = find_ffns(inner, example, layers=settings.layers, forward=forward)
        log.info("FFNs to measure:\n%s", str(found))  # a kept record would keep the model
        found.warn()
        ffns = found
    if "frequency" in settings.groups and token_counts is None and batches is not None:
        token_counts = count_tokens(batches)
    with recorded_run(
        directory,
        config,
        resume=resume is not None,
        how_to_resume=how_to_resume,
        seed=seed_of(config),
        fingerprints=dict(fingerprints or {}),
        n_parameters=sum(parameter.numel() for parameter in inner.parameters()),
        device=device_name(device_of(inner)),
    ) as recorded:
        loop = WatchedLoop(model, settings, steps, optimizer, recorded)
        try:
            loop.begin(model, ffns, choose, batches, forward or call, resume, first, token_counts)
            yield loop
            loop.end()
        except BaseException as error:
            loop.fail(error)
            raise
        finally:
            loop.close()


def _check_loop(optimizer: object, resume: object, last_step: object) -> None:
    """Raises `ConfigError` for arguments that `watch` does not accept."""
    require_mapping("resume", resume)
    names = [*resume] if isinstance(resume, Mapping) else ["n_steps"]
    require(
        "n_steps" in names,
        "resume must be what state_dict of a watched loop has returned; got a mapping with "
        f"{', '.join(names) or 'nothing'}. Leave it out to begin at step 0.",
    )
    require_count("last_step", last_step, or_null=True)
    require(
        optimizer is None or hasattr(optimizer, "param_groups"),
        "optimizer must be the optimizer of the loop, whose learning rate is recorded; got "
        f"{told(optimizer)}. Leave it out, or give the optimizer itself.",
    )
