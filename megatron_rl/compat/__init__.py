"""One file per dependency that must be adapted; each names the version it was written for.

Importing megatron_rl leaves torch as it is: what Megatron needs on a machine without CUDA is put in when, and only
when, somebody imports megatron.core.
"""

from __future__ import annotations

import importlib.abc
import sys


class _BeforeMegatron(importlib.abc.MetaPathFinder):
    """Finds nothing; runs megatron_cpu.install() before the first import of megatron.core, whoever asks for it."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "megatron.core":
            sys.meta_path[sys.meta_path.index(self)] = _NoWandbForMegatron()
            _install()
        return None


class _NoWandbForMegatron(importlib.abc.MetaPathFinder):
    """Refuses the first import of wandb after that of megatron.core, which is that of megatron/core/timers.py (0.19.2).

    It can do without. The import takes a second in every rank and makes two folders in the system's temporary folder,
    which a rank that is killed leaves behind.
    """

    def find_spec(self, fullname, path, target=None):
        if fullname == "wandb":
            sys.meta_path.remove(self)
            raise ModuleNotFoundError("Megatron's timers go without wandb", name="wandb")
        return None


def adapt_megatron_when_imported() -> None:
    """Called by megatron_rl/__init__.py. RuntimeError without CUDA if megatron.core has been imported already."""
    if "megatron.core" in sys.modules:
        _install()
    else:
        sys.meta_path.insert(0, _BeforeMegatron())


def _install() -> None:
    from megatron_rl.compat import megatron_cpu  # here, because it imports torch

    megatron_cpu.install()
