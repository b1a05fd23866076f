"""Small networks that jxfer has never seen, for the tests: one with everything that freezing can get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Net(nnx.Module):
    """Convolution, batch norm and dropout in a backbone of twelve layers (ten and more, so that 10 sorts before 2)."""

    def __init__(self, rngs: nnx.Rngs, *, num_classes: int = 5, width: int = 8):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(12)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn(self.stem(x))).mean((1, 2))
        for layer in self.layers:
            x = x + 0.1 * nnx.relu(layer(x))
        return self.head(self.drop(x))


def make_batch(size: int = 16, *, num_classes: int = 5, seed: int = 0) -> dict[str, jax.Array]:
    """Returns images [B 8 8 1] that carry their label, and labels [B]."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, size)
    image = rng.normal(size=(size, 8, 8, 1)) + label[:, None, None, None] / num_classes
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(label, jnp.int32)}
