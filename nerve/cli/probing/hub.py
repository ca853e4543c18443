"""Whether the hub answers, asked once before transformers asks it for file after file."""

from collections.abc import Sequence
from typing import Any

from nerve.cli.probing.places import arguments_of, near_names
from nerve.data.extras import import_extra
from nerve.errors import DataError

TIMEOUT_S = 5.0
"""For a connection, and for an answer."""

_FILES = ("config.json", "tokenizer_config.json")
"""Of which a model or a tokenizer that was read before has one in the cache."""


def check_hub(places: Sequence[str]) -> None:
    """Refuses names on the hub where it cannot be reached and one of them is not cached.

    transformers would try again for half a minute. What the hub answers, also that it has no such
    model, transformers says.

    Args:
        places: `name` or `name@revision`, as `is_on_hub` lets them pass.

    Raises:
        DataError: for a name that no model of the hub can have, and without an answer.
    """
    for place in places:
        hub = import_extra("huggingface_hub", "hf", "A model of the hub")
        name, how = arguments_of(place)
        try:
            if _is_cached(hub, name, how):
                continue
            hub.get_hf_file_metadata(hub.hf_hub_url(name, _FILES[0], **how), timeout=TIMEOUT_S)
        except hub.utils.HfHubHTTPError:  # an answer, whatever it says
            return
        except Exception as error:  # versions of the hub's client differ in those of connections
            is_name = not isinstance(error, hub.utils.HFValidationError)
            where = (
                "the hub cannot be reached" if is_name else "there is none of that name on the hub"
            )
            raise DataError(
                f"{place} is no folder here, and {where} ({error}).{near_names(place)} Check the "
                "path, or download the model elsewhere and give it as a folder."
            ) from error
        return


def _is_cached(hub: Any, name: str, how: dict[str, Any]) -> bool:
    return any(hub.try_to_load_from_cache(name, file, **how) is not None for file in _FILES)
