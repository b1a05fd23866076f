"""Equal blocks as one scanned body, so that a deep network compiles in the time of one block; and blocks that run again
in the backward pass, so that it keeps less."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jxfer.typing import InputError, PyTree


def scan_blocks(
    blocks: Sequence[nnx.Module], x: PyTree, *, cuts: tuple[int, ...] = (), remat: tuple[bool, ...] = ()
) -> PyTree:
    """Applies blocks in turn, with one `jax.lax.scan` per segment of equal blocks.

    Every block keeps its parameters, so that rules, files and optimizers see the same paths as without scanning; they
    are stacked inside the compiled program, which costs a copy of the segment's parameters. What a block changes while
    it runs (counters of dropout, statistics of norms) is written back to it.

    Args:
      blocks: modules that map an activation to one of the same structure, shapes and types.
      x: what the first block takes, an array or a tree of arrays.
      cuts: indices of blocks before which a segment ends. Cut where the label changes: gradients flow through whole
        segments, so that one frozen prefix in a segment of its own has no backward pass. Blocks that differ in
        structure, mode or shapes are cut apart in any case.
      remat: of each block, whether it keeps only its input for a backward pass and runs again; empty for none.

    Raises:
      InputError: a cut that is not the index of a block.
    """
    for cut in cuts:
        if not 0 <= cut < len(blocks):
            raise InputError(f"cannot cut {len(blocks)} blocks before block {cut}; cuts lie in 0 to {len(blocks) - 1}")
    again = remat or (False,) * len(blocks)
    for first, last in _segments(blocks, cuts, again):
        if last - first == 1:
            x = run_again(blocks[first], x) if again[first] else blocks[first](x)
        else:
            x = _scan(list(blocks[first:last]), x, remat=again[first])
    return x


def run_again(block: nnx.Module, x: PyTree) -> PyTree:
    """Applies a block that keeps only its input for a backward pass, and runs again there."""
    graphdef, *state = nnx.split(block, nnx.Param, ...)
    x, changed = jax.checkpoint(_body(graphdef))(x, tuple(state))
    nnx.update(block, changed)
    return x


def _segments(blocks: Sequence[nnx.Module], cuts: tuple[int, ...], remat: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yields the first index of each segment and the one after its last."""
    kinds = [(_kind(block), again) for block, again in zip(blocks, remat, strict=True)]
    starts = [i for i in range(len(blocks)) if i == 0 or i in cuts or kinds[i] != kinds[i - 1]]
    return itertools.pairwise([*starts, len(blocks)])


def _kind(block: nnx.Module) -> tuple[Any, ...]:
    """Returns what must be equal for blocks to share a body: structure, modes, shapes and types."""
    graphdef, state = nnx.split(block)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.to_pure_dict(state)))
    return graphdef, shapes


def _scan(blocks: list[nnx.Module], x: PyTree, *, remat: bool) -> PyTree:
    graphdef, *_ = nnx.split(blocks[0], nnx.Param, ...)
    states = [nnx.split(block, nnx.Param, ...)[1:] for block in blocks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    body = _body(graphdef)
    # What keeps XLA from merging the second run with the first is not needed inside a loop.
    x, changed = jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, x, stacked)
    for index, block in enumerate(blocks):
        nnx.update(block, jax.tree.map(lambda leaf, index=index: leaf[index], changed))
    return x


def _body(graphdef: nnx.GraphDef) -> Callable[[PyTree, Any], tuple[PyTree, nnx.State]]:
    """Returns a block as a function of its input and its variables, which returns those that it may change."""

    def body(x: PyTree, state: tuple[nnx.State, nnx.State]) -> tuple[PyTree, nnx.State]:
        block: Any = nnx.merge(graphdef, *state)
        return block(x), nnx.state(block, nnx.Not(nnx.Param))

    return body
