"""Blocks found by dataflow and learned together: gradients everywhere, never worse, and the same bytes again."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, assert_same_records, contents, graph_arguments, plain_samples, record, relative, seeded, small
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import graph
from dmq_ao.algorithms import blockwise as learn_blocks
from dmq_ao.algorithms.blocks import Block, find_blocks, run_block
from dmq_ao.algorithms.blockwise import BlockData, BlockStudent, block_error, learn_block, teacher_of
from dmq_ao.algorithms.row_layout import Layout
from dmq_ao.config import (
    BlockReconstruction,
    ChannelScaling,
    InvalidFile,
    LeftOut,
    Ranges,
    Recipe,
    Rounding,
    StepWeights,
    TensorConfig,
)
from dmq_ao.observers import ALL_OBSERVERS, ActivationObserver
from dmq_ao.quantizer.prepared import float_weight, observers, state_of
from dmq_ao.serialization import checkpoint as state

pytestmark = pytest.mark.usefixtures("captures_are_shared")
minmax, eda_dm, dmq = dmq_ao.recipes.minmax, dmq_ao.recipes.eda_dm, dmq_ao.recipes.dmq
MODELS = ["tiny_unet2d", "tiny_unet2d_condition", "tiny_dit"]
WITHOUT_DROPS = BlockReconstruction(drop=0.0, mix=0.0)


def float_inputs(bits: str = "w4a16") -> Recipe:
    return dataclasses.replace(minmax(bits), blocks=WITHOUT_DROPS)


@dataclasses.dataclass
class Ready:
    """A prepared and calibrated model with every block's inputs, float."""

    prepared: GraphModule
    blocks: list[Block]
    given: dict[int, dict[Any, Any]]

    def block(self, words: str) -> Block:
        return next(block for block in self.blocks if words in block.name)


def ready(model: nn.Module, example: dict[str, Any], bits: str = "w4a8", **recipe: Any) -> Ready:
    """Ranges from one batch, weights to nearest, and what each block reads."""
    prepared = dmq_ao.prepare(model, minmax(bits, **recipe), example, backend="reference")
    arguments = graph_arguments(prepared, example)
    with torch.no_grad():
        env = _values(prepared, arguments)
    for name, (weight, _) in observers(prepared).items():
        node = graph.layer_nodes(prepared)[name]
        weight.restore(weight.record(float_weight(prepared, node)))
    blocks = find_blocks(prepared)
    return Ready(prepared, blocks, {b.index: {node: env[node] for node in b.inputs} for b in blocks})


def _values(prepared: GraphModule, arguments: list[Tensor]) -> dict[Any, Any]:
    class Keep(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            self.kept[n] = super().run_node(n)
            return self.kept[n]

    keep = Keep(prepared)
    keep.kept = {}  # type: ignore[attr-defined]
    keep.run(*arguments)
    return keep.kept  # type: ignore[attr-defined,no-any-return]


@pytest.fixture(scope="module")
def unet(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> Ready:
    return ready(*tiny_unet2d)


# --- which blocks ------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_blocks_cover_every_layer_once_and_do_not_overlap(name: str, request: pytest.FixtureRequest) -> None:
    model, example = request.getfixturevalue(name)
    prepared = dmq_ao.prepare(model, minmax("w4a8"), example, backend="reference")
    blocks = find_blocks(prepared)
    assert [layer for block in blocks for layer in block.layers] == list(observers(prepared))
    nodes = [node for block in blocks for node in block.nodes]
    assert len(nodes) == len(set(nodes))
    order = {node: place for place, node in enumerate(prepared.graph.nodes)}
    assert [order[node] for node in nodes] == sorted(order[node] for node in nodes)
    for block in blocks:
        assert block.outputs
        assert not {node for node, _ in block.outputs} & {node for node, _ in block.inner}


def test_residual_blocks_leave_out_what_adds_up_to_their_output(unet: Ready) -> None:
    names = {node: name for name, node in graph.layer_nodes(unet.prepared).items()}
    resnet = unet.block("down_blocks.1.resnets.0")
    assert [layer.rpartition(".")[2] for layer in resnet.layers] == ["conv1", "conv2", "conv_shortcut"]
    assert [names[node] for node, _ in resnet.inner] == ["down_blocks.1.resnets.0.conv1"]
    assert [axis for _, axis in (*resnet.inner, *resnet.outputs)] == [1, 1]
    attention = unet.block("mid_block.attentions.0")
    assert [names[node].rpartition(".")[2] for node, _ in attention.inner] == ["to_q", "to_k", "to_v"]
    assert [axis for _, axis in attention.inner] == [2, 2, 2]
    assert [axis for _, axis in attention.outputs] == [1]  # the attention gives a map again
    assert unet.block("downsamplers").inner == ()


def test_a_transformer_block_leaves_out_its_last_layer_alone(
    tiny_unet2d_condition: tuple[nn.Module, dict[str, Tensor]],
) -> None:
    model, example = tiny_unet2d_condition
    prepared = dmq_ao.prepare(model, minmax("w4a8"), example, backend="reference")
    names = {node: name for name, node in graph.layer_nodes(prepared).items()}

    def missing(words: str, left_out: LeftOut) -> set[str]:
        block = next(b for b in find_blocks(prepared, left_out) if words in b.name)
        return {name.removeprefix(f"{block.name}.") for name in {*block.layers} - {names[n] for n, _ in block.inner}}

    assert missing("transformer_blocks.0", LeftOut.DATAFLOW) == {"ff.net.2"}
    assert missing("transformer_blocks.0", LeftOut.REGISTRATION) == {"ff.net.2"}
    assert missing("down_blocks.1.resnets.0", LeftOut.DATAFLOW) == {"conv2", "conv_shortcut"}
    assert missing("down_blocks.1.resnets.0", LeftOut.REGISTRATION) == {"conv_shortcut"}


def test_parts_of_a_split_layer_have_one_output(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    prepared = dmq_ao.prepare(model, minmax("w4a8"), samples.example(), backend="reference")
    merge = next(block for block in find_blocks(prepared) if block.name == "merge")
    assert merge.layers == ("merge.part0", "merge.part1")
    ((node, axis),) = merge.outputs
    assert node.target == torch.ops.aten.add.Tensor
    assert axis == 1
    assert merge.inner == ()


def test_without_a_module_tree_every_layer_is_a_block(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    prepared = dmq_ao.prepare(model, minmax("w4a8"), samples.example(), backend="reference")
    state_of(prepared).skeleton = None
    assert [block.layers for block in find_blocks(prepared)] == [
        ("conv",),
        ("tokens",),
        ("merge.part0", "merge.part1"),
    ]


def test_a_block_alone_computes_what_the_graph_does(
    unet: Ready, tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    with torch.no_grad():
        env = _values(unet.prepared, graph_arguments(unet.prepared, tiny_unet2d[1]))
        for block in unet.blocks:
            found = run_block(
                unet.prepared, block, unet.given[block.index], lambda node, args, _: node.target(*args), block.live
            )
            for node, value in found.items():
                assert torch.equal(value, env[node]) if isinstance(value, Tensor) else value == env[node]


def error_of(block: Block, student: dict[Any, Tensor], teacher: dict[Any, Tensor], layer_weight: float) -> Tensor:
    """The error of two samples whose values have a row each."""
    return block_error(block, student, teacher, layer_weight, defaultdict(Layout), 2)


# --- what a block learns -----------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranges", [Ranges.STATIC, Ranges.PER_STEP])
def test_every_rounding_and_step_has_a_gradient_and_the_teacher_none(
    name: str, ranges: Ranges, request: pytest.FixtureRequest
) -> None:
    found = ready(*request.getfixturevalue(name), bits="w4a4", ranges=ranges)
    for block in found.blocks:
        student = BlockStudent(found.prepared, block, WITHOUT_DROPS)
        given = found.given[block.index]
        teacher = teacher_of(found.prepared, block, given)
        assert not any(value.requires_grad for value in teacher.values())
        outputs = student.run(given)
        error = error_of(block, outputs, teacher, 0.8)
        assert error.shape == (2,)
        error.sum().backward()
        for what, parameter in (*student.logits.items(), *student.log_factors.items()):
            assert parameter.grad is not None, what
            assert bool(parameter.grad.any()), what
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in found.prepared.parameters())


def test_each_inner_error_reaches_its_own_layer(unet: Ready) -> None:
    names = {node: name for name, node in graph.layer_nodes(unet.prepared).items()}
    for words in ("mid_block.attentions.0", "down_blocks.1.resnets.0"):
        block = unet.block(words)
        teacher = teacher_of(unet.prepared, block, unet.given[block.index])
        for node, axis in block.inner:
            student = BlockStudent(unet.prepared, block, WITHOUT_DROPS)
            alone = dataclasses.replace(block, outputs=((node, axis),), inner=())
            error_of(alone, student.run(unet.given[block.index]), teacher, 0.0).sum().backward()
            gradient = student.logits[names[node]].grad
            assert gradient is not None
            assert bool(gradient.any())


@pytest.mark.parametrize("words", ["mid_block.attentions.0", "down_blocks.1.resnets.0"])
def test_the_gradient_is_that_of_finite_differences(
    words: str, tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    found = ready(*tiny_unet2d, bits="w3a16")  # float inputs: the error is smooth in the roundings
    block = found.block(words)
    given = found.given[block.index]
    teacher = teacher_of(found.prepared, block, given)
    student = BlockStudent(found.prepared, block, WITHOUT_DROPS)

    def error() -> Tensor:
        return error_of(block, student.run(given), teacher, 0.8).double().sum()

    for name, logits in student.logits.items():
        (gradient,) = torch.autograd.grad(error(), logits)
        direction = gradient / gradient.norm()
        with torch.no_grad():
            step = 0.02
            logits += step * direction
            above = error()
            logits -= 2 * step * direction
            below = error()
            logits += step * direction
        assert float((above - below) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=0.05), name


def test_a_learned_step_has_the_gradient_of_lsq() -> None:
    config = TensorConfig(4)
    observer = ActivationObserver("layer", config, 1, ALL_OBSERVERS["minmax"])
    observer(torch.tensor([[-1.0, 2.0]]))
    observer.restore(observer.record())
    scale, zero_point = (float(x) for x in observer.calculate_qparams())
    x = torch.tensor([[0.33, -0.66, 9.0]], requires_grad=True)
    factor = torch.ones(1, requires_grad=True)
    values = observer.adjustable(x, None, factor)
    assert torch.equal(values, observer.simulate(x))
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0]]  # beyond the range nothing passes
    inside = [round(v / scale) - v / scale for v in (0.33, -0.66)]
    expected = scale * (sum(inside) + (15 - zero_point))
    assert factor.grad is not None
    assert float(factor.grad) == pytest.approx(expected, rel=1e-4)


def test_a_student_starts_where_calibration_stands(unet: Ready) -> None:
    for block in unet.blocks:
        student = BlockStudent(unet.prepared, block, WITHOUT_DROPS)
        for name, hard in student.hard().items():
            decided = observers(unet.prepared)[name][0].decided
            assert decided is not None
            assert torch.equal(hard.codes, decided.codes)
            assert torch.equal(hard.scale, decided.scale)


def test_drops_are_drawn_from_the_generator_alone(unet: Ready) -> None:
    block = unet.block("mid_block.resnets.0")
    student = BlockStudent(unet.prepared, block, BlockReconstruction())
    given = unet.given[block.index]

    def outputs(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return student.run(given, generator)[block.outputs[0][0]]

    torch.manual_seed(1)
    first = outputs(5)
    torch.manual_seed(2)
    assert torch.equal(first, outputs(5))
    assert not torch.equal(first, outputs(6))
    assert not torch.equal(first, outputs(None))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_a_share_of_a_blocks_input_is_the_float_networks(
    share: float, unet: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Element by element from one of the two; what is no float, or the same in both, stays."""
    block = unet.block("mid_block.resnets.0")
    teacher = unet.given[block.index]
    floats = [node for node, value in teacher.items() if isinstance(value, Tensor) and value.is_floating_point()]
    student = {node: value + 1 if node in floats else value for node, value in teacher.items()}
    seen: list[dict[Any, Any]] = []
    whole = BlockStudent.run

    def watched(self: BlockStudent, given: Any, generator: torch.Generator | None = None) -> Any:
        seen.append(dict(given))
        return whole(self, given, generator)

    monkeypatch.setattr(BlockStudent, "run", watched)
    rows = len(teacher[floats[0]])
    held = torch.arange(2 * rows) >= rows
    steps, layouts = torch.zeros(2 * rows, dtype=torch.long), defaultdict(Layout)
    data = BlockData(lambda chosen: student, lambda chosen: teacher, layouts, steps, 1, held)
    config = BlockReconstruction(steps=2, batch_size=rows, mix=share)
    with torch.enable_grad():
        learn_block(unet.prepared, block, data, config, torch.Generator().manual_seed(0))
    assert floats
    assert len(seen) == 2
    for given in seen:
        for node, value in given.items():
            if node not in floats:
                assert value is student[node]
                continue
            from_teacher = value == teacher[node]
            assert torch.equal(torch.where(from_teacher, teacher[node], student[node]), value)
            spread = (share * (1 - share) / value.numel()) ** 0.5
            assert float(from_teacher.float().mean()) == pytest.approx(share, abs=5 * spread + 1e-9)
    if share:
        assert not torch.equal(seen[0][floats[0]], seen[1][floats[0]])  # drawn anew in each step


# --- the whole run -----------------------------------------------------------

RECIPES = {
    "eda_dm": small(eda_dm("w3a6"), 20),
    "in dmq": small(dataclasses.replace(dmq("w3a6"), rounding=None, blocks=BlockReconstruction()), 20),
    "after feedback": small(
        dataclasses.replace(minmax("w3a6"), rounding=Rounding(), blocks=BlockReconstruction(layer_weight=0.0)), 20
    ),
    "dynamic": small(
        dataclasses.replace(
            minmax("w3a6", ranges=Ranges.DYNAMIC), scaling=ChannelScaling(), blocks=BlockReconstruction()
        ),
        20,
    ),
    "groups, weighted": small(
        dataclasses.replace(minmax("w3a16", group_size=8), blocks=BlockReconstruction(step_weights=StepWeights())), 20
    ),
}


def run(
    model: nn.Module, recipe: Recipe, samples: dmq_ao.CalibrationSet, **options: Any
) -> tuple[dmq_ao.QuantizedDenoiser, dmq_ao.CalibrationReport]:
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    report = dmq_ao.calibrate(prepared, samples, progress=False, **options)
    return dmq_ao.convert(prepared, "reference"), report


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_is_never_worse_on_held_out_samples(
    name: str, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    saved, report = run(model, RECIPES[name], samples)
    assert report.blocks
    assert all(block.after <= block.before for block in report.blocks.values())
    gained = any(block.after < block.before for block in report.blocks.values())
    assert gained or RECIPES[name].rounding is not None  # error feedback leaves little to gain
    json.dumps(report.to_dict())
    dmq_ao.save(saved, tmp_path)
    loaded = dmq_ao.load(tmp_path, model=model, backend="reference")
    assert_same_records(loaded, saved)
    assert loaded.recipe == saved.recipe


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "tiny_unet2d_condition")) for name in MODELS]
)
def test_blocks_bring_real_models_closer(name: str, request: pytest.FixtureRequest) -> None:
    model, example = request.getfixturevalue(name)
    samples = record(model, lambda step: model(**example | {"timestep": torch.full((2,), step)}), 8)
    recipe = small(eda_dm("w3a8"), 20)
    plain, _ = run(model, dataclasses.replace(recipe, blocks=None), samples)
    learned, report = run(model, recipe, samples)
    assert all(block.after <= block.before for block in report.blocks.values())

    def error(denoiser: nn.Module) -> float:
        with torch.no_grad():
            answers = [one(**samples.example(8)) for one in (denoiser, model)]
        return relative(*(a if isinstance(a, Tensor) else a.sample for a in answers))

    assert error(learned) < error(plain)


def test_what_does_not_help_changes_nothing(
    model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(dataclasses.replace(eda_dm("w8a8"), bias_correction=True), 20)
    monkeypatch.setattr(learn_blocks, "_held_out_error", lambda *given: 1.0)
    learned, report = run(model, recipe, samples)
    assert all(block.before == block.after for block in report.blocks.values())
    monkeypatch.undo()
    plain, _ = run(model, dataclasses.replace(recipe, blocks=None), samples)
    assert_same_records(learned, plain)


def test_learning_stops_when_held_out_samples_gain_nothing(
    model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(eda_dm("w8a8"), 100)
    assert recipe.blocks is not None
    recipe = dataclasses.replace(recipe, blocks=dataclasses.replace(recipe.blocks, patience=2))
    monkeypatch.setattr(learn_blocks, "_held_out_error", lambda *given: 1.0)
    _, report = run(model, recipe, samples)
    assert {block.steps for block in report.blocks.values()} == {40}


# --- the same bytes ----------------------------------------------------------


class Shared(Plain):
    """A part of the split layer reads what a layer far above reads, in another block."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.first(x)
        vector = self.time(t.to(x.dtype)[:, None] / 1000)
        h = nn.functional.silu(self.conv(skip) + vector[:, :, None, None])
        h = self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(skip.shape)
        return self.last(nn.functional.silu(self.merge(torch.cat([h, skip], 1))))


@pytest.fixture(scope="module", params=[Plain, Shared])
def subject(request: pytest.FixtureRequest) -> tuple[nn.Module, dmq_ao.CalibrationSet]:
    model = seeded(request.param)
    return model, plain_samples(model)


@pytest.fixture(scope="module")
def expected(
    subject: tuple[nn.Module, dmq_ao.CalibrationSet], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    dmq_ao.save(run(subject[0], RECIPES["in dmq"], subject[1])[0], folder)
    return contents(folder)


@pytest.mark.parametrize("count", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4)), 3, 5])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    count: int,
    subject: tuple[nn.Module, dmq_ao.CalibrationSet],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = subject
    written: list[Path] = []

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if len(written) == count:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            run(model, RECIPES["in dmq"], samples, state_dir=tmp_path / "state", max_memory=count * 1000)
    torch.manual_seed(count)
    denoiser, _ = run(model, RECIPES["in dmq"], samples, state_dir=tmp_path / "state")
    dmq_ao.save(denoiser, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_finished_run_learns_nothing_again(
    model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES["eda_dm"]
    first, before = run(model, recipe, samples, state_dir=tmp_path)
    learned: Callable[..., Any] = lambda *given: pytest.fail("learned again")  # noqa: E731
    monkeypatch.setattr("dmq_ao.algorithms.block_learner.learn_block", learned)
    again, after = run(model, recipe, samples, state_dir=tmp_path)
    assert_same_records(first, again)
    assert after.blocks == before.blocks
    next(tmp_path.glob("units/block*")).write_bytes(b"x")
    with pytest.raises(InvalidFile, match="not a block of a calibration"):
        run(model, recipe, samples, state_dir=tmp_path)


def test_memory_is_bounded_while_blocks_wait(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    recipe = RECIPES["eda_dm"]
    wide, _ = run(model, recipe, samples)
    narrow, _ = run(model, recipe, samples, max_memory=0)
    assert_same_records(wide, narrow)


# --- values ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr_activation": -1.0}, "lr_activation 0 or more"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\)"),
        ({"mix": -0.1}, r"mix must be in \[0, 1\)"),
        ({"layer_weight": float("nan")}, "layer_weight and regularizer must be 0 or more"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockReconstruction(**changes)


def test_the_published_variant_differs_where_it_says() -> None:
    ours, published = eda_dm("w4a8"), eda_dm("w4a8", compat="reference")
    assert ours.blocks is not None
    assert published.blocks is not None
    assert (ours.blocks.left_out, published.blocks.left_out) == (LeftOut.DATAFLOW, LeftOut.REGISTRATION)
    assert ours.blocks.regularizer > 0 == published.blocks.regularizer
    assert ours.select.radius is None
    sample_bits = [recipe.config.overrides[0].activation.bits for recipe in (ours, published)]  # type: ignore[union-attr]
    assert sample_bits == [12, 8]
    assert published.select.reference_rounding
    assert Recipe.from_dict(json.loads(json.dumps(published.to_dict()))) == published
    data = ours.to_dict()
    data["blocks"]["gamma"] = 1.0
    with pytest.raises(ValueError, match=r"recipe.blocks: unknown keys \['gamma'\]"):
        Recipe.from_dict(data)
    with pytest.raises(ValueError, match="compat must be None or 'reference'"):
        eda_dm("w4a8", compat="x")
