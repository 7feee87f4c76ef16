"""A recording is what the denoiser was given: the right rows, evenly over timesteps, the same bytes every time."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmq_ao.config import InvalidFile, MissingStatistics
from dmq_ao.samples import CalibrationSet, Recorder, record, set_file
from dmq_ao.samples.record import _even_share


class Denoiser(nn.Module):
    """Diffusers' signature, reduced; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.seen: list[Tensor] = []

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        img_ids: Tensor | None = None,
        option: Any = None,
        return_dict: bool = True,
    ) -> Tensor:
        self.seen.append(sample.detach().clone())
        return sample * self.scale


class AnyArguments(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Any) -> None:
        return None


class OtherName(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


def run_loop(denoiser: nn.Module, timesteps: list[int], batch: int, runs: int = 1) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(runs):
        for timestep in timesteps:
            denoiser(torch.randn(batch, 2, generator=generator), timestep)


def recorded(num_samples: int = 8, seed: int = 0, **loop: Any) -> CalibrationSet:
    denoiser = Denoiser()
    with record(denoiser, num_samples, seed) as recorder:
        run_loop(denoiser, **loop)
    return recorder.calibration_set()


def make(**changes: Any) -> CalibrationSet:
    values: dict[str, Any] = {
        "inputs": {
            "sample": torch.arange(24.0).reshape(4, 3, 2).to(torch.bfloat16),
            "added_cond_kwargs.text_embeds": torch.arange(8).reshape(4, 2),
        },
        "shared": {
            "img_ids": torch.arange(6.0).reshape(2, 3),
            "guidance": 3.5,
            "flag": True,
            "mode": "a",
            "none": None,
        },
        "timestep": torch.tensor([900, 900, 500, 100]),
        "step": torch.tensor([0, 0, 1, 2]),
    }
    return CalibrationSet(**values | changes)


def assert_same(left: CalibrationSet, right: CalibrationSet) -> None:
    assert list(left.inputs) == list(right.inputs)
    pairs = [(left.inputs[name], right.inputs[name]) for name in left.inputs]
    pairs += [(left.timestep, right.timestep), (left.step, right.step), (left.timesteps, right.timesteps)]
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert left.shared.keys() == right.shared.keys()
    for name, value in left.shared.items():
        other = right.shared[name]
        assert type(value) is type(other)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other  # type: ignore[arg-type]
    assert (left.trajectory is None) == (right.trajectory is None)
    if left.trajectory is not None and right.trajectory is not None:
        assert torch.equal(left.trajectory, right.trajectory)
    assert left.timestep_arg == right.timestep_arg
    assert left.digest() == right.digest()


# --- the set -----------------------------------------------------------------


def test_batches_hold_every_row_as_nested_keywords() -> None:
    batches = list(make().batches(3))
    assert [len(batch["sample"]) for batch in batches] == [3, 1]
    assert batches[0].keys() == {
        "sample", "added_cond_kwargs", "img_ids", "guidance", "flag", "mode", "none", "timestep"
    }  # fmt: skip
    assert torch.equal(batches[1]["added_cond_kwargs"]["text_embeds"], torch.tensor([[6, 7]]))
    assert batches[0]["timestep"].tolist() == [900, 900, 500]
    assert batches[0]["img_ids"].shape == (2, 3)


def test_example_repeats_rows_to_make_two() -> None:
    one = make().select([3])
    assert one.example()["timestep"].tolist() == [100, 100]
    assert one.example(batch_size=1)["sample"].shape == (2, 3, 2)
    assert make().example(3)["timestep"].tolist() == [900, 900, 500]


def test_select_takes_rows_in_the_order_asked_and_keeps_the_timesteps() -> None:
    chosen = make().select([3, 0])
    assert chosen.timestep.tolist() == [100, 900]
    assert chosen.step.tolist() == [2, 0]
    assert chosen.timesteps.tolist() == [900, 500, 100]
    assert torch.equal(chosen.inputs["sample"], make().inputs["sample"][[3, 0]])


def test_earlier_rows_are_of_the_same_trajectory_nearest_first() -> None:
    whole = make(trajectory=torch.tensor([5, 4, 4, 4]))
    assert whole.earlier(1).shape == (4, 0)
    assert whole.earlier(2).tolist() == [[-1], [-1], [1], [2]]
    assert whole.earlier(3).tolist() == [[-1, -1], [-1, -1], [-1, -1], [2, 1]]
    assert whole.select([3, 1, 2]).earlier(2).tolist() == [[2], [-1], [1]]
    assert make().earlier(1).shape == (4, 0)


@pytest.mark.parametrize("trajectory", [None, torch.arange(4)])
def test_rows_without_earlier_ones_say_how_to_record_them(trajectory: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"no 3 rows .* record with select=Selection\(window=3\)"):
        make(trajectory=trajectory).earlier(3)
    with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
        make(trajectory=trajectory).earlier(0)


def test_split_parts_the_rows_without_loss() -> None:
    rest, held_out = make().split(1, seed=3)
    assert (len(rest), len(held_out)) == (3, 1)
    rows = torch.cat([rest.inputs["sample"], held_out.inputs["sample"]])
    assert sorted(rows.flatten().tolist()) == sorted(make().inputs["sample"].flatten().tolist())
    assert make().split(1, seed=3)[1].digest() == held_out.digest()
    assert len({make().split(1, seed=seed)[1].digest() for seed in range(20)}) > 1


def test_repr_tells_rows_timesteps_and_shapes() -> None:
    text = repr(make())
    assert "4 rows at 3 timesteps" in text
    assert "sample [batch, 3, 2] torch.bfloat16" in text
    assert "img_ids [2, 3] torch.float32" in text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": {}}, ValueError, r"needs inputs with rows, got 4 rows of \[\]"),
        (
            {
                "inputs": {"sample": torch.zeros(0, 2)},
                "timestep": torch.zeros(0),
                "step": torch.zeros(0, dtype=torch.int64),
            },
            ValueError,
            "got 0 rows of",
        ),
        ({"inputs": {"sample": [1.0]}}, TypeError, r"input sample must be a tensor \[rows, ...\], got \[1.0\]"),
        ({"inputs": {"sample": torch.tensor(1.0)}}, TypeError, "give it as shared"),
        ({"inputs": {"sample": torch.zeros(3, 2)}}, ValueError, "sample has 3 rows, step has 4"),
        ({"timestep": torch.tensor([1.0])}, ValueError, "timestep has 1 rows, step has 4"),
        ({"timestep": torch.zeros(4, dtype=torch.float64)}, TypeError, "timestep must be .* float32 or int64"),
        ({"step": torch.zeros(4)}, TypeError, "step must be .* int64, got .* torch.float32"),
        ({"shared": {"ids": [1, 2]}}, TypeError, r"shared ids must be a tensor, .*, got \[1, 2\]"),
        ({"shared": {"sample": 1}}, ValueError, "a name twice"),
        ({"timestep_arg": "sample"}, ValueError, "a name twice"),
        ({"shared": {"scale": float("nan")}}, ValueError, "shared scale is NaN or infinite"),
        ({"step": torch.tensor([0, 0, 1, 3])}, ValueError, "rows of the 3 timesteps, got 0 to 3"),
        ({"step": torch.tensor([0, 1, 1, 2])}, ValueError, "row 2 is of step 1, timestep 900, but has timestep 500"),
        ({"visited": torch.tensor([900, 500])}, ValueError, "rows of the 2 timesteps, got 0 to 2"),
        ({"trajectory": torch.zeros(4)}, TypeError, "trajectory must be .* int64, got .* torch.float32"),
        ({"trajectory": torch.tensor([0, 1])}, ValueError, "trajectory has 2 rows, step has 4"),
    ],
)
def test_wrong_sets_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**changes)


MASKED = torch.zeros(4, 1, 8).masked_fill(torch.arange(8) > 5, -math.inf)


@pytest.mark.parametrize("where", ["inputs", "shared"])
@pytest.mark.parametrize("mask", [MASKED, MASKED - 1, MASKED.half(), MASKED.transpose(1, 2)])
def test_masks_may_be_minus_infinity(mask: Tensor, where: str) -> None:
    whole = make()
    values = {**getattr(whole, where), "mask": mask}
    assert torch.equal(getattr(make(**{where: values}), where)["mask"], mask)
    for value in (math.nan, math.inf):
        broken = mask.clone()
        broken[2, 0, 0] = value
        with pytest.raises(ValueError, match="mask is NaN or infinite"):
            make(**{where: {**values, "mask": broken}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named_with_input_and_row(value: float) -> None:
    sample = torch.zeros(4, 3, 2, dtype=torch.float16)
    sample[2, 1, 0] = value
    with pytest.raises(ValueError, match=r"sample is NaN or infinite in row 2 \(timestep 500\).* 1 of 4 rows"):
        make(inputs={"sample": sample})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: list(s.batches(0)), ValueError, "batch_size must be 1 or more, got 0"),
        (lambda s: s.select([4, 1, -1]), ValueError, r"rows from 0 to 3, got also \[4, -1\]"),
        (lambda s: s.select([]), ValueError, r"one or more rows from 0 to 3, got shape \[0\]"),
        (lambda s: s.select(s.step > 0), TypeError, "row numbers, got torch.bool; of a mask, pass"),
        (lambda s: s.select([0.5]), TypeError, "row numbers, got torch.float32"),
        (lambda s: s.split(4), ValueError, "from 1 to 3 of 4 rows, got 4"),
        (lambda s: s.split(0), ValueError, "from 1 to 3 of 4 rows, got 0"),
    ],
)
def test_wrong_requests_are_refused(
    call: Callable[[CalibrationSet], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(make())


# --- the file ----------------------------------------------------------------


def test_load_after_save_is_the_identity(tmp_path: Path) -> None:
    make().save(tmp_path / "set.safetensors")
    assert_same(CalibrationSet.load(tmp_path / "set.safetensors"), make())
    part = make().select([3, 0])
    part.save(tmp_path / "part.safetensors")
    assert_same(CalibrationSet.load(tmp_path / "part.safetensors"), part)


def test_trajectories_are_saved_and_selected_with_their_rows(tmp_path: Path) -> None:
    whole = make(trajectory=torch.tensor([7, 2, 2, 2]))
    whole.save(tmp_path / "set.safetensors")
    assert_same(CalibrationSet.load(tmp_path / "set.safetensors"), whole)
    part = whole.select([3, 0])
    assert part.trajectory is not None
    assert part.trajectory.tolist() == [2, 7]


def test_a_file_without_trajectories_is_one_of_the_first_version(tmp_path: Path) -> None:
    for version, whole in ((1, make()), (2, make(trajectory=torch.arange(4)))):
        whole.save(tmp_path / "set")
        with safe_open(tmp_path / "set", "pt") as file:
            header = json.loads(file.metadata()["dmq_ao.calibration_set"])
        assert header["format_version"] == version
    old = tmp_path / "old"
    header = {"format_version": 1, "inputs": list(make().inputs), "timestep_arg": "timestep"}
    header |= {"shared": {"guidance": 3.5, "flag": True, "mode": "a", "none": None}, "digest": make().digest()}
    tensors = {f"inputs.{name}": x for name, x in make().inputs.items()}
    tensors |= {"shared.img_ids": torch.arange(6.0).reshape(2, 3), "visited": torch.tensor([900, 500, 100])}
    tensors |= {"timestep": make().timestep, "step": make().step}
    save_file(tensors, old, metadata={"dmq_ao.calibration_set": json.dumps(header)})
    assert_same(CalibrationSet.load(old), make())


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    make().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_loaded_set_may_be_saved_over_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    make().save(path)
    CalibrationSet.load(path).save(path)
    assert_same(CalibrationSet.load(path), make())


def test_digest_sees_names_values_and_dtypes() -> None:
    sample = make().inputs["sample"]
    variants = [
        make(),
        make(inputs={"sample": sample}),
        make(inputs={"other": sample}),
        make(inputs={"sample": sample.float()}),
        make(inputs={"sample": sample + 1}),
        make(shared={}),
        make(shared={"guidance": 3.0}),
        make(timestep_arg="t"),
        make().select([0, 1]),
        make(trajectory=torch.zeros(4, dtype=torch.int64)),
        make(trajectory=torch.arange(4)),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def _other_version(path: Path) -> None:
    save_file(load_file(path), path, metadata={"dmq_ao.calibration_set": json.dumps({"format_version": 99})})


def _no_header_fields(path: Path) -> None:
    save_file(load_file(path), path, metadata={"dmq_ao.calibration_set": json.dumps({"format_version": 1})})


def _bad_json(path: Path) -> None:
    save_file(load_file(path), path, metadata={"dmq_ao.calibration_set": "{"})


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "SafetensorError"),
        (lambda path: path.write_bytes(b""), "SafetensorError"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a pickle of old"), "SafetensorError"),
        (_flip, "do not match their checksum|rows of the|timestep"),
        (_foreign, "its metadata names no calibration set"),
        (_other_version, "it has format version 99"),
        (_no_header_fields, "header: missing keys .*'inputs'"),
        (_bad_json, "JSONDecodeError"),
        (_folder, "it is a folder"),
    ],
)
def test_a_file_that_is_no_calibration_set_is_refused(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "set.safetensors"
    make().save(path)
    damage(path)
    with pytest.raises(InvalidFile, match=message) as caught:
        CalibrationSet.load(path)
    assert str(path) in str(caught.value)
    assert "Expected a calibration set of format version 1 or 2" in str(caught.value)
    assert "record and save again" in str(caught.value)


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        CalibrationSet.load(tmp_path / "absent")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half a file")
        raise error

    path = tmp_path / "set.safetensors"
    make().save(path)
    monkeypatch.setattr(set_file, "save_file", half)
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(type(error)):
            make(timestep_arg="t").save(target)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert_same(CalibrationSet.load(path), make())


# --- which rows are kept -----------------------------------------------------

loops = st.fixed_dictionaries(
    {
        "num_samples": st.integers(1, 24),
        "seed": st.integers(0, 5),
        "timesteps": st.lists(st.integers(0, 999), min_size=1, max_size=12),
        "batch": st.integers(1, 5),
        "runs": st.integers(1, 3),
    }
)
fast = settings(max_examples=40, deadline=None, derandomize=True)


@fast
@given(loop=loops)
def test_kept_rows_are_even_bounded_and_deterministic(loop: dict[str, Any]) -> None:
    kept = recorded(**loop)
    visited = list(dict.fromkeys(loop["timesteps"]))
    supply = Counter(loop["timesteps"] * loop["runs"] * loop["batch"])
    counts = Counter(kept.timestep.tolist())

    assert len(kept) <= loop["num_samples"]
    assert kept.timesteps.tolist() == visited
    assert torch.equal(kept.timesteps[kept.step], kept.timestep)
    assert kept.step.tolist() == sorted(kept.step.tolist())
    if min(supply.values()) * len(visited) >= loop["num_samples"] + len(visited):
        assert len(kept) == loop["num_samples"]
        shares = [counts[timestep] for timestep in visited]
        assert max(shares) - min(shares) <= 1
    if len(visited) > loop["num_samples"]:
        assert len(kept) == loop["num_samples"]
    if sum(supply.values()) <= loop["num_samples"] // len(visited):
        assert len(kept) == sum(supply.values())
    assert_same(kept, recorded(**loop))


@fast
@given(loop=loops)
def test_a_recorder_never_holds_more_than_num_samples(loop: dict[str, Any]) -> None:
    denoiser = Denoiser()
    with record(denoiser, loop["num_samples"], loop["seed"]) as recorder:
        for timestep in loop["timesteps"]:
            denoiser(torch.zeros(loop["batch"], 2), timestep)
            assert len(recorder) <= loop["num_samples"]
    assert recorder.num_calls == len(loop["timesteps"])


def test_a_kept_row_does_not_keep_its_batch_in_memory() -> None:
    denoiser = Denoiser()
    with record(denoiser, num_samples=2) as recorder:
        denoiser(torch.zeros(50, 3), 1)
    assert {row.inputs["sample"].untyped_storage().nbytes() for row in recorder._rows} == {3 * 4}


@given(num_steps=st.integers(1, 40), num_samples=st.integers(1, 60))
def test_quotas_sum_differ_by_one_and_never_grow(num_steps: int, num_samples: int) -> None:
    now = [_even_share(step, num_steps, num_samples) for step in range(num_steps)]
    later = [_even_share(step, num_steps + 1, num_samples) for step in range(num_steps)]
    assert max(now) - min(now) <= 1
    assert sum(now) == max(num_samples, num_steps)
    assert all(a >= b for a, b in zip(now, later, strict=True))


def test_every_row_of_a_timestep_may_be_kept() -> None:
    firsts = {
        recorded(num_samples=1, seed=seed, timesteps=[5], batch=4).inputs["sample"][0, 0].item() for seed in range(40)
    }
    assert len(firsts) == 4


def test_the_kept_rows_do_not_depend_on_how_many_are_asked_for() -> None:
    few, many = (recorded(num_samples=n, timesteps=[9, 5], batch=8, runs=2) for n in (4, 12))
    rows = {tuple(row) for row in many.inputs["sample"].tolist()}
    assert all(tuple(row) in rows for row in few.inputs["sample"].tolist())


# --- what is recorded of a call ----------------------------------------------


def test_positional_keyword_nested_and_shared_arguments() -> None:
    denoiser = Denoiser()
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 5)
    pooled, ids = torch.randn(2, 6), torch.randn(64, 3)
    with record(denoiser) as recorder:
        denoiser(
            sample, 7, encoder_hidden_states=text, added_cond_kwargs={"text_embeds": pooled, "extra": (pooled, 2)},
            img_ids=ids, option=None, return_dict=False,
        )  # fmt: skip
    kept = recorder.calibration_set()
    assert list(kept.inputs) == [
        "sample", "encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.extra.0"
    ]  # fmt: skip
    assert kept.shared.keys() == {"img_ids", "added_cond_kwargs.extra.1"}
    assert kept.timestep_arg == "timestep"
    [batch] = kept.batches(2)
    assert batch.keys() == {"sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "img_ids"}
    order = [int((sample == row).flatten(1).all(1).nonzero()) for row in batch["sample"]]
    assert torch.equal(batch["added_cond_kwargs"]["text_embeds"], pooled[order])
    assert torch.equal(batch["added_cond_kwargs"]["extra"][0], pooled[order])
    assert torch.equal(batch["img_ids"], ids)
    denoiser(**batch)


def test_a_batch_of_one_keeps_its_conditioning_by_row() -> None:
    denoiser = Denoiser()
    with record(denoiser) as recorder:
        denoiser(torch.zeros(1, 2), 3, encoder_hidden_states=torch.zeros(1, 4), img_ids=torch.zeros(4, 3))
    kept = recorder.calibration_set()
    assert list(kept.inputs) == ["sample", "encoder_hidden_states"]
    assert list(kept.shared) == ["img_ids"]


def test_a_shared_tensor_stays_shared_in_a_last_batch_of_its_length() -> None:
    denoiser = Denoiser()
    with record(denoiser) as recorder:
        for batch in (4, 1):
            denoiser(torch.zeros(batch, 2), 3, img_ids=torch.ones(1, 3))
    assert list(recorder.calibration_set().shared) == ["img_ids"]
    assert len(recorder) == 5


@pytest.mark.parametrize(
    ("given_timestep", "expected", "dtype"),
    [
        (5, [5, 5], torch.int64),
        (0.25, [0.25, 0.25], torch.float32),
        (torch.tensor(5), [5, 5], torch.int64),
        (torch.tensor([5], dtype=torch.int32), [5, 5], torch.int64),
        (torch.tensor([5.5, 6.5]), [5.5, 6.5], torch.float32),
        (torch.tensor([0.5, 0.5], dtype=torch.bfloat16), [0.5, 0.5], torch.float32),
    ],
)
def test_every_form_of_timestep_becomes_one_value_a_row(
    given_timestep: Any, expected: list[float], dtype: torch.dtype
) -> None:
    denoiser = Denoiser()
    with record(denoiser) as recorder:
        denoiser(torch.zeros(2, 3), given_timestep)
    kept = recorder.calibration_set()
    assert kept.timestep.tolist() == expected
    assert kept.timestep.dtype == dtype


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_rows_recorded_in_any_mode_serve_autograd_later(mode: Callable[[], AbstractContextManager[None]]) -> None:
    denoiser = Denoiser()
    with mode(), record(denoiser) as recorder:
        sample = torch.ones(2, 3, dtype=torch.bfloat16)
        denoiser(sample, 5, img_ids=torch.ones(4, 3))
        sample.zero_()
        kept = recorder.calibration_set()
    [batch] = kept.batches(2)
    assert batch["sample"].dtype is torch.bfloat16
    assert batch["sample"].sum() == 6
    assert not any(value.is_inference() or value.requires_grad for value in batch.values())
    (denoiser(**batch).sum() + (batch["img_ids"] * denoiser.scale).sum()).backward()
    assert denoiser.scale.grad is not None


def test_a_sample_that_needs_its_gradient_is_kept_without() -> None:
    denoiser = Denoiser()
    sample = torch.ones(2, 3, requires_grad=True)
    with record(denoiser) as recorder:
        denoiser(sample, 5).sum().backward()
    assert sample.grad is not None
    assert not recorder.calibration_set().inputs["sample"].requires_grad


def test_rows_live_on_the_cpu(device: torch.device) -> None:
    denoiser = Denoiser().to(device)
    sample = torch.randn(2, 3, device=device)
    with record(denoiser) as recorder:
        denoiser(sample, torch.tensor(5, device=device), img_ids=torch.ones(4, 3, device=device))
        denoiser(sample, torch.tensor(4, device=device), img_ids=torch.ones(4, 3, device=device))
    kept = recorder.calibration_set()
    values = [*kept.inputs.values(), *kept.shared.values(), kept.timestep, kept.step, kept.timesteps]
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"cpu"}


def test_recording_changes_neither_the_loop_nor_its_random_numbers() -> None:
    def loop(denoiser: nn.Module) -> Tensor:
        torch.manual_seed(3)
        x = torch.randn(2, 3)
        for timestep in range(4):
            x = denoiser(x, timestep) + torch.randn(2, 3)
        return x

    denoiser = Denoiser()
    alone = loop(denoiser)
    with record(denoiser):
        assert torch.equal(loop(denoiser), alone)


def test_the_hook_is_gone_afterwards_also_after_an_error() -> None:
    def broken_loop() -> None:
        denoiser(torch.zeros(2, 3), 1)
        raise RuntimeError("the loop broke")

    denoiser = Denoiser()
    with pytest.raises(RuntimeError, match="the loop broke"), record(denoiser) as recorder:
        broken_loop()
    denoiser(torch.zeros(2, 3), 1)
    assert recorder.num_calls == 1
    assert not denoiser._forward_pre_hooks
    assert len(recorder.calibration_set()) == 2


def test_keywords_without_names_in_the_signature_are_recorded() -> None:
    denoiser = AnyArguments()
    with record(denoiser) as recorder:
        denoiser(x=torch.zeros(2, 3), t=4)
    assert recorder.calibration_set().timestep_arg == "t"


def test_the_timestep_may_have_any_name() -> None:
    denoiser = OtherName()
    with record(denoiser, timestep_arg="sigma") as recorder:
        denoiser(torch.zeros(2, 3), torch.tensor(0.5))
    assert recorder.calibration_set().example()["sigma"].tolist() == [0.5, 0.5]


def calls(*arguments: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        denoiser = Denoiser()
        with record(denoiser):
            for kwargs in arguments:
                denoiser(**{"sample": torch.zeros(2, 3), "timestep": 1} | kwargs)

    return run


def enter(*args: Any, **kwargs: Any) -> Callable[[], None]:
    def run() -> None:
        with record(*args, **kwargs):
            pass

    return run


def unnamed() -> None:
    denoiser = AnyArguments()
    with record(denoiser):
        denoiser(torch.zeros(2, 3), t=1)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (enter("a pipeline"), TypeError, "must be a torch.nn.Module, got str; .* pass pipe.unet"),
        (enter(Denoiser(), 0), ValueError, "num_samples must be 1 or more, got 0"),
        (enter(OtherName()), ValueError, r"none of .* \['x', 'sigma'\] is a timestep .* timestep_arg="),
        (enter(Denoiser(), timestep_arg="tau"), ValueError, "'tau'.*'encoder_hidden_states'"),
        (unnamed, ValueError, "1 positional arguments .* have no name .* before torch.compile"),
        (calls({"timestep": torch.zeros(3)}), ValueError, r"timestep must be .* \[2\], .* got \[3\] torch.float32"),
        (calls({"timestep": torch.zeros(2, 1)}), ValueError, r"one value for each of the 2 rows; got \[2, 1\]"),
        (calls({"sample": torch.zeros(2)}), ValueError, r"without a floating tensor \[batch, ...\] .*sample"),
        (calls({"option": object()}), TypeError, "option is a object; a recording holds tensors"),
        (
            calls({}, {"option": 1}),
            ValueError,
            r"call 2 .* arguments \['option', 'sample'\], earlier ones \['sample'\]",
        ),
        (
            calls({}, {"sample": torch.zeros(2, 3, 4)}),
            ValueError,
            r"sample is \[batch, 3, 4\] torch.float32 in call 2 .* was \[batch, 3\] .*; sizes may differ, the",
        ),
        (
            calls({}, {"sample": torch.zeros(2, 3).half()}),
            ValueError,
            "float16 in call 2 .* and the dtype may not: record these",
        ),
        (calls({"option": 1.5}, {"option": 2.5}), ValueError, "option has no batch axis, .* from 1.5 to 2.5; pass it"),
        (
            calls({"img_ids": torch.zeros(4, 3)}, {"img_ids": torch.ones(4, 3)}),
            ValueError,
            "img_ids has no batch axis, so it must stay the same, but call 2",
        ),
        (
            calls({"img_ids": torch.zeros(4, 3)}, {"img_ids": torch.zeros(9, 3, dtype=torch.int64)}),
            ValueError,
            r"img_ids is \[9, 3\] torch.int64 without batch axis in call 2",
        ),
        (
            calls({"option": 1}, {"option": 2, "sample": torch.zeros(2, 4)}),
            ValueError,
            "option has no batch axis, .* call 2 of the denoiser changed it from 1 to 2",
        ),
        (
            calls({"option": torch.zeros(2)}, {"option": 0.5}),
            ValueError,
            r"option is float without batch axis in call 2 .* was \[batch\] torch.float32",
        ),
    ],
)
def test_calls_that_cannot_be_recorded_say_why(run: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


def test_a_recording_of_nothing_says_what_to_do() -> None:
    with record(Denoiser()) as recorder:
        pass
    with pytest.raises(MissingStatistics, match="run the sampling loop inside `with dmq_ao.record"):
        recorder.calibration_set()


def test_nan_in_the_loop_is_refused_with_its_timestep() -> None:
    denoiser = Denoiser()
    with record(denoiser) as recorder:
        denoiser(torch.full((2, 3), float("nan")), 77)
    with pytest.raises(ValueError, match=r"sample is NaN or infinite in row 0 \(timestep 77\)"):
        recorder.calibration_set()


# --- real sampling loops -----------------------------------------------------


@pytest.fixture
def pipeline(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> Any:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DDIMPipeline(copy.deepcopy(tiny_unet2d[0]), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipe(batch_size=3, num_inference_steps=4, generator=generator, output_type="np").images


def test_a_diffusers_pipeline_is_recorded_as_it_runs(pipeline: Any, tmp_path: Path) -> None:
    alone = run_pipeline(pipeline)
    with record(pipeline.unet, num_samples=8) as recorder:
        images = run_pipeline(pipeline)
    assert (images == alone).all()
    kept = recorder.calibration_set()
    assert list(kept.inputs) == ["sample"]
    assert kept.timesteps.tolist() == pipeline.scheduler.timesteps.tolist()
    assert Counter(kept.step.tolist()) == {0: 2, 1: 2, 2: 2, 3: 2}
    kept.save(tmp_path / "set.safetensors")
    with torch.no_grad():
        for batch in CalibrationSet.load(tmp_path / "set.safetensors").batches(3):
            assert pipeline.unet(**batch).sample.isfinite().all()


def test_a_compiled_denoiser_is_recorded_when_called_by_keyword() -> None:
    denoiser = torch.compile(Denoiser(), backend="eager")
    with record(denoiser) as recorder:  # type: ignore[arg-type]
        denoiser(sample=torch.zeros(2, 3), timestep=torch.tensor(4))
    assert isinstance(recorder, Recorder)
    assert len(recorder.calibration_set()) == 2
