"""Checks once whether the Hugging Face hub responds, before transformers requests file after
file."""

from collections.abc import Sequence
from typing import Any

from nerve.cli.probing.places import arguments_of, near_names
from nerve.data.extras import import_extra
from nerve.errors import DataError

TIMEOUT_S = 5.0
"""Timeouts for connecting and for a response."""

_FILES = ("config.json", "tokenizer_config.json")
"""A model or tokenizer that was read before has one of these in the cache."""


def check_hub(places: Sequence[str]) -> None:
    """Refuses names on the hub if it cannot be reached and one of them is not cached.

    transformers would retry for half a minute. If the hub responds, transformers reports what it
    says, including that there is no such model.

    Args:
        places: `name` or `name@revision`, as `is_on_hub` lets them pass.

    Raises:
        DataError: for a name that no model on the hub can have, or without a response.
    """
    for place in places:
        hub = import_extra("huggingface_hub", "hf", "A model of the hub")
        name, how = arguments_of(place)
        try:
            if _is_cached(hub, name, how):
                continue
            hub.get_hf_file_metadata(hub.hf_hub_url(name, _FILES[0], **how), timeout=TIMEOUT_S)
        except hub.utils.HfHubHTTPError:  # a response, whatever it says
            return
        except Exception as error:  # connection errors differ between versions of the hub's client
            is_name = not isinstance(error, hub.utils.HFValidationError)
            where = (
                "the hub cannot be reached" if is_name else "there is none of that name on the hub"
            )
            raise DataError(
                f"{place} is not a folder here, and {where} ({error}).{near_names(place)} Check "
                "the path, or download the model elsewhere and give it as a folder."
            ) from error
        return


def _is_cached(hub: Any, name: str, how: dict[str, Any]) -> bool:
    return any(hub.try_to_load_from_cache(name, file, **how) is not None for file in _FILES)
