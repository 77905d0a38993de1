"""The machine code of the CUDA kernels in `kddp_ext._cuda`: resources, instructions, occupancy.

Needs cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "float64", "bfloat16", "float16")  # by ElementType


class MissingError(RuntimeError):
    """Something that is needed to read machine code is missing; the text says what."""


@dataclass(frozen=True)
class Multiprocessor:
    """The resources of a multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities")."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory per block, which ptxas does not report
    registers: int = 65536


MULTIPROCESSORS: Mapping[str, Multiprocessor] = {
    "sm_75": Multiprocessor(1024, 16, 64 << 10, 0),
    "sm_80": Multiprocessor(2048, 32, 164 << 10, 1024),
    "sm_86": Multiprocessor(1536, 16, 100 << 10, 1024),
    "sm_89": Multiprocessor(1536, 24, 100 << 10, 1024),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, 0),
    "sm_100": Multiprocessor(2048, 32, 228 << 10, 0),
    "sm_120": Multiprocessor(1536, 24, 100 << 10, 0),
}


@dataclass(frozen=True)
class Kernel:
    """The resources of one kernel on one architecture, as ptxas reports them."""

    architecture: str
    symbol: str
    registers: int  # per thread
    stack_bytes: int  # per thread: spilled registers, and arrays that are not in registers
    local_bytes: int
    shared_bytes: int  # static, per block

    @property
    def name(self) -> str:
        """A short name: `warps float32 difference` for a kernel of the loss, `warps float32 usual` for that of usual
        calls, otherwise the function's."""
        loss = re.search(r"ElementTypeE(\d)ELb(\d)EEELi(\d+)ELb(\d)ELNS_12GradientFormE(\d)", self.symbol)
        if loss is None:
            others = ("scale_gradients", "gather_layer", "sum_products", "prepare_loss", "probe")
            return next((k for k in others if k in self.symbol), self.symbol)
        dtype, is_usual, lanes, cached, form = loss.groups()
        rows = {"8": "small_teams", "32": "warps", "1024": "blocks" if cached == "1" else "long_rows"}[lanes]
        return f"{rows} {DTYPES[int(dtype)]} {'usual' if is_usual == '1' else ('difference', 'weighted')[int(form)]}"

    def occupancy(self, threads: int, dynamic_shared_bytes: int = 0) -> float:
        """The share of a multiprocessor's threads that blocks of `threads` fill, as NVIDIA's calculator computes it.

        Registers are allocated per warp in units of 256, shared memory per block in units of 128 bytes.
        """
        of = MULTIPROCESSORS[self.architecture]
        warps = -(-threads // 32)
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = of.registers // of_warp // warps
        shared = -(-(self.shared_bytes + dynamic_shared_bytes + of.reserved_bytes) // 128) * 128
        by_shared = of.shared_bytes // shared if shared else of.blocks
        return min(of.blocks, of.threads // threads, by_registers, by_shared) * threads / of.threads


def built_module() -> Path:
    """The installed module `kddp_ext._cuda`.

    Raises:
        MissingError: kddp_ext was built without CUDA kernels.
    """
    spec = importlib.util.find_spec("kddp_ext._cuda")
    if spec is None or spec.origin is None:
        raise MissingError("kddp_ext was built without CUDA kernels: there is no machine code to read")
    return Path(spec.origin)


def _tools() -> dict[str, str]:
    """An environment whose PATH has cuobjdump and nvdisasm."""
    folders = [os.environ.get("PATH", "")]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folders += [str(path) for path in sorted(Path(root).glob("cu*/bin"))]
    return {**os.environ, "PATH": os.pathsep.join(folders)}


def cuobjdump(*arguments: str) -> str:
    """What cuobjdump prints.

    Raises:
        MissingError: cuobjdump or nvdisasm is missing.
    """
    environment = _tools()
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=environment["PATH"]) is None:
            raise MissingError(f"{tool} is missing: pip install nvidia-cuda-{tool}, or put a CUDA toolkit on the PATH")
    command = [str(shutil.which("cuobjdump", path=environment["PATH"])), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def kernels(module: Path) -> list[Kernel]:
    """All kernels of a module, for each architecture that it has machine code for.

    Raises:
        MissingError: A tool is not installed.
    """
    found = []
    architecture = symbol = ""
    for line in cuobjdump("-res-usage", str(module)).splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif "Function " in line:
            symbol = line.split("Function ")[1].strip().removesuffix(":")
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found.append(Kernel(architecture, symbol, usage["REG"], usage["STACK"], usage["LOCAL"], usage["SHARED"]))
    return found


def virtual_architectures(module: Path) -> list[str]:
    """The architectures of a module's PTX, which drivers can translate for newer GPUs."""
    return re.findall(r"PTX file\s+\d+: \S*?(sm_\d+)\S*\.ptx", cuobjdump("-lptx", str(module)))


def instructions(module: Path, architecture: str) -> dict[str, Counter[str]]:
    """Counts the instructions of each kernel, by symbol, with modifiers: `LDG.E.128.CONSTANT`."""
    counted: dict[str, Counter[str]] = {}
    of: Counter[str] = Counter()
    for line in cuobjdump("-sass", "-arch", architecture, str(module)).splitlines():
        if "Function :" in line:
            of = counted.setdefault(line.split("Function :")[1].strip(), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            of[match.group(1)] += 1
    return counted
