"""Drafters stored at 8 bits: how exact, as int8 bundles have them, and what is no such file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints

from dynamo_model import CheckpointError, CPModel, LookAheadModel, MultiTokenModel
from dynamo_model.eight_bits import BLOCK, FORM, from_eight_bits, to_eight_bits
from dynamo_quantize.blocks import Format, round_to_nearest

HEADER = {"kind": "parallel", "format": "pt", "n_heads": "3", "storage": FORM}


def naive(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is stored of a matrix [outputs, inputs], number by number: values, and half a step of each block."""
    values, half_steps = np.zeros_like(matrix), np.zeros_like(matrix)
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], BLOCK):
            block = matrix[row, start : start + BLOCK]
            largest = max(block, key=abs)
            if largest == 0:
                continue
            step = np.float32(largest) / np.float32(-128)
            for i, value in enumerate(block):
                whole = min(max(round(float(value) / float(step)), -128), 127)
                values[row, start + i], half_steps[row, start + i] = np.float32(whole) * step, abs(step) / 2
    return values, half_steps


def random(*shape: int) -> torch.Tensor:
    """Numbers of very different size, whole rows of zeros among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(*shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator)
    matrix[..., 1, :] = 0
    return matrix


@pytest.mark.parametrize("inputs", [64, 192, 100, 7])
def test_round_trip(inputs: int) -> None:
    """Number by number what a naive loop finds, half a step off at most, or a whole one at the range's upper end."""
    matrix = random(5, inputs)
    stored = to_eight_bits({"w": matrix})
    assert stored["w"].dtype == torch.int8 and stored["w"].shape == matrix.shape
    assert stored["w.scales"].dtype == torch.float32 and stored["w.scales"].shape == (5, -(-inputs // BLOCK))
    back = from_eight_bits(stored, Path("file"))
    assert back.keys() == {"w"} and back["w"].dtype == torch.float32
    values, half_steps = naive(matrix.numpy())
    np.testing.assert_array_equal(back["w"].numpy(), values)
    off, ends = np.abs(values - matrix.numpy()), stored["w"].numpy() == 127
    assert (off <= half_steps * 1.0001 + ends * half_steps).all() and off.max() > 0


@pytest.mark.parametrize("inputs", [128, 96])
def test_rounding_again_changes_nothing(inputs: int) -> None:
    """The export to int8 finds the numbers that it finds in the weights as trained; so does storing them again."""
    matrix = random(24, inputs)
    stored = to_eight_bits({"w": matrix})
    back = from_eight_bits(stored, Path("file"))["w"]
    once, twice = (round_to_nearest(each.numpy().T, Format(8, BLOCK)) for each in (matrix, back))
    np.testing.assert_array_equal(twice.packed, once.packed)
    np.testing.assert_array_equal(twice.scales, once.scales)
    again = to_eight_bits({"w": back})
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_what_is_no_matrix_stays() -> None:
    """Norms, ids, and the numbers of an expert's matrices as those of any."""
    tensors = {"norm": torch.randn(8), "ids": torch.arange(6), "table": torch.ones(2, 3, dtype=torch.int64)}
    stored = to_eight_bits(tensors)
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)
    experts = random(3, 4, 100)
    back = from_eight_bits(to_eight_bits({"w": experts}), Path("file"))["w"]
    for expert, its in zip(experts, back, strict=True):
        np.testing.assert_array_equal(its.numpy(), naive(expert.numpy())[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with every drafter beside it, in fp32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    base = checkpoints.random_base(checkpoints.CONFIGS["llama-grouped"])
    model = MultiTokenModel(base, 3, draft_vocabulary=torch.tensor([5, 0, 300, 7]), conditioned=True)
    for condition in model.conditions:
        torch.nn.init.normal_(condition.out.weight)
    model.save(folder)
    CPModel(base, 3, 2).save(folder)
    LookAheadModel(base, 2).save(folder)
    return folder


@pytest.mark.parametrize("drafter", [MultiTokenModel, CPModel, LookAheadModel])
def test_every_drafter_loads(drafter: type[MultiTokenModel], folder: Path, tmp_path: Path) -> None:
    """From either form of its file, by the same names and shapes; the stored one is a quarter as large."""
    tensors, shape = drafter.read(folder)
    drafter.write(tmp_path, tensors, shape, eight_bits=True)
    base = checkpoints.random_base(checkpoints.CONFIGS["llama-grouped"])
    base.save_pretrained(tmp_path)
    loaded = drafter.load(tmp_path)
    assert loaded.shape == shape
    for name, tensor in loaded.drafter_state_dict().items():
        matrix = tensor.ndim > 1
        expected = torch.from_numpy(naive(tensors[name].numpy())[0]) if matrix else tensors[name]
        assert torch.equal(tensor, expected), name
        assert matrix != torch.equal(tensor, tensors[name]), name
    if drafter is MultiTokenModel:  # the others' are too small for the header not to count
        assert (tmp_path / drafter.file).stat().st_size < 0.31 * (folder / drafter.file).stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2.condition.out.weight.scales": None}, r"is damaged: '2\.condition\.out\.weight' has no scales"),
        ({"2.condition.out.weight": None}, r"is damaged: '2\.condition\.out\.weight\.scales' fits no matrix"),
        ({"2.condition.out.weight.scales": torch.ones(64, 3)}, "fits no matrix of whole numbers"),
        ({"2.condition.out.weight": torch.ones(64, 64)}, "fits no matrix of whole numbers"),
        ({"extra.scales": torch.ones(3, 1)}, r"'extra\.scales' fits no matrix"),
    ],
)
def test_damaged_files(change: dict[str, torch.Tensor | None], message: str, folder: Path, tmp_path: Path) -> None:
    """One line each."""
    checkpoints.random_base(checkpoints.CONFIGS["llama-grouped"]).save_pretrained(tmp_path)
    tensors, shape = MultiTokenModel.read(folder)
    MultiTokenModel.write(tmp_path, tensors, shape, eight_bits=True)
    path = tmp_path / MultiTokenModel.file
    changed = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(changed, path, metadata=HEADER)
    with pytest.raises(CheckpointError, match=message) as raised:
        MultiTokenModel.load(tmp_path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_a_form_that_is_not_known(folder: Path, tmp_path: Path) -> None:
    """Is of a later version."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({"x": torch.ones(1)}, tmp_path / "heads.safetensors", metadata=HEADER | {"storage": "int2"})
    with pytest.raises(CheckpointError, match=r"heads\.safetensors is stored as 'int2', which .*: install a newer one"):
        MultiTokenModel.read(tmp_path)
