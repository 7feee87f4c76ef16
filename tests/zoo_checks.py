"""What must hold of every case of the zoo: it agrees with itself everywhere, or is refused in words of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plain import small as few_steps
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import KINDS, Spec, build, call, kind_of

import dmq_ao
from dmq_ao import backends, observers, passes, recipes
from dmq_ao.config import AttentionConfig, Ranges, Recipe

ROOTS = tuple(str(Path(room.__file__).resolve().parent) for room in (dmq_ao, backends, observers, passes))
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
# A value at the edge of two codes falls on either side as sums are rounded: a part of a step of so many bits.
EDGE = {"wide": 2**-7, "narrow": 2**-5}
SECONDS, COMPILE_SECONDS = 60, 300
# What may be refused, and what is said: all else is a fault, however it is worded.
STAGES = ("record", "prepare", "calibrate", "convert")
REFUSALS = (
    r"is a timestep \(.*a module whose forward also takes timestep",
    r"must be a number or a tensor \[\], \[1\] or .*Record and prepare a module that takes one value a row",
    r"group_size \d+ does not divide the \d+ inputs of \S+; .* would do",
    r"a window is \d+ timesteps in a row.*sample in \d+ steps or more, or leave windows out",
    r"captured for some numbers of samples alone.*Prepare it with another number",
)
NOT_FINITE = r"^\S+ \S+ its input holds NaN or infinity; check the samples and the float denoiser"
# Choices by value: where one differs, so does all that follows.
DISCRETE = ("Experts", "Table", "Squeezed")


class TooSlow(BaseException):
    """A case ran longer than it may."""


class Fault(Exception):
    """Something that must hold does not."""


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        result: ``agrees``, ``refused``, ``fault``, or ``net`` where the float net itself fails.
        stage: where it ended.
        why: the error's words.
        notes: what else was looked at, and its result.
        seconds: of the processor that it took.
    """

    result: str
    stage: str = ""
    why: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``TooSlow`` after so many seconds of this process."""

    def stop(number: int, frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def recipe_of(spec: Spec) -> Recipe:
    """The recipe of a case, with few steps of learning."""
    minmax = recipes.minmax
    recipe = {
        "w8a8": lambda: minmax("w8a8"),
        "w4a8": lambda: minmax("w4a8"),
        "per step": lambda: minmax("w8a8", ranges=Ranges.PER_STEP),
        "dynamic": lambda: minmax("w8a8", ranges=Ranges.DYNAMIC),
        "groups": lambda: minmax("w4a8", group_size=2),
        "embeddings": lambda: minmax("w8a8", embeddings=True),
        "attention": lambda: minmax("w8a8"),
        "mse": lambda: minmax("w4a8", observer="mse"),
        "weights": lambda: minmax("w4a16"),
        "votes": lambda: minmax("w4a8", power_of_two=True, ranges=Ranges.PER_STEP),
        "default": lambda: few_steps(recipes.default("w4a8"), 2),
        "dmq": lambda: few_steps(recipes.dmq("w4a8"), 2),
        "eda_dm": lambda: few_steps(recipes.eda_dm("w4a8"), 2),
        "mpq_dm": lambda: few_steps(recipes.mpq_dm("w3a6"), 2),
    }[spec.recipe]()
    attention = AttentionConfig(8, 8) if spec.recipe == "attention" else recipe.config.attention
    keep = ("first",) if spec.recipe == "groups" else ()  # three inputs
    config = dataclasses.replace(recipe.config, keep_float=keep, attention=attention)
    return dataclasses.replace(recipe, config=config)


def recorded(net: nn.Module, spec: Spec, recipe: Recipe) -> dmq_ao.CalibrationSet:
    """Samples of a case, from four calls, eight rows at most."""
    name = "noise_level" if kind_of(spec) == "named timestep" else None
    count = 1 if spec.values == "one sample" else 8
    select = recipe.select if spec.recipe == "mpq_dm" and count > 1 else "uniform"
    with dmq_ao.record(net, num_samples=count, timestep_arg=name, select=select) as recorder, torch.no_grad():
        for step in range(1 if spec.values == "one sample" else 4):
            args, kwargs = call(spec, step)
            net(*args, **kwargs)
    return recorder.calibration_set()


def tensors(answer: Any) -> list[Tensor]:
    """All tensors of an answer of any type."""
    if dataclasses.is_dataclass(answer):
        answer = answer.__dict__
    return [one for one in tree_leaves(answer) if isinstance(one, Tensor)]


def shape_of(answer: Any) -> Any:
    """Types of an answer, all the way down."""
    if isinstance(answer, Tensor):
        return (tuple(answer.shape), answer.dtype)
    if dataclasses.is_dataclass(answer):
        return (type(answer), shape_of(answer.__dict__))
    if isinstance(answer, dict):
        return {key: shape_of(value) for key, value in answer.items()}
    if isinstance(answer, (tuple, list)):
        return (type(answer), [shape_of(one) for one in answer])
    return answer


def distance(actual: Any, expected: Any) -> float:
    """Relative error of an answer's tensors together."""
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    norm = sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5
    return off / max(norm, 1e-30)


def is_finite(answer: Any) -> bool:
    return all(bool(one.isfinite().all()) for one in tensors(answer))


def nudged(spec: Spec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its sample changed by rounding, nearly: how much an answer then moves is how exact it can be."""
    small = {"float32": 3e-7, "bfloat16": 4e-3, "float16": 5e-4}[spec.dtype]

    def moved(x: Any) -> Any:
        sample = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 2
        return x * (1 + small * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))) if sample else x

    def cast(x: Any, like: Any) -> Any:
        return x.to(like.dtype) if isinstance(x, Tensor) else x

    return tuple(cast(moved(x), x) for x in args), {name: cast(moved(x), x) for name, x in kwargs.items()}


def same(spec: Spec, one: Callable[..., Any], other: Callable[..., Any], where: str, inputs: Any) -> str:
    """Hold one backend against another, as exactly as rounding at the edge of a code allows; how exactly."""
    args, kwargs = inputs
    expected, actual = other(*args, **kwargs), one(*args, **kwargs)
    if shape_of(actual) != shape_of(expected):
        raise Fault(f"{where}: {shape_of(actual)}, not {shape_of(expected)}")
    if not is_finite(expected):
        return "not finite"
    off = distance(actual, expected)
    modes = any(name == "Mode" for _, name, _ in spec.blocks)
    tolerance = TOLERANCE["bfloat16" if modes else spec.dtype]  # autocast
    if off <= tolerance:
        return "exactly"
    moved_args, moved_kwargs = nudged(spec, args, kwargs)
    moved = distance(other(*moved_args, **moved_kwargs), expected)
    if off <= 10 * moved:
        return "as far as rounding of the sample moves it"
    chosen = any(name in DISCRETE for _, name, _ in spec.blocks)
    if not off <= (0.5 if chosen else EDGE["narrow" if spec.recipe == "mpq_dm" else "wide"]):
        raise Fault(f"{where}: off by {off:.2g}, rounding of the sample moves it by {moved:.2g}")
    return "but for codes at an edge"


def _rows(net: nn.Module, unread: set[str], quantized: dmq_ao.QuantizedDenoiser) -> None:
    """Every matrix that the net's parts hold has a row."""
    rows = {re.sub(r"(\.part\d+|#\d+)+$", "", row["name"]) for row in quantized.layer_reports()}
    names: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if (
            parameter.dim() > 1
            and parameter.numel() > max(parameter.shape)
            and not name.endswith((".bias", ".vector"))
        ):
            names.setdefault(id(parameter), []).append(name)
    for aliases in names.values():
        end = r"\.(weight(_orig|_g|_v)?|parametrizations\.weight\.original\d?)$"
        modules = {name.rpartition(".")[0] for name in aliases}  # of weights that its code computes
        if not {*aliases, *modules, *(re.sub(end, "", name) for name in aliases)} & rows and not set(aliases) & unread:
            raise Fault(f"rows: {aliases} has none among {sorted(rows)}")


def find_unread(net: nn.Module, inputs: Any) -> set[str]:
    """Parameters [...] without influence on the answer: a row for them would be of nothing."""
    args, kwargs = inputs
    with torch.enable_grad():
        answer = tensors(net(*args, **kwargs))[0]
        if answer.requires_grad:
            answer.float().sum().backward()
    return {name for name, parameter in net.named_parameters() if parameter.grad is None}


class Examination:
    """One case, stage by stage."""

    def __init__(self, spec: Spec, compiled: bool) -> None:
        self.spec, self.compiled = spec, compiled
        self.stage = "net"
        self.notes: dict[str, str] = {}

    def run(self) -> None:
        """Raise what goes wrong; ``stage`` says where."""
        spec = self.spec
        net, recipe, inputs = build(spec), recipe_of(spec), call(spec, 1)
        with torch.no_grad():
            expected = net(*inputs[0], **inputs[1])
            for step in (0, 2, 3):
                args, kwargs = call(spec, step)
                if not is_finite((expected, net(*args, **kwargs))):
                    self.notes["float"] = "not finite"
        unread = find_unread(build(spec), call(spec, 1))
        self.stage = "record"
        samples = recorded(net, spec, recipe)
        self.stage = "prepare"
        prepared = dmq_ao.prepare(net, recipe, samples.example(), timestep_arg=samples.timestep_arg)
        self.stage = "calibrate"
        dmq_ao.calibrate(prepared, samples, progress=False)
        self.stage = "convert"
        reference, onednn = (dmq_ao.convert(prepared, backend) for backend in ("reference", "onednn"))
        with torch.no_grad():
            self.stage = "first call"
            self._against_float(reference(*inputs[0], **inputs[1]), expected)
            _rows(net, unread, reference)
            self.notes["onednn"] = same(spec, onednn, reference, "onednn", inputs)
            self.stage = "save and load"
            self._reloaded(net, {"reference": reference, "onednn": onednn}, inputs)
            self.stage = "NaN"
            self._with_nan(net, onednn)
            self.stage = "other sizes"
            for name, (batch, other) in {"other batch": (spec.batch + 1, False), "other size": (None, True)}.items():
                self._at_size(name, net, reference, onednn, call(spec, 2, batch, other))
            self.stage = "other calls"
            self._called_otherwise(net, onednn, inputs)
            self.stage = "compiled"
            if self.compiled:
                torch._dynamo.reset()
                self.notes["compiled"] = same(spec, dmq_ao.compile(onednn), onednn, "compiled", inputs)

    def _against_float(self, actual: Any, expected: Any) -> None:
        if shape_of(actual) != shape_of(expected):
            raise Fault(f"answers {shape_of(actual)}, the net {shape_of(expected)}")
        if not is_finite(expected):
            return
        if not is_finite(actual):
            raise Fault("the answer is not finite")
        off = distance(actual, expected)
        exact = self.spec.recipe in ("w8a8", "per step", "dynamic", "embeddings", "attention")
        chosen = any(name in DISCRETE for _, name, _ in self.spec.blocks)
        if exact and not chosen and off > 0.3:
            raise Fault(f"8 bits are off by {off:.2g} from the float net")
        self.notes["error"] = f"{off:.3g}"

    def _reloaded(self, net: nn.Module, denoisers: dict[str, dmq_ao.QuantizedDenoiser], inputs: Any) -> None:
        args, kwargs = inputs
        with tempfile.TemporaryDirectory() as folder:
            dmq_ao.save(denoisers["onednn"], folder)
            for backend, denoiser in denoisers.items():
                loaded = dmq_ao.load(folder, model=net, backend=backend)
                one, other = loaded(*args, **kwargs), denoiser(*args, **kwargs)
                if shape_of(one) != shape_of(other):
                    raise Fault(f"loaded answers {shape_of(one)}, not {shape_of(other)}")
                if not all(
                    torch.equal(a.nan_to_num(7), b.nan_to_num(7))
                    for a, b in zip(tensors(one), tensors(other), strict=True)
                ):
                    raise Fault(f"loaded on {backend}: off by {distance(one, other):.2g}")
                if loaded.mean_bits != denoiser.mean_bits:
                    raise Fault(f"loaded has {loaded.mean_bits} bits, not {denoiser.mean_bits}")

    def _with_nan(self, net: nn.Module, quantized: dmq_ao.QuantizedDenoiser) -> None:
        args, kwargs = call(self.spec, 1, 2)
        sample = next(
            x
            for x in (*args, *kwargs.values())
            if isinstance(x, Tensor) and 3 in (x.shape[1], x.shape[-1]) and x.dim() > 2
        )
        sample[1] = float("nan")
        expected, actual = tensors(net(*args, **kwargs))[0], tensors(quantized(*args, **kwargs))[0]
        if expected[1].isnan().any() and not actual[1].isnan().any():
            raise Fault("a row of NaN comes out finite")
        # Where PyTorch puts tokens before samples, an input's own range is that of a token of all samples.
        shares = any(name == "Multihead" for _, name, _ in self.spec.blocks) and self.spec.recipe == "dynamic"
        if not shares and not expected[0].isnan().any() and actual[0].isnan().any():
            raise Fault("the row beside one of NaN comes out as NaN")

    def _called_otherwise(self, net: nn.Module, quantized: dmq_ao.QuantizedDenoiser, inputs: Any) -> None:
        """Calls that the samples were not of: answered as the net answers, or refused."""
        args, kwargs = inputs
        calls: dict[str, Any] = {f"without {name}": (args, kwargs | {name: None}) for name in kwargs}
        calls["an unknown keyword"] = (args, kwargs | {"other": 1})
        calls["a positional too many"] = ((*args, 1), kwargs)
        calls["no rows"] = call(self.spec, 1, 0)
        timestep = KINDS[kind_of(self.spec)][2]
        if timestep in kwargs:
            calls["a number for the timestep"] = (args, kwargs | {timestep: 300})
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                calls[f"{name} in float64"] = (args, kwargs | {name: value.double()})
                calls[f"{name} with an axis more"] = (args, kwargs | {name: value[None]})
            elif not isinstance(value, bool) and isinstance(value, (int, float)):
                calls[f"{name} another number"] = (args, kwargs | {name: value + 1})
            elif isinstance(value, tuple):
                calls[f"{name} a list"] = (args, kwargs | {name: list(value)})
        for name, (other_args, other_kwargs) in calls.items():
            self._answer_or_refusal(name, net, quantized, other_args, other_kwargs)

    def _answer_or_refusal(self, name: str, net: nn.Module, quantized: Any, args: Any, kwargs: Any) -> None:
        try:
            answer = quantized(*args, **kwargs)
        except Exception as error:
            if not is_ours(error):
                raise Fault(f"a call with {name}: {type(error).__name__}: {error}") from error
            return
        try:
            expected = net(*args, **kwargs)
        except Exception as error:  # the net's own limit
            if name in ("an unknown keyword", "a positional too many"):
                raise Fault(f"a call with {name} was answered, the net says {error}") from error
            return
        if shape_of(expected) != shape_of(answer):
            raise Fault(f"a call with {name}: answers {shape_of(answer)}, the net {shape_of(expected)}")

    def _at_size(self, name: str, net: nn.Module, reference: Any, onednn: Any, inputs: Any) -> None:
        args, kwargs = inputs
        try:
            expected = net(*args, **kwargs)
        except Exception:  # the net's own limit
            self.notes[name] = "not of the net"
            return
        try:
            actual = reference(*args, **kwargs)
        except Exception as error:
            if not is_ours(error):
                raise
            self.notes[name] = f"refused: {error}"
            return
        if shape_of(actual) != shape_of(expected):
            raise Fault(f"{name}: answers {shape_of(actual)}, the net {shape_of(expected)}")
        if is_finite(expected) and not is_finite(actual):
            raise Fault(f"{name}: not finite")
        self.notes[name] = same(self.spec, onednn, reference, name, inputs)


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by the package, in its words, and not by what it calls."""
    frames = traceback.extract_tb(error.__traceback__)
    words = isinstance(error, (TypeError, ValueError)) and (frames[-1].line or "").startswith("raise ")
    return words and frames[-1].filename.startswith(ROOTS)


def may_refuse(text: str, notes: dict[str, str]) -> bool:
    """Whether an error is one that is allowed."""
    if re.search(NOT_FINITE, text):
        return "float" in notes
    return any(re.search(words, text) for words in REFUSALS)


def examine(spec: Spec, compiled: bool = False) -> Outcome:
    """What becomes of a case."""
    started = time.process_time()
    case = Examination(spec, compiled)
    outcome = Outcome("agrees")
    try:
        with limited(COMPILE_SECONDS if compiled else SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
    except TooSlow:
        outcome = Outcome("fault", case.stage, "it did not end")
    except Fault as error:
        outcome = Outcome("fault", case.stage, str(error))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if case.stage == "net":
            outcome = Outcome("net", case.stage, text)
        elif is_ours(error) and case.stage in STAGES and may_refuse(text, case.notes):
            outcome = Outcome("refused", case.stage, text)
        else:
            outcome = Outcome(
                "fault", case.stage, text + "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
            )
    outcome.notes = case.notes
    outcome.seconds = time.process_time() - started
    return outcome
