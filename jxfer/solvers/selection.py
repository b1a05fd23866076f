"""Heads on the few most useful of many features, in the manner of Head2Toe (Evci et al. 2022, arXiv:2201.03529)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jxfer.solvers.heads import LinearHeads, as_arrays
from jxfer.solvers.logistic import LogisticPath
from jxfer.solvers.maps import Standardise
from jxfer.solvers.ridge import RidgePath
from jxfer.typing import Proceed, always


@dataclasses.dataclass(frozen=True)
class SelectedLogistic:
    """Logistic regressions on the share of the features whose rows are longest in a ridge regression on all of them.

    The paper scores features by the rows of a logistic regression under a group lasso (section 3.2) and sweeps its
    strength; ridge on standardised features has its scores in closed form, and the shares are swept here too.
    """

    fractions: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Shares of the features that are kept."""
    strengths: tuple[float, ...] = tuple(10.0**exponent for exponent in range(-5, 2))
    """λ of the logistic regressions, on standardised features."""
    score_strength: float = 0.1
    """λ of the ridge regression that scores."""

    def fit(self, features: Any, labels: Any, num_classes: int, *, proceed: Proceed = always) -> LinearHeads:
        """Returns a head for every share and strength, with zeros for features that are not kept; [N D] and [N]."""
        features, labels = as_arrays(features, labels)
        scale = Standardise().fit(features)
        standard = scale(features)
        scores = RidgePath((self.score_strength,)).fit(standard, labels, num_classes, proceed=proceed)
        order = np.argsort(-np.linalg.norm(np.asarray(scores.kernels[0]), axis=1), kind="stable")
        parts = []
        for fraction in self.fractions:
            kept = np.sort(order[: self.num_kept(fraction, len(order))])
            heads = LogisticPath(self.strengths).fit(standard[:, kept], labels, num_classes, proceed=proceed)
            kernels = jnp.zeros((len(heads.names), len(order), num_classes)).at[:, kept].set(heads.kernels)
            parts.append(dataclasses.replace(heads, kernels=kernels))
        kernels, biases = (jnp.concatenate([getattr(part, name) for part in parts]) for name in ("kernels", "biases"))
        return LinearHeads(
            tuple(
                f"fraction={f:g},{name}" for f, part in zip(self.fractions, parts, strict=True) for name in part.names
            ),
            *scale.fold(kernels, biases),
            sum((part.gradient_norms for part in parts), ()),
            sum((part.converged for part in parts), ()),
            scores.flops + sum(part.flops for part in parts),
        )

    def cost(self, num_examples: int, num_features: int, num_classes: int) -> tuple[float, int]:
        """Returns the floating-point operations of scoring and one iteration of every path, and the largest's bytes."""
        path = LogisticPath(self.strengths)
        costs = [RidgePath((self.score_strength,)).cost(num_examples, num_features, num_classes)]
        for fraction in self.fractions:
            costs.append(path.cost(num_examples, self.num_kept(fraction, num_features), num_classes))
        return sum(flops for flops, _ in costs), max(size for _, size in costs)

    def num_kept(self, fraction: float, num_features: int) -> int:
        """Returns how many features a share of them is, at least one."""
        return max(1, round(fraction * num_features))
