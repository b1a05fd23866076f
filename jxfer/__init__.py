"""jxfer, the transfer-learning laboratory for JAX: the public names, each imported when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jxfer import config, methods, models, objectives, optim, paths, typing
    from jxfer.partition import Partition
    from jxfer.pretrained import load
    from jxfer.sharding import make_mesh, put_batch
    from jxfer.state import hold_frozen, init_state, merge_state, place_state
    from jxfer.step import make_eval_step, make_train_step
    from jxfer.typing import InputError

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Partition",
    "__version__",
    "config",
    "hold_frozen",
    "init_state",
    "load",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "merge_state",
    "methods",
    "models",
    "objectives",
    "optim",
    "paths",
    "place_state",
    "put_batch",
    "typing",
]

_HOME = {
    "InputError": "typing",
    "Partition": "partition",
    "hold_frozen": "state",
    "init_state": "state",
    "load": "pretrained",
    "make_eval_step": "step",
    "make_mesh": "sharding",
    "make_train_step": "step",
    "merge_state": "state",
    "place_state": "state",
    "put_batch": "sharding",
}
"""Public name -> the module that defines it; the other names of `__all__` are modules."""


def __getattr__(name: str) -> Any:
    # Importing at first use keeps `jxfer --help` from waiting for jax, and the core free of what only commands need.
    if name in _HOME:
        return getattr(importlib.import_module(f"jxfer.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"jxfer.{name}")
    raise AttributeError(f"module 'jxfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
