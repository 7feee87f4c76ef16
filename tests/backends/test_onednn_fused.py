"""The compiled CPU operators against float64, and the graph that they are put into against the graph before."""

import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmq_ao
from dmq_ao.backends.onednn import compiled
from dmq_ao.backends.onednn.cpu import multiplies_bfloat16
from dmq_ao.backends.onednn.fused import fastest_on_cpu, fuse
from dmq_ao.config import Ranges
from dmq_ao.numerics import along
from dmq_ao.recipes import minmax
from tests.backends.test_onednn import CONVOLUTIONS, geometry_of, random_codes, sums
from tests.integer_sums import needs_integers, random_weight
from tests.plain import flow, record, relative, seeded

pytestmark = [
    needs_integers,
    pytest.mark.skipif(
        shutil.which("c++") is None or find_spec("ninja") is None, reason="no C++ compiler or no ninja"
    ),
]
needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    compiled.load_kernels()


def real_codes(x: Tensor, shift: Tensor | None, groups: int, norm: nn.GroupNorm, silu: bool, step: Tensor) -> Tensor:
    """float64: what is rounded, before the zero point."""
    value = x.double() if shift is None else x.double() + shift.double().reshape(*shift.shape, *[1] * (x.dim() - 2))
    assert norm.weight is not None
    value = F.group_norm(value, groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return (F.silu(value) if silu else value) / step.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 32, 7, 9), 8), ((1, 6, 1, 1), 3), ((3, 20, 40), 4), ((2, 96, 5, 13), 32), ((1, 4, 64, 64), 2)],
)
@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
def test_norm_and_codes_are_those_of_float64(
    layout: str, shape: tuple[int, ...], groups: int, silu: bool, dtype: torch.dtype
) -> None:
    norm = nn.GroupNorm(groups, shape[1], eps=1e-3).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    for rows in (1, shape[0]):
        scale, zero_point = torch.rand(rows) * 0.02 + 0.01, torch.randint(0, 200, (rows,), dtype=torch.int32)
        for channel_scale in (None, torch.rand(shape[1]) + 0.5, torch.rand(shape[0], shape[1]) + 0.5):
            shift = None if channel_scale is None else torch.randn(shape[:2])
            step = along(scale, 0, len(shape))
            if channel_scale is not None:
                step = step * channel_scale.reshape(-1, shape[1], *[1] * (len(shape) - 2))
            real = real_codes(x, shift, groups, norm, silu, step) + along(zero_point, 0, len(shape))
            codes = torch.ops.dmq_ao_cpu.group_norm_quantize(
                x, shift, groups, norm.weight, norm.bias, norm.eps, silu, scale, zero_point, channel_scale, 255, [0, 0]
            )
            assert codes.dtype == torch.uint8
            assert codes.shape == x.shape
            # within half a step, and a hair for the float32 on the way
            assert float((codes.double() - real.clamp(0, 255)).abs().max()) <= 0.5 + 2e-3


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 7), (1, 4, 6, 17), (5, 1, 1)])
def test_codes_of_gelu_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype, approximate: str) -> None:
    both = (torch.randn(*shape[:-1], 2 * shape[-1]) * 4).to(dtype)
    factor, x = both.chunk(2, -1)  # slices of one tensor, as feed-forwards have them
    for rows in (1, shape[0]):
        scale, zero_point = torch.rand(rows) * 0.02 + 0.01, torch.randint(0, 200, (rows,), dtype=torch.int32)
        for channel_scale in (None, torch.rand(shape[-1]) + 0.5, torch.rand(shape[0], shape[-1]) + 0.5):
            step = along(scale, 0, len(shape))
            if channel_scale is not None:
                step = step * channel_scale.reshape(-1, *[1] * (len(shape) - 2), shape[-1])
            for times in (None, factor):
                value = F.gelu(x.double(), approximate=approximate) * (1 if times is None else times.double())
                real = value / step.double() + along(zero_point, 0, len(shape))
                given = (x, times, approximate == "tanh", scale, zero_point, channel_scale, 255)
                codes = torch.ops.dmq_ao_cpu.gelu_quantize(*given)
                assert (codes.dtype, codes.shape) == (torch.uint8, x.shape)
                assert float((codes.double() - real.clamp(0, 255)).abs().max()) <= 0.5 + 2e-3


def test_a_factor_of_another_shape_is_refused() -> None:
    scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="a factor of its shape"):
        torch.ops.dmq_ao_cpu.gelu_quantize(torch.ones(2, 4), torch.ones(2, 1), True, scale, zero_point, None, 255)


def _tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def _gate_first(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.gelu(gate) * value


@needs_bfloat16
@pytest.mark.parametrize(("activation", "inner"), [(_tanh, 32), (F.gelu, 32), (_geglu, 16), (_gate_first, 16)])
def test_a_feed_forward_is_fused(activation: Callable[[Tensor], Tensor], inner: int) -> None:
    class Feed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = ((8, 16), (16, 32), (inner, 16), (16, 8))
            self.first, self.up, self.down, self.last = (nn.Linear(*s) for s in sizes)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = self.first(x)
            x = x + self.down(F.dropout(activation(self.up(x)), training=self.training))
            return self.last(x) + t.to(x.dtype)[:, None, None]

    model = seeded(Feed)
    samples = record(model, lambda step: model(torch.randn(4, 5, 8), torch.full((4,), step)))
    quantized = flow(model, minmax("w8a8", ranges=Ranges.PER_STEP), samples, backend="onednn")[0]
    fused, x, t = fastest_on_cpu(quantized.graph_module), torch.randn(4, 5, 8), torch.tensor([900, 600, 300, 0])
    targets = [str(node.target) for node in fused.graph.nodes]
    assert targets.count("dmq_ao_cpu.gelu_quantize.default") == 1
    assert not [name for name in targets if "gelu." in name or "gelu_tanh" in name]
    with torch.no_grad():
        assert relative(fused(x, t), quantized.graph_module(x, t)) < 0.02


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (4, 33, 7), (7, 384, 50), (16, 20, 3), (17, 8, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_of_few_rows_is_that_of_float64(rows: int, inputs: int, outputs: int, biased: bool) -> None:
    both = torch.randn(2 * rows, inputs)
    x, weight, bias = both[::2], torch.randn(outputs, inputs), torch.randn(outputs) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert torch.allclose(torch.ops.dmq_ao_cpu.float_linear(x, weight, bias).double(), expected, atol=1e-4)
    narrow = torch.ops.dmq_ao_cpu.float_linear(
        x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
    )
    assert narrow.dtype is torch.bfloat16


def test_padding_is_the_zero_point() -> None:
    x, zero_point = torch.randn(2, 8, 5, 6), torch.tensor([7, 9], dtype=torch.int32)
    args = (x, None, 4, None, None, 1e-5, True, torch.full((2,), 0.03), zero_point, None, 255)
    plain = torch.ops.dmq_ao_cpu.group_norm_quantize(*args, [0, 0])
    padded = torch.ops.dmq_ao_cpu.group_norm_quantize(*args, [2, 1])
    assert padded.shape == (2, 8, 9, 8)
    for row in range(2):
        expected = F.pad(plain[row], (1, 1, 2, 2), value=int(zero_point[row]))
        assert torch.equal(padded[row], expected)


@needs_bfloat16
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "width"),
    [(1, 1, 1, 1, 2), (2, 3, 65, 77, 40), (1, 2, 130, 1025, 16), (2, 1, 64, 513, 64), (1, 4, 50, 512, 8)],
)
def test_attention_is_that_of_float64(batch: int, heads: int, queries: int, keys: int, width: int) -> None:
    q, k, v = (torch.randn(batch, n, heads, width).bfloat16().transpose(1, 2) for n in (queries, keys, keys))
    q = q * 4  # sharp enough that the maximum moves from block to block
    scale = 1 / math.sqrt(width)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    actual = torch.ops.dmq_ao_cpu.attention(q, k, v, scale)
    assert actual.shape == expected.shape
    assert relative(actual, expected) < 5e-3


@needs_bfloat16
def test_attention_of_another_width_is_refused() -> None:
    q, k = torch.randn(1, 1, 4, 6).bfloat16(), torch.randn(1, 1, 4, 8).bfloat16()
    with pytest.raises(ValueError, match=r"attention takes q \[B, H, N, D\]"):
        torch.ops.dmq_ao_cpu.attention(q, k, k, 1.0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("rows", [1, 0])
def test_the_bare_convolution_is_the_backends(name: str, rows: int) -> None:
    shape, out, kernel, given = CONVOLUTIONS[name]
    codes, weight = random_codes(*shape), random_weight(out, shape[1] // given.get("groups", 1), kernel, kernel)
    codes = codes.contiguous(memory_format=torch.channels_last)
    rows = rows or shape[0]
    scale, zero_point = torch.rand(rows), torch.randint(0, 256, (rows,), dtype=torch.int32)
    weight_scale, geometry = torch.rand(out), geometry_of(weight, **given)
    packed = torch.ops.onednn.qconv_prepack(weight, weight_scale, 1.0, 0, *geometry[:4], None)
    args = (codes, scale, zero_point, packed, weight_scale, sums(weight, weight_scale), torch.randn(out))
    expected = torch.ops.dmq_ao.int_conv(*args, *geometry, torch.float32)
    actual = torch.ops.dmq_ao_cpu.conv(*args, *geometry, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(3, 5, 17), (3, 17)])
@pytest.mark.parametrize("bias", [None, torch.arange(6.0)])
def test_the_bare_linear_is_the_backends(shape: tuple[int, ...], rows: int, bias: Tensor | None) -> None:
    codes, weight = random_codes(*shape), random_weight(6, 17)
    scale, zero_point = torch.rand(rows), torch.randint(0, 256, (rows,), dtype=torch.int32)
    weight_scale = torch.rand(6)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    args = (codes, scale, zero_point, packed, weight_scale, sums(weight, weight_scale), bias, torch.float32)
    expected = torch.ops.dmq_ao.int_linear(*args)
    actual = torch.ops.dmq_ao_cpu.linear(*args)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [None, torch.arange(6.0)])
def test_two_bytes_of_a_vector_are_one_product(rows: int, bias: Tensor | None) -> None:
    codes, weight = torch.randint(0, 4096, (3, 17)), random_weight(6, 17)
    scale, zero_point = torch.rand(rows) / 100, torch.randint(0, 4096, (rows,))
    weight_scale = torch.rand(6)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    (high, low), zeros = ((whole >> 4, whole & 15) for whole in (codes, zero_point))
    actual = torch.ops.dmq_ao_cpu.two_byte_linear(
        high.byte(), low.byte(), scale, *zeros, packed, weight_scale, sums(weight, weight_scale), bias, 16.0
    )
    exact = (codes - zero_point[:, None]) @ weight.long().T
    expected = exact.double() * scale[:, None] * weight_scale + (0 if bias is None else bias)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-6


class Block(nn.Module):
    """A residual block with a timestep, attention by two ways of writing it, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.time = nn.Linear(1, 16)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(4, 16) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.drop = nn.Dropout(0.1)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x)
        vector = self.time(t.to(x.dtype)[:, None] / 1000)
        h = self.conv1(F.silu(self.norm1(x))) + vector[:, :, None, None]
        x = x + self.conv2(self.drop(F.silu(self.norm2(h))))
        tokens = self.norm3(x.flatten(2)).transpose(1, 2)
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        written = torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v
        heads = (one.unflatten(-1, (2, 8)).transpose(1, 2) for one in (q, k, v))
        called = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.out(written + called).transpose(1, 2).reshape(x.shape)
        return self.last(F.silu(x))


@pytest.fixture(scope="module")
def block() -> dmq_ao.QuantizedDenoiser:
    model = seeded(Block)
    samples = record(model, lambda step: model(torch.randn(4, 3, 8, 8), torch.full((4,), step)))
    return flow(model, minmax("w4a8", ranges=Ranges.PER_STEP, embeddings=True), samples, backend="onednn")[0]


@needs_bfloat16
def test_a_block_is_fused_and_keeps_its_output(block: dmq_ao.QuantizedDenoiser) -> None:
    fused = fastest_on_cpu(block.graph_module)
    targets = [str(node.target) for node in fused.graph.nodes]
    assert targets.count("dmq_ao_cpu.group_norm_quantize.default") == 3
    assert targets.count("dmq_ao_cpu.attention.default") == 2
    assert targets.count("dmq_ao_cpu.conv.default") == 2
    assert targets.count("dmq_ao_cpu.linear.default") == 2  # queries, keys and values are one
    assert targets.count("dmq_ao_cpu.two_byte_linear.default") == 1
    assert not [name for name in targets if "group_norm.default" in name or name.startswith("dmq_ao.int_")]
    norms = [node for node in fused.graph.nodes if "group_norm_quantize" in str(node.target)]
    assert [node.args[1] is not None for node in norms] == [False, True, False]  # the timestep goes into the second
    assert [node.args[-1] for node in norms] == [[1, 1], [1, 1], [0, 0]]
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([900, 600, 300, 0])
    with torch.no_grad():
        assert relative(fused(x, t), block.graph_module(x, t)) < 0.02


@needs_bfloat16
def test_the_compiler_is_told_the_layouts(block: dmq_ao.QuantizedDenoiser) -> None:
    fused = fastest_on_cpu(block.graph_module)
    calls = []

    class Calls(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            if "dmq_ao_cpu" in str(target):
                calls.append((target, args))
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        Calls(fused).run(torch.randn(2, 3, 8, 8), torch.tensor([900, 0]))
    assert len({target for target, _ in calls}) == 5
    for target, args in calls:
        actual = target(*args)
        told = target(
            *(arg.to("meta") if isinstance(arg, Tensor) and not arg.is_mkldnn else _meta(arg) for arg in args)
        )
        assert (told.shape, told.stride(), told.dtype) == (actual.shape, actual.stride(), actual.dtype), target


def _meta(arg: object) -> object:
    return torch.empty(arg.shape, dtype=torch.int8, device="meta") if isinstance(arg, Tensor) else arg


def test_attention_of_one_tensor_to_itself_is_no_stumbling_block() -> None:
    class Itself(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 2, 5, 8)
    fused = fuse(torch.export.export(Itself(), (x,)).module())
    torch.testing.assert_close(fused(x), Itself()(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "tiles"), [((2, 3), (2, 3), True), ((7, 7), (7, 7), True), ((3, 3), (2, 2), False)]
)
def test_tiles_of_a_transposed_convolution_are_one_product(
    kernel: tuple[int, int], stride: tuple[int, int], tiles: bool, bias: bool
) -> None:
    layer = nn.ConvTranspose2d(4, 3, kernel, stride, bias=bias).requires_grad_(False)
    x = torch.randn(2, 4, 3, 5)
    gm = torch.export.export(layer, (x,)).module()
    fused = fuse(gm)
    assert ("conv_transpose2d" not in fused.code) == tiles
    torch.testing.assert_close(fused(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(RuntimeError, match=r"install a C\+\+ compiler .* and ninja"):
        compiled.load_kernels.__wrapped__()


def test_numbers_that_are_read_by_index_must_be_there() -> None:
    """A file may describe operators that the graph before had no kernel for: sizes are the kernel's own business."""
    cpu, one = torch.ops.dmq_ao_cpu, torch.ones(1)
    x, zero = torch.randn(2, 8, 4, 4), torch.zeros(1, dtype=torch.int32)
    norm = (x, None, 2, torch.ones(8), torch.zeros(8), 1e-5, True)
    wrong = [
        lambda: cpu.group_norm_quantize(*norm, torch.ones(3), zero, None, 255, [0, 0]),
        lambda: cpu.group_norm_quantize(*norm, one, torch.zeros(3, dtype=torch.int32), None, 255, [0, 0]),
        lambda: cpu.group_norm_quantize(*norm, one, zero, one, 255, [0, 0]),
        lambda: cpu.group_norm_quantize(*norm[:2], 3, *norm[3:], one, zero, None, 255, [0, 0]),
        lambda: cpu.group_norm_quantize(*norm[:3], torch.ones(7), *norm[4:], one, zero, None, 255, [0, 0]),
        lambda: cpu.gelu_quantize(torch.randn(2, 8), None, True, torch.ones(3), zero, None, 255),
        lambda: cpu.gelu_quantize(torch.randn(2, 8), None, True, one, zero, torch.ones(7), 255),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="takes"):
            call()
    weight = torch.randn(6, 8)
    with pytest.raises(RuntimeError):
        cpu.float_linear(torch.randn(2, 8), weight, torch.ones(5))
    for bias in (one, torch.ones(6)):
        expected = F.linear(x[:, :, 0, 0], weight, bias)
        assert torch.allclose(cpu.float_linear(x[:, :, 0, 0], weight, bias), expected, atol=1e-6)


@needs_bfloat16
def test_keys_of_one_head_serve_all_queries() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(1, 1, 7, 8), torch.randn(1, 1, 7, 8)
    q, k, v = (one.bfloat16() for one in (q, k, v))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative(torch.ops.dmq_ao_cpu.attention(q, k, v, 8**-0.5).double(), expected) < 0.01
