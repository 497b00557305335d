"""Builds bsfa: the Python extension with the CPU kernels always, the CUDA library where torch has CUDA.

On a machine whose torch has no CUDA, CMakeLists.txt builds the CUDA library from the same csrc/sources.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())
VERSION = (ROOT / "VERSION").read_text().strip()
TORCH_TARGET = SOURCES["torch_target_version"]


def files(*keys: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for key in keys for glob in SOURCES[key] for p in ROOT.glob(glob))


def shared_libstdcxx() -> list[str]:
    """Link flags that name the shared libstdc++, where the compiler can link it.

    Some compilers come with the static one only: a library with a libstdc++ of its own, loaded beside torch's, crashes
    when it formats or throws an error message.
    """
    flags = ["-Wl,--no-as-needed", "-l:libstdc++.so.6"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("")
        link = [*os.environ.get("CXX", "c++").split(), "-shared", str(source), *flags, "-o", str(Path(folder, "e.so"))]
        try:
            linked = subprocess.run(link, capture_output=True, timeout=60).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            linked = False
    return flags if linked else []


def cutlass_include() -> str:
    """The CUTLASS headers, which the CUDA kernels need; without them the build ends here, saying how to get them."""
    sys.path.insert(0, str(ROOT / "third_party"))
    import find_cutlass

    try:
        return str(find_cutlass.find())
    except RuntimeError as error:
        raise SystemExit(f"bsfa: {error}") from None


LINK_FLAGS = shared_libstdcxx()
MACROS = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("BSFA_VERSION", f'"{VERSION}"')]
INCLUDE_DIRS = [str(ROOT / d) for d in SOURCES["include_dirs"]]

extensions = [
    cpp_extension.CppExtension(
        "bsfa._C",
        files("cpu", "extension"),
        include_dirs=INCLUDE_DIRS,
        define_macros=[*MACROS, ("BSFA_TORCH_TARGET", f'"{TORCH_TARGET}"')],
        extra_compile_args={"cxx": SOURCES["cxx_flags"]},
        extra_link_args=LINK_FLAGS,
    )
]
if torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None:
    extensions.append(
        cpp_extension.CUDAExtension(
            "bsfa.lib.libbsfa_cuda",
            files("cuda", "cuda_torch"),
            include_dirs=[*INCLUDE_DIRS, cutlass_include()],
            define_macros=[*MACROS, ("USE_CUDA", None)],
            extra_compile_args={"cxx": SOURCES["cxx_flags"], "nvcc": SOURCES["nvcc_flags"]},
            extra_link_args=LINK_FLAGS,
        )
    )

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(ext_modules=extensions, cmdclass={"build_ext": cpp_extension.BuildExtension})
