"""Bundles are exported once a session; exporting one takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.once import make_once

from dynamo_export import export as pipeline
from dynamo_export import export_bundle
from dynamo_export.build import Built, build_graphs
from dynamo_export.graph import InspectedModel
from dynamo_export.weights import WeightStore

torch.set_num_threads(1)  # the models are so small that threads only wait for each other


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the checkpoint with one of `checkpoints.CONFIGS`, `JOINT` or `LOOK_AHEAD`, made on first use."""

    def get(name: str) -> Path:
        def make(folder: Path) -> Path:
            if name not in checkpoints.CONFIGS:
                return checkpoints.save_drafter(folder, name)
            config, drafting = checkpoints.CONFIGS[name], checkpoints.DRAFTING.get(name, {})
            return checkpoints.save_multi(folder, config, checkpoints.heads_of(name), **drafting)

        return make_once(tmp_path_factory, f"checkpoint-{name}", make)

    return get


@pytest.fixture(scope="session")
def bundle(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the bundle exported, through the gate, from one of those checkpoints; treat as read-only."""

    def get(name: str) -> Path:
        source = checkpoint(name)
        return make_once(
            tmp_path_factory, f"bundle-{name}", lambda folder: export_bundle(folder / "model.onnx", source)
        )

    return get


@pytest.fixture(scope="session")
def built() -> dict[Any, Built]:
    """The graphs of `built_once`, by what they depend on."""
    return {}


@pytest.fixture
def built_once(built: dict[Any, Built], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the matter is what lies around the graph: models of one shape, with the same weights, are traced once."""

    def get(inspected: InspectedModel) -> Built:
        key = inspected.exported.topology, inspected.context_length, type(inspected.base)
        if key not in built:
            built[key] = build_graphs(inspected)
        first = built[key]
        drafter = None if first.drafter is None else first.drafter.clone()
        return Built(first.base.clone(), drafter, WeightStore())  # which the export empties

    monkeypatch.setattr(pipeline, "build_graphs", get)
