"""Stand-ins for compiled packages that SGLang imports at module level but that nothing under test calls.

SGLang's Python files name triton's decorators and constants while they are imported; a CPU-only machine has no use for
the compiler itself (280 MB). Every name below ``triton`` is an object that can be called, subscripted, subclassed and
used as a decorator, and that fails when a kernel is launched.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import torch

NAMES = ("triton", "torchvision", "torchaudio")


class _Stub(types.ModuleType):
    """A module whose attributes are made on demand: classes for capitalised names, more stubs for others."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__}.{name}")
        full = f"{self.__name__}.{name}"
        made: Any = type(name, (), {"__module__": self.__name__, "__init__": lambda *_, **__: None})
        if not name[0].isupper():
            made = sys.modules.get(full) or _Stub(full)
            made.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A decorator, with or without arguments: the function becomes a kernel that cannot be launched."""
        if len(args) == 1 and isinstance(args[0], types.FunctionType) and not kwargs:
            return _Kernel(args[0])
        return lambda function: function if isinstance(function, _Kernel) else _Kernel(function)

    def __getitem__(self, key: Any) -> Any:
        return self


class _Kernel:
    """A kernel's name without a kernel."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"{self.__name__} is a kernel, and this process has no triton")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below the stubbed names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Stub(spec.name)
        if spec.name == "triton":
            module.__version__ = "0.0.0+stub"
            module.cdiv = lambda a, b: -(-a // b)
            module.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)


def install() -> None:
    """Put the stand-ins in place, before anything of SGLang is imported.

    On a machine with a GPU SGLang is told that there is none: it would import its own compiled kernels. Tensors and
    kernels on the GPU work all the same.
    """
    torch.cuda.is_available = lambda: False
    from transformers.utils import import_utils

    for name in NAMES:  # transformers remembers the answer, and does without what is not there
        getattr(import_utils, f"is_{name}_available", lambda: None)()
    sys.meta_path.append(_Finder())  # last: a real package wins
