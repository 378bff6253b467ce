"""SGLang on a host without a GPU and without its CPU kernels, for tests and trials: ``--cpu-shim`` after ``--``.

SGLang computes on CPU with PyTorch alone if it must (``SGLANG_USE_CPU_ENGINE=1``, attention backend torch_native), but
three things in what pip installs stand in the way of importing it:

- ``sgl_kernel`` has wheels for CUDA only. Here is a module of that name in which everything exists and, if ever called,
  raises NotImplementedError that names it. Dense models (Llama, Qwen) call nothing of it; quantised ones,
  mixtures of experts and state-space models do.
- ``torchvision`` beside a CPU build of PyTorch looks for the schemas of two operators of its CUDA library. They are
  declared, without a kernel.
- SGLang's NIXL backend registers its KV pool as GPU memory, which UCX refuses for host memory: the names of such kinds
  of memory are made to mean host memory.

Everything is done by import hooks in this process and, as SGLang spawns its processes, once more in each of those:
:func:`install` makes this file the main module that they begin with. Nothing is written anywhere.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

KERNELS = "sgl_kernel"
NIXL = ("nixl_cu12._api", "nixl_cu13._api")
GPU_MEMORY = ("VRAM", "cuda")
MODULE = "p2pdyn.engines.sglang.cpu_shim"
"""This one, by the name that spawned processes import it by."""


def install() -> None:
    """Call it before SGLang is imported, in the process that will start it. Idempotent."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("UCX_TLS", "tcp,self,sm")
    hook()
    # What multiprocessing has its spawned processes import first, before anything of SGLang.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(MODULE)


def hook() -> None:
    """The import hooks alone."""
    if KERNELS not in sys.modules:
        sys.modules[KERNELS] = _kernels()
        sys.meta_path.insert(0, _Finder())


def _kernels() -> types.ModuleType:
    module = types.ModuleType(KERNELS)
    module.__version__ = "0+none"  # type: ignore[attr-defined]
    module.__path__ = []
    module.__spec__ = importlib.util.spec_from_loader(KERNELS, loader=None, is_package=True)

    def absent(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **named: Any) -> None:
            raise NotImplementedError(
                f"sgl_kernel.{name} has no CPU kernel here: this model needs SGLang's own CPU build"
            )

        return call

    module.__getattr__ = absent  # type: ignore[method-assign]
    return module


class _Finder(importlib.abc.MetaPathFinder):
    """Does something before, or behind, the import of some modules; finds none by itself but NIXL's."""

    def __init__(self) -> None:
        self._searching = False
        self._schemas: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision" and self._schemas is None:
            self._schemas = _declare_operators()
        if name in NIXL and not self._searching:
            self._searching = True
            try:
                return _patched(importlib.util.find_spec(name))
            finally:
                self._searching = False
        return None


def _declare_operators() -> Any:
    """The schemas last as long as what is returned."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _patched(spec: ModuleSpec | None) -> ModuleSpec | None:
    """NIXL's module, in which agents take GPU memory for host memory."""
    if spec is None or spec.loader is None:
        return spec
    execute = spec.loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        execute(module)
        begin = module.nixl_agent.__init__

        def __init__(self: Any, *args: Any, **named: Any) -> None:
            begin(self, *args, **named)
            kinds = self.nixl_mems
            kinds.update({kind: kinds["DRAM"] for kind in GPU_MEMORY if kind in kinds})

        module.nixl_agent.__init__ = __init__

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


if __name__ == "__mp_main__":  # in a process that SGLang has spawned
    hook()
