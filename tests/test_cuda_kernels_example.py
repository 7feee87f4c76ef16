"""The example that times and tunes the CUDA kernels: run here in Triton's interpreter, by a clock that is made up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from interpreted import DEVICE, needs_triton

from dmq_ao.backends.cuda import tiles as cuda_tiles
from dmq_ao.backends.cuda.tiles import Tile

pytestmark = needs_triton
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import cuda_kernels

        yield cuda_kernels
    sys.modules.pop("cuda_kernels", None)


class Ticks:
    """A clock that makes each call, and says that each took a millisecond less than the one before."""

    def __init__(self) -> None:
        self.left = 1e6

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.left -= 1
        return self.left


def products(example: ModuleType) -> list[object]:
    return [example.Product(20, 40, 24), example.Product(1, 33, 16, side=4, kernel=3)]


def test_products_are_what_they_are_called(example: ModuleType) -> None:
    linear, conv = products(example)
    assert linear.macs == 20 * 40 * 24
    assert conv.macs == 16 * 33 * 16 * 9
    for product, bits in ((linear, 8), (linear, 4), (conv, 8), (conv, 4)):
        ours = example.integer_call(product, bits, torch.device(DEVICE))()
        half = example.bfloat16_call(product, torch.device(DEVICE))()
        assert (ours.shape, ours.dtype, ours.stride()) == (half.shape, half.dtype, half.stride())
        packed = next(arg for arg in ours_args(example, product, bits) if isinstance(arg, list))[0]
        shape = product.shape(bits)
        assert packed.shape == (shape.outs, shape.taps * shape.row_bytes)
        assert shape.rows == half.numel() // half.shape[1 if half.dim() == 4 else -1]


def ours_args(example: ModuleType, product: object, bits: int) -> tuple[object, ...]:
    return example.integer_call(product, bits, torch.device(DEVICE)).args  # type: ignore[no-any-return]


def test_the_best_tile_is_kept_where_the_library_looks(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"another": {"1x1x1x1x1": [1, 2, 3, 4, 5, 6]}}))
    monkeypatch.setattr(cuda_tiles, "TILE_FILE", file)
    small = Tile(32, 64, 32, 1, 4, 3)
    monkeypatch.setattr(example, "candidates", lambda shape: iter([small._replace(parts=2), small]))
    found = example.tune(products(example), torch.device(DEVICE), "cpu", Ticks())
    assert set(found.values().__iter__().__next__()) == set(small)
    assert len(found) == 4
    written = json.loads(file.read_text())
    assert written["another"] == {"1x1x1x1x1": [1, 2, 3, 4, 5, 6]}
    assert written["cpu"] == found
    assert cuda_tiles.tile_for(products(example)[0].shape(4), torch.device("cpu")) == small
    assert list(tmp_path.iterdir()) == [file]
    cuda_tiles.forget_tiles()


def test_a_tile_that_does_not_fit_is_passed_over_and_other_errors_are_not(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = [Tile(256, 128, 128, 1, 8, 4), Tile(32, 64, 32, 1, 4, 3)]
    monkeypatch.setattr(example, "candidates", lambda shape: iter(tiles))
    shape = products(example)[0].shape(4)

    def call() -> torch.Tensor:
        if cuda_tiles.tile_for(shape, torch.device("cpu")) == tiles[0]:
            raise RuntimeError("out of resource: shared memory")
        return torch.zeros(1)

    assert example.tuned(call, shape, Ticks())[0] == tiles[1]
    with pytest.raises(ZeroDivisionError):
        example.tuned(lambda: 1 / 0, shape, Ticks())


def test_candidates_are_of_every_kind_and_fit(example: ModuleType) -> None:
    for product in example.PRODUCTS:
        for bits in example.BITS:
            found = list(example.candidates(product.shape(bits)))
            assert 4 <= len(found) <= 200
            assert all(tile.lanes <= product.shape(bits).row_bytes for tile in found)


def test_a_table_has_a_row_for_each_product(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "tile_for", lambda shape, device: Tile(32, 64, 32, 1, 4, 3))
    rows = example.measure(products(example), torch.device(DEVICE), Ticks(), repeats=1)
    report = {"device": "a GPU", "machine": {"torch": "2"}, "date": "today", "int8_peak": 1e12, "rows": rows}
    lines = example.table(report).splitlines()
    assert len(lines) == 6
    assert lines[4].startswith("| linear 20 x 40 -> 24 | ")
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_without_a_gpu_nothing_is_claimed(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cuda_kernels.py", "-o", str(tmp_path / "out")])
    example.main()
    assert capsys.readouterr().out == "nothing measured: no CUDA device\n"
    assert not (tmp_path / "out").exists()
