# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk to params on the mesh, one tensor in host memory at a time.

Files are read one after the other, each tensor once: it is laid out as ours, put on the mesh, and
written into its place of the stacked array there. Only one tensor is whole in host memory.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax.convert import ConvertError
from mm1_jax.convert.families import WeightPiece
from mm1_jax.convert.layouts import Flat, Same
from mm1_jax.convert.tensors import SHOWN, Tensors, shorten


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every tensor."""

  loaded: list[str]  # as they are
  converted: list[str]  # transposed, split, grown, or folded into another
  unused: list[str]  # of theirs, that no param of ours is made of
  missing: list[str]  # params of ours that nothing is made of: fresh ones at the start of a run

  def __str__(self) -> str:
    lines = [f"{len(self.loaded)} tensors loaded, {len(self.converted)} converted"]
    for name in ("unused", "missing"):
      names = getattr(self, name)
      lines.append(f"{len(names)} {name}" + (f": {shorten(names)}" if names else ""))
    return "; ".join(lines)


def load(
  tensors: Tensors,
  pieces: Iterable[WeightPiece],
  abstract: Mapping[str, jax.ShapeDtypeStruct],
  without_effect: Callable[[str], bool] = lambda name: False,
) -> tuple[dict[str, jax.Array], Report]:
  """Reads params by name onto the shardings and in the dtypes of `abstract`.

  Args:
    without_effect: whether a tensor may be left over.

  Raises:
    ConvertError: a tensor is missing, has another shape than the config says, or is left over
      though it would change what is computed. All of them are looked for before any is read.
  """
  pieces = list(pieces)
  _check(tensors, pieces, abstract)
  used = {name for piece in pieces for name in piece.theirs}
  left_over = [name for name in tensors if name not in used and not without_effect(name)]
  if left_over:
    raise ConvertError(
      f"'{tensors.path}' has {len(left_over)} tensors that the config has no place for, so that "
      f"something else would be computed without them: {shorten(left_over)}. Correct the config, "
      "or save the weights without them if they are of no use."
    )
  # By file: once all of its tensors are read, a shard's pages may leave the memory.
  order = {file: i for i, file in enumerate(dict.fromkeys(map(tensors.file, tensors)))}
  pieces.sort(key=lambda piece: order[tensors.file(piece.theirs[0])])
  params: dict[str, jax.Array] = {}
  left = collections.Counter(map(tensors.file, (piece.theirs[0] for piece in pieces)))
  for piece in pieces:
    like = abstract[piece.ours]
    theirs = [tensors.read(name) for name in piece.theirs]
    for name, value in zip(piece.theirs, theirs, strict=True):
      if not np.isfinite(np.asarray(value, np.float32)).all():
        raise ConvertError(
          f"tensor '{name}' of '{tensors.file(name)}' has values that are not finite."
        )
    shape = like.shape[len(piece.at) :]
    value = np.ascontiguousarray(piece.layout.load(theirs, shape)).astype(like.dtype)
    placed = _place(value, _inner(like, len(piece.at)))
    if piece.at:
      if piece.ours not in params:
        params[piece.ours] = _zeros(like)
      placed = _write(params[piece.ours], placed, piece.at[0])
    params[piece.ours] = placed
    file = tensors.file(piece.theirs[0])
    left[file] -= 1
    if not left[file]:
      logging.info("read %s", file.name)
  return params, _report(tensors, pieces, abstract)


def _check(tensors: Tensors, pieces: list[WeightPiece], abstract: Mapping[str, Any]) -> None:
  wrong = []
  for piece in pieces:
    shapes = piece.layout.shapes(abstract[piece.ours].shape[len(piece.at) :])
    for name, shape in zip(piece.theirs, shapes, strict=True):
      if name not in tensors:
        wrong.append(f"tensor '{name}' is missing")
      elif tensors.shapes[name] != shape:
        wrong.append(
          f"tensor '{name}' of '{tensors.file(name).name}' has shape {tensors.shapes[name]}, but "
          f"the config asks for {shape}"
        )
  if wrong:
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise ConvertError(f"'{tensors.path}': {'; '.join(wrong[:SHOWN])}{more}.")


def _report(tensors: Tensors, pieces: list[WeightPiece], abstract: Mapping[str, Any]) -> Report:
  as_is, changed = set(), set()
  for piece in pieces:
    (as_is if isinstance(piece.layout, Same | Flat) else changed).update(piece.theirs)
  return Report(
    loaded=sorted(as_is - changed),
    converted=sorted(changed),
    unused=sorted(set(tensors) - as_is - changed),
    missing=sorted(abstract.keys() - {piece.ours for piece in pieces}),
  )


def _inner(like: jax.ShapeDtypeStruct, num_leading: int) -> NamedSharding:
  """Returns the sharding of one block of a stack; the stack's leading dims are not split."""
  assert isinstance(like.sharding, NamedSharding)
  return NamedSharding(like.sharding.mesh, P(*like.sharding.spec[num_leading:]))


def _place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.jit(
    functools.partial(jnp.zeros, like.shape, like.dtype), out_shardings=like.sharding
  )()


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, block: jax.Array, index: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, block, index, 0)
