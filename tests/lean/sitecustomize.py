"""Hides packages that no run needs, from an interpreter that finds this folder on PYTHONPATH.

As with a user who does not have them. torchmetrics, and so Lightning, imports each of them that it
finds, which takes two of the five seconds that a run needs to start. And what is imported stays: it
is looked through for garbage less often and not again at the end, which takes another. Torch's
compiler, which Lightning imports for the name of a class, waits until something is compiled.
"""

import atexit
import gc
import sys
from contextlib import nullcontext
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HIDDEN = ("matplotlib", "scipy", "transformers")
COMPILER = "torch._dynamo"

gc.set_threshold(100_000)
atexit.register(gc.freeze)

_version = metadata.version


def version(name: str) -> str:
    if name in HIDDEN:
        raise metadata.PackageNotFoundError(name)
    return _version(name)


class Later(ModuleType):
    """What a run that compiles nothing calls of torch's compiler. For any other name it is loaded;
    before what imports parts of it, call `load_compiler`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for them
            raise AttributeError(name)
        load_compiler()
        return getattr(import_module(self.__name__), name)


def load_compiler() -> None:
    """Loads it now."""
    if Hidden.later:
        Hidden.later = ()
        del sys.modules[COMPILER]
        import_module(COMPILER)


class Loader:
    """A loader of `Later`."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return Later(COMPILER)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        utils = Later(f"{COMPILER}.utils")
        vars(utils).update(counters={"frames": {}})
        vars(module).update(
            OptimizedModule=type("OptimizedModule", (), {}),
            disable=lambda function, *_, **__: function,
            graph_break=lambda: None,
            set_stance=lambda *_, **__: nullcontext(),
            utils=utils,
        )


class Hidden:
    """Finds none of them."""

    later: tuple[str, ...] = (COMPILER,)

    @staticmethod
    def find_spec(name: str, *_: Any) -> ModuleSpec | None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return ModuleSpec(name, Loader()) if name in Hidden.later else None


metadata.version = version
sys.meta_path.insert(0, Hidden)


def reveal() -> None:
    """Hides nothing any more, for what needs one of them in a process that was forked."""
    metadata.version = _version
    sys.meta_path.remove(Hidden)
