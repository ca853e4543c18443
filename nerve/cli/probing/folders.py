"""Checkpoints that transformers can read, measured on text."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerve.cli.probing.hub import check_hub
from nerve.cli.probing.machine import device_of, dtype_of
from nerve.cli.probing.networks import columns, n_embedded, text_config
from nerve.cli.probing.places import (
    arguments_of,
    check_place,
    expanded,
    is_on_hub,
    name_of,
)
from nerve.cli.probing.source import Checkpoint, Data, ProbeArguments
from nerve.cli.probing.steps import steps_of
from nerve.config import require, require_left
from nerve.data.corpus import Corpus, python_source
from nerve.data.extras import import_extra
from nerve.data.files import text_files
from nerve.data.packing import pack
from nerve.errors import DataError
from nerve.measuring.find import find_ffns
from nerve.measuring.found import FoundFFNs
from nerve.measuring.groups import Grouped
from nerve.measuring.streams import UNLABELED, count_tokens
from nerve.metric_names import SAMPLES_PER_DIMENSION

LONGEST = 1024
"""Tokens per sequence, if the model accepts as many."""

BATCH_SIZE = 4
"""Sequences per batch."""

_AUTO = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModel")


class Folders:
    """A transformers model, or a series of its checkpoints.

    Args:
        args: the arguments of the command.

    Raises:
        DataError: for what cannot be a model.
        ConfigError: for invalid steps, device or dtype.
    """

    def __init__(self, args: ProbeArguments) -> None:
        self._args = args
        self._device = device_of(args.device)
        self._dtype = dtype_of(args.dtype)
        places = expanded(args.models)
        self._refused = _refused(places)
        remote = [place for place in places if is_on_hub(place)]
        if args.tokenizer is not None and is_on_hub(args.tokenizer, "A tokenizer is a folder"):
            remote.append(args.tokenizer)
        steps = steps_of(places, args.steps)
        self.name = name_of(places)
        self.checkpoints = sorted(map(Checkpoint, steps, places))
        self._transformers = import_extra("transformers", "hf", "A model of transformers")
        self._transformers.logging.set_verbosity_error()
        self._transformers.logging.disable_progress_bar()
        check_hub(remote)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model, in eval mode.

        Raises:
            DataError: for an architecture that transformers does not know or that takes no tokens,
                and weights that are unreadable, missing or of the wrong shape.
        """
        if checkpoint.place in self._refused:
            raise self._refused[checkpoint.place]
        where, extra = arguments_of(checkpoint.place)
        auto = self._transformers.AutoConfig
        config = self._read(checkpoint, lambda: auto.from_pretrained(where, **extra))
        network = self._network(checkpoint, config)
        # This name works in every version; 4.x reads float32 by default.
        extra["torch_dtype" if self._version < 5 else "dtype"] = self._dtype or "auto"
        model, found = self._read(
            checkpoint, lambda: network.from_pretrained(where, output_loading_info=True, **extra)
        )
        lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        if lacking:
            raise DataError(
                f"A checkpoint must contain all weights of its model; {checkpoint.place} lacks "
                f"{', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}, or has them in "
                f"other shapes than {network.__name__}. Restore it, or name the right class as "
                "architectures in its config.json."
            )
        return model.to(self._device).eval()

    def find(self, model: nn.Module) -> FoundFFNs:
        """The requested FFNs."""
        layers, select = self._args.layers, self._args.select
        n_tokens = min(16, self._seq_len(model))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(n_embedded(model), (2, n_tokens), generator=generator)
        batch = _batch(model, ids.to(self._device))
        return find_ffns(model, batch, layers=layers, select=select)

    def data(self, model: nn.Module, ffns: FoundFFNs) -> Data:
        """The text, as sequences of tokens.

        Raises:
            ConfigError: if the positions to skip are a whole sequence.
            DataError: for a tokenizer that is missing, or another model's, and text that cannot
                be read or is too short.
        """
        args, seq_len = self._args, self._seq_len(model)
        skip_first, batch_size = args.skip_first or 0, args.batch_size or BATCH_SIZE
        require_left("--skip-first", skip_first, "--seq-len", seq_len)
        table = ffns.table()
        n_tokens = args.n_tokens or SAMPLES_PER_DIMENSION * int(table["d_ff"].max())
        tokenizer = self._tokenizer()
        n_sequences = math.ceil(n_tokens / seq_len)
        corpus = _corpus(args)
        text = pack(corpus, tokenizer, seq_len=seq_len, n_sequences=n_sequences)
        if text.sequences.max() >= n_embedded(model):
            raise DataError(
                f"A tokenizer belongs to its model; this one gives the token "
                f"{text.sequences.max()}, and the model embeds {n_embedded(model)}. Give the "
                "model's own with --tokenizer."
            )
        ids = torch.from_numpy(text.sequences).to(self._device)
        batches = [_batch(model, part) for part in ids.split(batch_size)]
        groups, sites = args.groups or (), args.sites or ()
        counts = count_tokens(batches) if "frequency" in groups else None
        dtype = next(model.parameters()).dtype
        probe = {
            "n_tokens": ids.numel(),
            "seq_len": seq_len,
            "batch_size": batch_size,
            **args.as_recorded(dtype, skip_first, groups, sites, text.fingerprints),
        }
        return Data(
            batches=batches,
            forward=self._forward(model),
            config={**columns(model, ffns), "probe": probe},
            record={"fingerprints": text.fingerprints, "unigram_loss": text.unigram_loss},
            skip_first=skip_first,
            grouped=Grouped(groups, counts),
            sites=sites,
            text=corpus.name,
        )

    @property
    def _version(self) -> int:
        return int(self._transformers.__version__.partition(".")[0])

    def _read(self, checkpoint: Checkpoint, read: Callable[[], Any]) -> Any:
        """Calls transformers to read something, and turns its errors into one message."""
        try:
            return read()
        except ImportError as error:
            raise DataError(
                f"{checkpoint.place} needs a package that is not installed: {_first_line(error)}. "
                'In the checkout of nerve: pip install -c constraints.txt -e ".[hf]"'
            ) from error
        except Exception as error:  # a damaged file may cause any exception
            is_here = Path(checkpoint.place).exists()
            where = "" if is_here else "is not a folder here, and on the hub "
            raise DataError(
                f"A model must be readable by transformers; {checkpoint.place} {where}cannot be "
                f"read by transformers {self._transformers.__version__}: {_first_line(error)}"
            ) from error

    def _network(self, checkpoint: Checkpoint, config: Any) -> Any:
        """The class of the network that the weights belong to."""
        named = config.architectures or ()
        classes = [getattr(self._transformers, name, None) for name in named]
        for auto in _AUTO:
            mapping = getattr(self._transformers, auto)._model_mapping
            classes += [mapping[type(config)]] if type(config) in mapping else []
        network: Any = next((each for each in classes if isinstance(each, type)), None)
        if network is None:
            raise DataError(
                f"A model's architecture is one of transformers; {checkpoint.place} has "
                f"{', '.join(named) or config.model_type}. In Python nerve.measure takes any model."
            )
        if network.main_input_name != "input_ids":
            raise DataError(
                f"nerve-probe measures on text; {network.__name__} takes "
                f"{network.main_input_name}, not tokens. In Python nerve.measure(model, batches) "
                "takes any batches."
            )
        return network

    def _tokenizer(self) -> Any:
        """The requested one, or that of the first checkpoint that has one."""
        own = [each.place for each in self.checkpoints if each.place not in self._refused]
        places = own if self._args.tokenizer is None else [self._args.tokenizer]
        errors = []
        for place in places:
            where, extra = arguments_of(place)
            try:
                tokenizer = self._transformers.AutoTokenizer.from_pretrained(where, **extra)
                if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
                    raise ValueError("its vocabulary is empty")
                return tokenizer
            except Exception as error:  # it may be of any kind
                errors.append(error)
        raise DataError(
            f"Text needs the model's tokenizer; {arguments_of(places[0])[0]} has none that "
            f"transformers reads ({_first_line(errors[0])}). Put its files there, or point "
            "--tokenizer at them."
        ) from errors[0]

    def _seq_len(self, model: nn.Module) -> int:
        """The requested length, or by default what the model accepts, up to `LONGEST`."""
        longest = getattr(text_config(model), "max_position_embeddings", None)
        if self._args.seq_len is None:
            return min(LONGEST, longest or LONGEST)
        require(
            longest is None or self._args.seq_len <= longest,
            f"--seq-len must not exceed the positions of the model, {longest}; got "
            f"{self._args.seq_len}.",
        )
        return self._args.seq_len

    def _forward(self, model: nn.Module) -> Callable[[nn.Module, Any], object]:
        """Returns the forward function, which gives a loss only for causal language models."""
        mapping = self._transformers.AutoModelForCausalLM._model_mapping
        kind = type(model.config)
        if not (kind in mapping and mapping[kind] is type(model)):
            return lambda model, batch: model(**batch)

        def forward(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
            # Not computed by the model: transformers 4 then keeps it in memory.
            logits, ids = model(**batch).logits.flatten(0, 1), batch["input_ids"]
            targets = F.pad(ids[:, 1:], (0, 1), value=UNLABELED)  # avoids copying the logits
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            loss = F.cross_entropy(logits, targets.flatten())
            return {"loss": loss, "n_targets": ids[:, 1:].numel()}

        return forward


def _refused(places: Sequence[str]) -> dict[str, DataError]:
    """The places that cannot be models, with the reasons; raises the first if there are no others,
    as for a single model."""
    refused = {}
    for place in places:
        try:
            check_place(place)
        except DataError as error:
            refused[place] = error
    if len(refused) == len(places):
        raise refused[places[0]]
    return refused


def _batch(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config: Any = model.config
    if config.is_encoder_decoder:
        batch |= {f"decoder_{key}": value for key, value in batch.items()}
    return batch


def _corpus(args: ProbeArguments) -> Corpus:
    return python_source() if args.text is None else text_files(args.text)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
