"""Completes the bundle that ships with the runtime by what it has in common with the checkpoint it was exported from.

Tokenizer and n-gram counts are kept once in the repository; every build, editable ones too, copies them.
"""

import shutil
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CHECKPOINT = Path("model/dynamo_model/default")
BUNDLE = Path("runtime/dynamo_runtime/default")
SHARED = ("cooccurrence.npz", "tokenizer.json")


class CompleteDefaultBundle(BuildHookInterface):
    """Copies the files before anything is collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See the module."""
        for name in SHARED:
            shutil.copyfile(Path(self.root, CHECKPOINT, name), Path(self.root, BUNDLE, name))
