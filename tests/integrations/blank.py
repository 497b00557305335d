"""Blank modules in the place of packages that an inference server imports on its way, and that attention never uses.

``install(names)`` makes ``import openai`` and ``from openai.types import X`` succeed with empty classes. Without them a
contract test would download a server's whole list of dependencies in order to look at three classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Anything:
    """What a blank module has under any name: takes all arguments, and is any value to pydantic."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:  # total=False of a TypedDict
        super().__init_subclass__()

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return {"type": "any"}


class _Blank(ModuleType):
    """A module in which every public name is an empty class of its own."""

    __path__: list[str] = []  # noqa: RUF012  importlib looks for it: packages have one
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (_Anything,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        parts = fullname.split(".")
        blank = any(".".join(parts[:n]) in self.names for n in range(1, len(parts) + 1))
        return ModuleSpec(fullname, self, is_package=True) if blank else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Blank(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(names: Iterable[str]) -> None:
    """Blank those of ``names`` that are not installed, and dotted ones (a part of a package) in any case."""
    sys.meta_path.insert(0, _Finder(frozenset(name for name in names if "." in name or find_spec(name) is None)))
