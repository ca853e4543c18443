"""Puts the commit, `+` when files differ from it, into what is built from a checkout."""

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """Fills `nerve/_commit.txt` in wheels and source distributions.

    Where none is known the file stays as it is.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # runs from the checkout, which says it itself
            return
        # The file alone: what the package imports is not installed where it is built.
        provenance = runpy.run_path(str(Path(self.root, "nerve", "storage", "provenance.py")))
        commit = provenance["git_commit"]()
        if commit is None:
            return
        if self.target_name == "sdist":  # a wheel has a record of its files
            commit += f" sha256:{provenance['files_digest'](Path(self.root))}"
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name, provenance["COMMIT_FILE"])
        file.write_text(f"{commit}\n")
        build_data["force_include"][str(file)] = f"nerve/{file.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()
