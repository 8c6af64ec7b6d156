"""Compile every variant for its targets, without a GPU, and print its resources as JSON.

    python tests/compile/measure.py             # {"triton": version, "taken": {...}, ...}
    python tests/compile/measure.py --update    # and write resources.json for this Triton

It runs in a process of its own: nothing compiles under TRITON_INTERPRET=1, which the tests set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver
from variant import SHARED_LIMIT, SHARED_LIMIT_EVERYWHERE, Variant
from variants import MAX_COMPILATIONS, all_variants

RECORD = Path(__file__).with_name("resources.json")
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="rewrite the record")
    update = parser.parse_args().update

    taken: dict[str, dict[str, int]] = {}
    limits: dict[str, int] = {}
    errors: dict[str, str] = {}
    for variant in all_variants():
        for target in variant.targets:
            key = f"{variant.name} {target}"
            if key in limits:
                raise ValueError(f"two variants are named {key!r}")
            limits[key] = SHARED_LIMIT[target]
            if variant.everywhere and target.startswith("sm_"):
                limits[key] = SHARED_LIMIT_EVERYWHERE
            try:
                taken[key] = measure(variant, target)
            except Exception as error:  # reported by the gate, with the variants that do compile
                errors[key] = f"{type(error).__name__}: {error}"

    version = triton.__version__
    print(
        json.dumps(
            {
                "triton": version,
                "taken": taken,
                "limits": limits,
                "errors": errors,
                "max_compilations": MAX_COMPILATIONS,
            }
        )
    )
    if update:
        if errors:
            sys.exit(f"not recorded: {len(errors)} variants do not compile: {errors}")
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        record[version] = taken
        RECORD.write_text(_lines(record))


def _lines(record: dict[str, dict[str, dict[str, int]]]) -> str:
    """Format the record with one variant per line, so a diff shows what grew."""
    versions = []
    for version, taken in sorted(record.items()):
        lines = (
            f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}"
            for key, value in sorted(taken.items())
        )
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def measure(variant: Variant, target: str) -> dict[str, int]:
    """Return the registers per thread, and the bytes of stack and shared memory.

    On AMD registers are vector registers, and the number of spilled ones is returned too.
    """
    module, name = variant.kernel.split(":")
    function = getattr(importlib.import_module(module), name)
    driver.set_active(_Driver(_gpu_target(target)))
    source = GluonASTSource if function.is_gluon() else ASTSource
    arguments = _Arguments(variant, function.arg_names)
    compiled = triton.compile(
        source(
            function,
            arguments.types,
            constexprs=arguments.constants,
            attrs=arguments.attributes,
        ),
        target=_gpu_target(target),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            **variant.options,
        },
    )
    taken = {"shared": int(compiled.metadata.shared)}
    if target.startswith("sm_"):
        return taken | _cubin_resources(compiled.asm["cubin"])
    amdgcn = compiled.asm["amdgcn"]
    return taken | {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", amdgcn),
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", amdgcn),
        "spilled_registers": _number(r"\.vgpr_spill_count:\s*(\d+)", amdgcn),
    }


class _Arguments:
    """A variant's arguments in the kernel's order, as ASTSource takes them."""

    def __init__(self, variant: Variant, names: list[str]) -> None:
        """
        Raises:
            ValueError: the kernel has an argument that the variant lacks, or the other way round.
        """
        given = variant.signature.keys() | variant.constexprs.keys()
        if given != set(names):
            unknown, missing = given - set(names), set(names) - given
            raise ValueError(f"{variant.kernel} has no argument {unknown} and lacks {missing}")
        self.constants: dict[tuple[int, ...], object] = {}
        self.attributes: dict[tuple[int, ...], list[list[object]]] = {}
        self.types = {
            name: self._type(variant.signature[name], (position,))
            if name in variant.signature
            else self._constant(variant.constexprs[name], (position,))
            for position, name in enumerate(names)
        }

    def _type(self, kind: Any, path: tuple[int, ...]) -> Any:
        """Return the type without its suffix, of a NamedTuple one of its members' types."""
        if isinstance(kind, tuple):
            members = (self._type(member, (*path, i)) for i, member in enumerate(kind))
            return type(kind)(*members)
        if not isinstance(kind, str):
            return self._constant(kind, path)
        if kind.endswith(":16"):
            self.attributes[path] = [["tt.divisibility", 16]]
        return kind.removesuffix(":16")

    def _constant(self, value: object, path: tuple[int, ...]) -> str:
        self.constants[path] = value
        return "constexpr"


def _gpu_target(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


class _Driver:
    """A stand-in for a GPU's driver, which kernels ask for their target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return {
        "registers": _number(r"REG:(\d+)", shown),
        "stack": _number(r"STACK:(\d+)", shown),
    }


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if not found:
        raise ValueError(f"no {pattern!r} in the compiler's output, which begins {text[:200]!r}")
    return max(map(int, found))


if __name__ == "__main__":
    main()
