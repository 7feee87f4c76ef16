"""Compile the CUDA kernels for GPUs that need not be there, and print what the machine code is made of, as JSON.

python tests/backends/compile_ahead.py 90        for compute capability 9.0
"""

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmq_ao.backends.cuda import triton_kernels, triton_matmul
from dmq_ao.backends.cuda.weights import LANES

RESULT = ("*fp16", "*fp32", "*i32", "*fp32", "*i32", "*fp16", "*fp16")
OF_FLOATS = ("*bf16", "constexpr", "constexpr", "*fp32", "constexpr", "*bf16", "*bf16")
SIZE = ("i32", "i32", "i32", "constexpr", "i32", "i32", "i32")
CONVOLUTION = (3, 3, 1, 1, 1, 1, 1, 1)
# bits, convolution, shifted, ordered, parts, floats: every branch of the kernel, not every combination
VARIANTS = [
    (8, False, False, False, 1),
    (8, True, False, False, 1),
    (8, True, False, True, 2),
    (4, False, False, False, 1),
    (4, True, False, False, 1),
    (4, True, True, False, 2),
    (4, False, True, True, 1),
    (2, True, False, True, 1),
    (4, False, False, False, 1, True),
    (8, True, False, False, 1, True),
]
TILE = (128, 128, 64)
GROUP = 8


def source(bits: int, convolution: bool, shifted: bool, ordered: bool, parts: int, floats: bool = False) -> ASTSource:
    """One variant of the kernel, pointers and row lengths aligned to 16 bytes as the library lays them out."""
    kernel = triton_kernels.matmul
    operands = {
        "x": "*bf16" if floats else "*i8",
        "packed": "*i8" if bits == 8 else "*u8",
        "order": "*i32" if ordered else "constexpr",
        "middle": "*i8" if bits < 8 else "constexpr",
        "shifts": "*i8" if shifted else "constexpr",
        "partial": "*i32" if parts > 1 else "constexpr",
    }
    tuples = {
        "operands": tuple(operands.values()),
        "result": OF_FLOATS if floats else RESULT,
        "size": SIZE,
        "segment": ("i32",) * 4,
    }
    constants: dict[Any, Any] = {
        "GEOMETRY": CONVOLUTION if convolution else triton_matmul.LINEAR_GEOMETRY,
        "CONVOLUTION": convolution,
        "FLOATS": floats,
        "BITS": bits,
        "LANES": LANES,
        "TILE": (*TILE, parts, GROUP),
        "INTERPRETED": False,
    }
    signature: dict[str, Any] = tuples | dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names
    for place, types in enumerate(tuples.values()):
        constants |= {(place, i): None for i, kind in enumerate(types) if kind == "constexpr"}
    constants[2, SIZE.index("constexpr")] = 0 if floats else 1
    aligned = [(0, i) for i, kind in enumerate(operands.values()) if kind != "constexpr"] + [(3, 2), (3, 3)]
    attrs = {path: [["tt.divisibility", 16]] for path in aligned}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)


def facts(variant: ASTSource, capability: int) -> dict[str, Any]:
    """Instructions that multiply, and what a program takes of a multiprocessor."""
    options = {"num_warps": 8, "num_stages": 3}
    compiled = triton.compile(variant, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    products = sorted(set(re.findall(r"wgmma\.mma_async\S+|mma\.sync\S+", ptx)))
    return {"products": products, "shared": compiled.metadata.shared, "copies": ptx.count("cp.async")}


def main(capability: int) -> None:
    """Print the facts of every variant."""
    found = {}
    for variant in VARIANTS:
        found[str(variant)] = facts(source(*variant), capability)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
