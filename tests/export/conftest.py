"""Bundles are exported once a session; exporting one takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import checkpoints

from dynamo_export import export_bundle

torch.set_num_threads(1)  # the models are so small that threads only wait for each other


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the checkpoint with one of `checkpoints.CONFIGS`, `JOINT` or `LOOK_AHEAD`, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / name
            if name in checkpoints.CONFIGS:
                config, drafting = checkpoints.CONFIGS[name], checkpoints.DRAFTING.get(name, {})
                made[name] = checkpoints.save_multi(folder, config, checkpoints.heads_of(name), **drafting)
            else:
                made[name] = checkpoints.save_drafter(folder, name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def bundle(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the bundle exported, through the gate, from one of those checkpoints; treat as read-only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            graph = export_bundle(tmp_path_factory.mktemp("bundle") / "out" / "model.onnx", checkpoint(name))
            made[name] = graph.parent
        return made[name]

    return get
