"""Runs equal blocks as one scanned body, so that a deep network compiles in the time of one block."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jxfer.typing import InputError, PyTree


def scan_blocks(blocks: Sequence[nnx.Module], x: PyTree, *, cuts: tuple[int, ...] = ()) -> PyTree:
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

    Raises:
      InputError: a cut that is not the index of a block.
    """
    for cut in cuts:
        if not 0 <= cut < len(blocks):
            raise InputError(f"cannot cut {len(blocks)} blocks before block {cut}; cuts lie in 0 to {len(blocks) - 1}")
    for segment in _segments(blocks, cuts):
        x = segment[0](x) if len(segment) == 1 else _scan(segment, x)
    return x


def _segments(blocks: Sequence[nnx.Module], cuts: tuple[int, ...]) -> list[list[nnx.Module]]:
    kinds = [_kind(block) for block in blocks]
    starts = [i for i in range(len(blocks)) if i == 0 or i in cuts or kinds[i] != kinds[i - 1]]
    return [list(blocks[first:last]) for first, last in itertools.pairwise([*starts, len(blocks)])]


def _kind(block: nnx.Module) -> tuple[Any, ...]:
    """Returns what must be equal for blocks to share a body: structure, modes, shapes and types."""
    graphdef, state = nnx.split(block)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.to_pure_dict(state)))
    return graphdef, shapes


def _scan(blocks: list[nnx.Module], x: PyTree) -> PyTree:
    graphdef, *_ = nnx.split(blocks[0], nnx.Param, ...)
    states = [nnx.split(block, nnx.Param, ...)[1:] for block in blocks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def body(x: PyTree, state: tuple[nnx.State, nnx.State]) -> tuple[PyTree, nnx.State]:
        block: Any = nnx.merge(graphdef, *state)
        return block(x), nnx.state(block, nnx.Not(nnx.Param))

    x, changed = jax.lax.scan(body, x, stacked)
    for index, block in enumerate(blocks):
        nnx.update(block, jax.tree.map(lambda leaf, index=index: leaf[index], changed))
    return x
