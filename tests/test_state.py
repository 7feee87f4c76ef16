"""A state comes back as it was saved, and only to the run that saved it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmq_ao.config import InvalidFile
from dmq_ao.serialization.checkpoint import Checkpoint, load_state, save_state

META = {"step": 3, "best": 0.25, "names": ["a", "b"]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_what_is_saved_is_what_is_loaded(dtype: torch.dtype, file: Path) -> None:
    tensors = {"a": torch.randn(3, 4).to(dtype), "transposed": torch.randn(4, 3).to(dtype).T, "none": torch.zeros(0)}
    save_state(file, "mine", META, tensors)
    loaded = load_state(file, "mine", "a state")
    assert loaded is not None
    assert loaded[0] == META
    assert loaded[1].keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[1][key].dtype == tensor.dtype
        assert torch.equal(loaded[1][key], tensor)
    assert list(file.parent.iterdir()) == [file]


def test_tensors_that_share_memory(file: Path) -> None:
    whole = torch.arange(6.0)
    save_state(file, "mine", {}, {"whole": whole, "part": whole[2:4]})
    _, tensors = load_state(file, "mine", "a state") or ({}, {})
    assert tensors["part"].tolist() == [2, 3]


def test_nothing_saved_is_no_state(file: Path) -> None:
    assert load_state(file, "mine", "a state") is None


def test_a_run_without_a_folder_saves_nothing(tmp_path: Path) -> None:
    nowhere = Checkpoint(None, "mine")
    nowhere.save("units/0001", META, {"a": torch.ones(2)})
    assert nowhere.load("units/0001", "a state") is None
    there = Checkpoint(tmp_path, "mine")
    there.save("units/0001", META, {"a": torch.ones(2)})
    meta, tensors = there.load("units/0001", "a state") or ({}, {})
    assert meta == META
    assert torch.equal(tensors["a"], torch.ones(2))
    with pytest.raises(ValueError, match="belongs to another run"):
        Checkpoint(tmp_path, "theirs").load("units/0001", "a state")


def test_another_run_is_refused_with_the_way_out(file: Path) -> None:
    save_state(file, "mine", META, {})
    with pytest.raises(ValueError, match="belongs to another run: .* delete the folder to start again") as caught:
        load_state(file, "theirs", "a state")
    assert str(file) in str(caught.value)
    assert not isinstance(caught.value, InvalidFile)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(keep: float, file: Path) -> None:
    save_state(file, "mine", META, {"a": torch.zeros(100)})
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidFile, match="not the state of a cake .*; delete it to start again") as caught:
        load_state(file, "mine", "the state of a cake")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"dmq_ao.state": "{"}, {"dmq_ao.state": "[]"}, {"dmq_ao.state": "{}"}]
)
def test_a_foreign_file_is_named(metadata: dict[str, str] | None, file: Path) -> None:
    save_file({"weight": torch.zeros(3)}, file, metadata)
    with pytest.raises(InvalidFile, match="not a state"):
        load_state(file, "mine", "a state")
