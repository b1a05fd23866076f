"""Names for what flows through jxfer, the axis letters of its shapes, and its one user-facing error.

Axis letters: B batch, N examples of a split, K classes, H W C image rows, columns, channels, L tokens of a text,
T samples of a sound, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import jax
import numpy as np

PyTree: TypeAlias = Any
Path: TypeAlias = str
"""A parameter path such as `layer4/0/conv1/kernel`."""

Arrays: TypeAlias = dict[Path, Any]
"""A flat dict of arrays by path: what parameters and statistics are between modules, on disk and in the step.

The values are arrays of jax, of NumPy where they come from disk, or `jax.ShapeDtypeStruct` where a plan is made.
"""

Rules: TypeAlias = Sequence[tuple[str, Any]]
"""Ordered `(pattern, value)` pairs over paths; the first match wins (`jxfer.paths`)."""

Input: TypeAlias = Literal["image", "text", "audio"]
"""What a model reads and a data set holds; also the key under which a batch has it."""

INPUTS: tuple[Input, ...] = get_args(Input)

Batch: TypeAlias = Mapping[str, Any]
"""`image` [B H W C], `text` [B L] token ids, `audio` [B T] or stored `features` [B ...]; `label` [B] int32, `mask` [B]
float32 with 0 on padded rows."""

HostBatch: TypeAlias = dict[str, np.ndarray]
"""The same, as NumPy arrays on their way to the devices."""

Metrics: TypeAlias = dict[str, jax.Array]
"""Name -> scalar; those an objective returns are sums over examples, with `count` among them."""

Proceed: TypeAlias = Callable[[], None]
"""Called again and again in work that takes long: it returns, or raises InterruptedRun where the work is to end.

Of several processes all must call it equally often, so how often must not depend on what was computed."""


def always() -> None:
    """Lets work go on, as a `Proceed`."""


class InputError(ValueError):
    """Something the user gave does not fit; the message is one line naming the thing, the place and the likely fix.

    The command line prints the message alone and exits with status 2.
    """


class NonFiniteError(FloatingPointError):
    """A loss or gradient norm became NaN or infinite; the message names the step and the metric."""

    def __init__(self, message: str, *, step: int = 0) -> None:
        super().__init__(message)
        self.step = step
        """The first such step, where that is known."""
        self.flops = 0.0
        """Floating-point operations of the phase up to it, which a search spent in vain."""


class ConvergenceError(ArithmeticError):
    """A solver stopped short of the solution at every setting; the message says how far."""


class AuditError(RuntimeError):
    """Something frozen changed, or something trainable never moved; the message names the paths.

    The second argument is the audit as the results record it.
    """


class InterruptedRun(Exception):  # noqa: N818 - an ending, not an error
    """SIGTERM or SIGINT arrived and everything needed to continue is on disk (exit status 75)."""


@runtime_checkable
class Surgery(Protocol):
    """A frozen dataclass that alters a model before training (`jxfer.surgery`)."""

    @property
    def fresh(self) -> tuple[str, ...]:
        """Patterns of the parameters that this surgery brings: of the same in the source none need fit."""
        ...

    def __call__(
        self,
        model: Any,
        *,
        source_classes: Sequence[str],
        target_classes: Sequence[str],
        data: Any,
        rngs: Any,
    ) -> None:
        """Alters the module in place; must also work on an abstract one inside `nnx.eval_shape`.

        `source_classes` is empty where the source's weights came without a head; `data`, a
        `DataConfig`, says how the target's examples are prepared.
        """
        ...
