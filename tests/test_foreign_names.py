"""Who may name what: backends their kernels and themselves, one file what PyTorch keeps to itself."""

import ast
import re
from collections.abc import Iterator

import pytest
from test_imports import ROOT, absolute_imports, source_files

PRIVATE = "dmq_ao/graph/private.py"
KERNELS = re.compile(r"torch\.ops\.(?:dmq_ao_cpu|onednn)\b|\b(?:int|int4|float8|cuda|library)_(?:conv|linear)\b")
# Words that are spelled like a backend and mean something else.
OTHER_WORDS = {("dmq_ao/evaluation/pictures.py", "reference"): "a caption"}
# The documented methods of a named tuple begin with an underscore so that they are no fields.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
FILES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in source_files(ROOT)}
TREES = {path: ast.parse(source) for path, source in FILES.items()}


def backend_names() -> tuple[str, ...]:
    """As ``backends/__init__.py`` says them, read without importing it."""
    (names,) = (
        node.value
        for node in TREES["backends/__init__.py"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES"
    )
    return tuple(ast.literal_eval(names))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def test_kernels_are_named_in_the_room_of_their_backend() -> None:
    assert [
        path for path, source in FILES.items() if not path.startswith("backends/") and KERNELS.search(source)
    ] == []


def test_the_pattern_knows_every_kernel() -> None:
    from dmq_ao.backends.registry import ALL_BACKENDS

    names = [kernel.target.overloadpacket.__name__ for one in ALL_BACKENDS.values() for kernel in one.kernels]
    assert len(names) >= 7
    assert [name for name in names if not KERNELS.fullmatch(name)] == []


def test_a_backend_room_is_a_backend() -> None:
    """Folders are backends; ``onednn`` and ``cuda`` do not know each other."""
    rooms = [path.parent.name for path in (ROOT / "backends").glob("*/__init__.py")]
    assert set(rooms) <= set(backend_names())
    for here in rooms:
        files = [path for path in TREES if path.startswith(f"backends/{here}/")]
        assert files
        imports = [name for path in files for _, name in absolute_imports(TREES[path])]
        others = tuple(f"dmq_ao.backends.{there}" for there in rooms if there != here)
        assert [name for name in imports if name.startswith((*others, "dmq_ao.backends.registry"))] == []


# ---------------------------------------------------------------------------------------------------------------------
# Names of backends


def named_backends(path: str, tree: ast.AST, names: tuple[str, ...]) -> list[str]:
    """Where a file names a backend, whose folder it is not in."""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or node.value not in names:
            continue
        if (path, node.value) not in OTHER_WORDS and not means_something_else(node, parents):
            faults.append(f"{path}:{node.lineno}: {node.value!r}; ask what a backend can do, not its name")
    return faults


def means_something_else(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a word is a kind of device, or a compatibility, by what it is compared with or passed to."""
    while node in parents and not isinstance(node, ast.stmt):
        node = parents[node]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.device":
            return True
        if isinstance(node, ast.Compare):
            sides = {ast.unparse(side).rpartition(".")[2] for side in (node.left, *node.comparators)}
            return bool(sides & {"type", "compat"})
    return False


def test_no_backend_is_asked_by_its_name() -> None:
    faults = [
        fault
        for path, tree in TREES.items()
        if not path.startswith("backends/")
        for fault in named_backends(path, tree, backend_names())
    ]
    assert faults == []


def test_a_folder_of_a_backend_names_no_other() -> None:
    names = backend_names()
    for path, tree in TREES.items():
        room = path.split("/")[1] if path.count("/") > 1 and path.startswith("backends/") else None
        if room in names:
            assert named_backends(path, tree, tuple(set(names) - {room})) == [], path


def test_registry_and_command_line_have_the_same_backends() -> None:
    from dmq_ao.backends import AUTO, NAMES
    from dmq_ao.backends.registry import ALL_BACKENDS
    from dmq_ao.cli.options import BackendName

    assert backend_names() == NAMES == tuple(ALL_BACKENDS)
    assert [choice.value for choice in BackendName] == [AUTO, *ALL_BACKENDS]
    assert {name: backend.name for name, backend in ALL_BACKENDS.items()} == {name: name for name in NAMES}


# ---------------------------------------------------------------------------------------------------------------------
# What PyTorch keeps to itself


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(tree: ast.AST) -> Iterator[str]:
    """Private names that a file defines: functions, classes, fields, and attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


OWN = {name for tree in TREES.values() for name in own_names(tree) if is_private(name)}


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names that a file has no business with: private ones of PyTorch, imported or reached for."""
    for line, name in absolute_imports(tree):
        if name.split(".")[0] == "torch" and any(map(is_private, name.split("."))):
            yield f"{line}: import of {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            of_ours = owner in ("self", "cls") or owner.startswith("super()") or node.attr in OWN
            operator = owner.startswith("torch.ops.") or owner.rpartition(".")[2] in ("aten", "_aten")
            if not (of_ours and not owner.startswith("torch")) and not operator and node.attr not in OF_NAMED_TUPLES:
                yield f"{node.lineno}: {owner}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(name) and name not in OF_NAMED_TUPLES and ast.unparse(node.args[0]) != "self":
                yield f"{node.lineno}: {name!r} of {ast.unparse(node.args[0])}"
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("__dict__"):
            name = node.slice.value if isinstance(node.slice, ast.Constant) else ""
            if is_private(name):
                yield f"{node.lineno}: {name!r} of {ast.unparse(node.value)}"


@pytest.mark.parametrize("path", sorted(set(FILES) - {PRIVATE}))
def test_private_names_stand_in_one_file(path: str) -> None:
    assert [f"{path}:{fault}" for fault in private_names(TREES[path])] == []


def test_that_file_is_all_private_names() -> None:
    assert len(list(private_names(TREES[PRIVATE]))) >= 10


@pytest.mark.parametrize(
    "source",
    [
        "import torch._inductor.config",
        "from torch._ops import OpOverload",
        "from torch.utils import _pytree",
        "from torch.utils._pytree import tree_map",
        "def f():\n    from torch._subclasses.fake_tensor import FakeTensorMode",
        "x = torch._int_mm(a, b)",
        "isinstance(target, torch._ops.OpOverload)",
        "torch.cpu._is_vnni_supported()",
        "gm._forward_pre_hooks.clear()",
        "node._erased",
        "target._schema.is_mutable",
        'getattr(target, "_schema", None)',
        'hasattr(torch.cpu, "_is_vnni_supported")',
        'twin.__dict__["_modules"] = {}',
    ],
)
def test_guard_catches_private_names(source: str) -> None:
    assert len(list(private_names(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.__version__",
        "self._calls.append(1)",
        "torch.ops.aten._weight_int4pack_mm_for_cpu(x)",
        "aten._to_copy.default",
        "Tile._make([1])._replace(parts=1)",
        'getattr(torch.cpu, "get_capabilities", None)',
        "from torch.utils.flop_counter import FlopCounterMode",
    ],
)
def test_guard_lets_public_names_pass(source: str) -> None:
    assert list(private_names(ast.parse(source))) == []


@pytest.mark.parametrize(
    "source",
    [
        'if quantized.backend == "onednn":\n    pass',
        'PLANS = {"cuda": plan}',
        'choose("reference", device)',
        '("cuda",)',
    ],
)
def test_guard_catches_names_of_backends(source: str) -> None:
    assert len(named_backends("dmq_ao/x.py", ast.parse(source), ("onednn", "cuda", "reference"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        'device.type == "cuda"',
        'torch.device(device).type != "cuda"',
        'torch.device("cuda")',
        'compat not in (None, "reference")',
        '"""onednn and cuda are backends."""',
    ],
)
def test_guard_lets_other_words_pass(source: str) -> None:
    assert named_backends("dmq_ao/x.py", ast.parse(source), ("onednn", "cuda", "reference")) == []
