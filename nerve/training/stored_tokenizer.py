"""The tokenizer of a stored run, from the token cache."""

import os
import shlex
from collections.abc import Mapping

from tokenizers import Tokenizer

from nerve.data.cache import cache_root, cached_tokenizer
from nerve.errors import DataError, StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.record_file import RECORD_NAME


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of a run, which encodes a text as the run's data was encoded.

    It is found in the token cache by its fingerprint in run.json; the text of the run is neither
    needed nor read. Nothing is added to a text, and special tokens in it are ordinary text;
    `separator_token` in run.json is the token that ended each document.

    Args:
        directory: the run directory.

    Raises:
        StoreError: if there is no such run, or nerve-run has not trained it on text.
        DataError: if the cache has no tokenizer with the run's fingerprint.
    """
    record = RunDirectory(directory).require_record()
    fingerprint, data = record.fingerprints.get("tokenizer"), record.config.get("data")
    if fingerprint is None or not isinstance(data, Mapping):
        raise StoreError(
            "nerve-run records the tokenizer of a run on text once the text is read; run "
            f"{record.run_id} in {record.directory} has none (it is {record.run_status}, at step "
            f"{record.step}). Choose a run on text; the tokenizer of a model that was only "
            "measured is where its weights are."
        )
    roots = dict.fromkeys([cache_root(data.get("cache_dir")), cache_root()])
    for root in roots:
        if (tokenizer := cached_tokenizer(root, fingerprint)) is not None:
            return tokenizer
    raise DataError(
        f"The tokenizer of a run is read from the token cache, by its fingerprint in {RECORD_NAME};"
        f" that of run {record.run_id} in {record.directory} is {fingerprint}, which no sound "
        f"entry of {' or '.join(map(str, roots))} has. Set NERVE_CACHE to the cache that the run "
        f"used, or tokenize its text again with nerve-probe {shlex.quote(str(record.directory))}."
    )
