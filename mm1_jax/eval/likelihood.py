# SPDX-License-Identifier: Apache-2.0
"""How likely continuations are: packed rows through the training forward pass.

Continuations of one context share a copy of it. The context is a stem, each continuation a branch:

  ids        The cat sat on  the mat .  a chair
  branches    0   0   0   0   1   1  1  2   2      a position attends to its branch and to the stem
  reads      ............stem  .....    .          a branch's last id is only predicted

Trees of many contexts fill rows, as examples do in training, and logits are computed only where an
id of a continuation is predicted.

Letters: B rows, S positions, N image slots a row, M predictions a row, c of a chunk, D width, V
vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mm1_jax.batch import Batch
from mm1_jax.data import packing
from mm1_jax.eval.task import Content, Likelihood
from mm1_jax.inference.model import Model, bucket, power_of_two
from mm1_jax.inference.prompts import Item, PromptError, Request, RoomError
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT, num_row_shards

ROW = 512  # positions of a row, unless a tree is longer or the model was trained on shorter ones
POSITIONS = 8192  # of a batch on each device
CHUNK = 1024  # predictions whose logits exist at a time on each device


class Continuation(NamedTuple):
  """Ids whose likelihood after a context is asked for."""

  context: Request  # at least one id
  target: tuple[int, ...]


class _Tree(NamedTuple):
  """A context and some of its continuations."""

  context: Request
  branches: list[tuple[int, tuple[int, ...]]]  # number of the continuation, ids

  def __len__(self) -> int:
    return len(self.context.ids) + sum(len(target) - 1 for _, target in self.branches)


class _Place(NamedTuple):
  """Where a continuation's predictions are in a batch."""

  number: int
  row: int
  start: int
  stop: int


class _Rows(NamedTuple):
  """A batch of trees, and what is asked of it."""

  batch: Batch
  branch_ids: np.ndarray | None  # int32[B, S]; None where no context is shared
  at: np.ndarray  # int32[B, M], positions that predict
  targets: np.ndarray  # int32[B, M]
  places: list[_Place]


def continuations(
  model: Model,
  context: Content,
  texts: Sequence[str],
  *,
  chat: bool | None = None,
  bos: bool = True,
) -> list[Continuation]:
  """Returns texts as ids that follow a context.

  In a document, context and text are tokenised as one and split where the context's own ids end, as
  lm-evaluation-harness does: so the text's ids are those of training. Spaces at the end of the
  context count to the text. In a conversation, the text is the assistant's, without its end.

  Args:
    model: its tokenizer and template.
    context: texts and pictures; a user's turn if `chat`. Empty is the beginning of a document.
    texts: a space that separates one from the context belongs to it.
    chat: None goes by what the run was trained on.
    bos: whether a document begins with `<s>`. If not, an empty context is the `</s>` of another.

  Raises:
    PromptError: a picture cannot be read, a text has no ids, or context and text do not fit.
  """
  if isinstance(texts, str):
    raise PromptError(f"texts is {texts[:80]!r}; it must be a list of texts.")
  chat = model.chat if chat is None else chat
  encoder = model.encoder
  if chat:
    request = model.encode(context, chat=True)
    ends = len(encoder.answer_end)
    ids = [encoder.encode_answer([{"text": text.strip()}])[:-ends] for text in texts]
    found = [Continuation(request, tuple(ids)) for ids in ids]
  else:
    found = of_document(model, context, texts, bos=bos)
  for (request, target), text in zip(found, texts, strict=True):
    if not target:
      raise PromptError(f"the continuation {text!r} has no tokens.")
    room = model.run.data.seq_len - len(request.ids) + 1  # the last id is not read
    if len(target) > room:
      raise RoomError(
        f"a context of {len(request.ids)} positions and a continuation of {len(target)} tokens "
        f"exceed the {model.run.data.seq_len} positions that the model was trained on."
      )
  return found


def of_document(
  model: Model, context: Sequence[Item], texts: Sequence[str], *, bos: bool = True
) -> list[Continuation]:
  """Returns `continuations` of a document, of any length."""
  items, tail = list(context), ""
  while items and isinstance(last := items[-1], str):
    items, tail = items[:-1], last + tail
  stripped = tail.rstrip()
  spaces, tail = tail[len(stripped) :], stripped
  if items:
    before = beginning(model.encode(items, chat=False), model, bos=bos)
  else:
    before = Request([model.tokenizer.bos_id] if bos else [], [], chat=False)
  # Pictures end a text, so the ids in front of the last text do not depend on it.
  encode = model.tokenizer.encode
  num = len(encode(tail)) if tail else 0
  found = []
  for text in texts:
    whole = encode(tail + spaces + text)
    ids = [*before.ids, *whole[:num]] or [model.tokenizer.eos_id]
    found.append(Continuation(Request(ids, before.images, chat=False), tuple(whole[num:])))
  return found


def beginning(request: Request, model: Model, *, bos: bool) -> Request:
  """Returns a document's request, without the `<s>` in front unless `bos`."""
  starts = not request.chat and request.ids[0] == model.tokenizer.bos_id
  return request if bos or not starts else request._replace(ids=request.ids[1:])


def log_likelihoods(
  model: Model,
  asked: Sequence[Continuation],
  *,
  tell: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
  """Returns the likelihood of each continuation after its context, in order.

  Experts drop nothing, and what a continuation is scored with does not change it.

  Args:
    model: on any mesh.
    asked: each fits the positions that the model was trained on.
    tell: is given how many have been scored, from time to time.
  """
  found: list[Likelihood | None] = [None] * len(asked)
  done = 0
  for rows in _batches(model, _trees(asked, model.run.data.seq_len)):
    with jax.set_mesh(model.mesh):
      # Where several processes share the mesh, each has all of the rows.
      place = NamedSharding(model.mesh, LAYOUT.act_b)
      arrays = jax.device_put((rows.batch, rows.branch_ids, rows.at, rows.targets), place)
      log_probs, greedy = jax.device_get(_predict(model.params, *arrays))
    for number, row, start, stop in rows.places:
      log_prob = float(np.sum(log_probs[row, start:stop], dtype=np.float64))
      found[number] = Likelihood(log_prob, bool(greedy[row, start:stop].all()), stop - start)
    done += len(rows.places)
    tell(done)
  return [likelihood for likelihood in found if likelihood is not None]


def rolling(model: Model, text: str) -> list[Continuation]:
  """Returns a text of any length as continuations whose likelihoods add up to its own.

  Each id is predicted once. Windows are disjoint and as long as a row, but for the last, which gets
  as much context as fits (as in lm-evaluation-harness); the first follows `<s>`.
  """
  ids, size = model.tokenizer.encode(text), model.run.data.seq_len
  found = []
  for start in range(0, len(ids), size):
    stop = min(start + size, len(ids))
    context = [model.tokenizer.bos_id, *ids][max(0, stop - size) : start + 1]
    found.append(Continuation(Request(context, [], chat=False), tuple(ids[start:stop])))
  return found


def _trees(asked: Sequence[Continuation], longest: int) -> list[_Tree]:
  """Returns continuations by context, the longest tree first; one that is too long in parts."""
  trees: dict[tuple, list[_Tree]] = {}
  digests: dict[int, bytes] = {}
  for number, (context, target) in enumerate(asked):
    for image in context.images:
      if id(image) not in digests:
        digests[id(image)] = hashlib.blake2b(image.tobytes()).digest()
    key = (tuple(context.ids), *(digests[id(image)] for image in context.images))
    of_context = trees.setdefault(key, [])
    if not of_context or len(of_context[-1]) + len(target) - 1 > longest:
      of_context.append(_Tree(context, []))
    of_context[-1].branches.append((number, target))
  return sorted((tree for parts in trees.values() for tree in parts), key=len, reverse=True)


def _batches(model: Model, trees: list[_Tree]) -> Iterator[_Rows]:
  """Packs trees into batches of few shapes."""
  shards = num_row_shards(model.mesh)
  seq_len, image_positions = model.run.data.seq_len, model.run.image_positions
  while trees:
    length = min(seq_len, max(ROW, power_of_two(len(trees[0]))))
    window = _prefix(trees, shards * max(1, POSITIONS // length) * length)
    num_rows = shards * power_of_two(-(-sum(map(len, window)) // (shards * length)))
    images = [len(tree.context.images) for tree in window]
    slots = power_of_two(max(*images, -(-sum(images) // num_rows)))
    shape = packing.RowShape(length, slots, image_positions)
    # Trees are not cut, so it matters how many pictures one has, not where.
    items = [packing.Item(len(tree), [0] * len(tree.context.images), ()) for tree in window]
    packed = packing.pack(items, num_rows, shape)
    yield _lay_out(model, [[window[s.item] for s in row] for row in packed.rows], shape)
    left = [i for i, _ in packed.left]
    assert len(left) < len(window), "no tree fits a row"
    trees = [*(window[i] for i in sorted(left)), *trees[len(window) :]]


def _prefix(trees: list[_Tree], room: int) -> list[_Tree]:
  """Returns the first trees that positions are enough for; one at least."""
  total = np.cumsum([len(tree) for tree in trees])
  return trees[: max(1, int(np.searchsorted(total, room, side="right")))]


def _lay_out(model: Model, rows: list[list[_Tree]], shape: packing.RowShape) -> _Rows:
  """Returns rows of trees as arrays."""
  size = len(rows), shape.seq_len
  tokens = np.full(size, model.tokenizer.pad_id, np.int32)
  positions, segment_ids, branch_ids = (np.zeros(size, np.int32) for _ in range(3))
  images = np.zeros(
    (len(rows), shape.images_per_row, *model.run.model.vision.image_size, 3), np.uint8
  )
  image_mask = np.zeros(images.shape[:2], bool)
  predicted: list[list[tuple[int, int]]] = [[] for _ in rows]  # position that predicts, id
  places = []
  for row, trees in enumerate(rows):
    start, num_images = 0, 0
    for segment, tree in enumerate(trees, start=1):
      stem = len(tree.context.ids)
      end = start + stem - 1  # predicts the first id of every branch
      parts = [tree.context.ids, *(target[:-1] for _, target in tree.branches)]
      for branch, ids in enumerate(parts):
        here = row, slice(start, start + len(ids))
        tokens[here], segment_ids[here], branch_ids[here] = ids, segment, branch
        positions[here] = np.arange(len(ids)) + (stem if branch else 0)
        if branch:
          number, target = tree.branches[branch - 1]
          first = len(predicted[row])
          predicted[row] += zip((end, *range(start, start + len(ids))), target, strict=True)
          places.append(_Place(number, row, first, len(predicted[row])))
        start += len(ids)
      for picture in tree.context.images:
        images[row, num_images], image_mask[row, num_images] = picture, True
        num_images += 1
  most = max(len(pairs) for pairs in predicted)
  padded = np.zeros((len(rows), bucket(most), 2), np.int32)
  for row, pairs in enumerate(predicted):
    padded[row, : len(pairs)] = np.reshape(pairs, (-1, 2))
  batch = Batch(
    tokens,
    tokens,
    np.zeros(size, np.float32),
    positions,
    segment_ids,
    segment_ids * 0,
    images,
    image_mask,
  )
  shared = any(len(tree.branches) > 1 for trees in rows for tree in trees)
  # Without branches rows are read as in training, by the kernels of the chip.
  return _Rows(batch, branch_ids if shared else None, padded[..., 0], padded[..., 1], places)


@jax.jit
def _predict(
  model: MM1,
  batch: Batch,
  branch_ids: Int[Array, "B S"] | None,
  at: Int[Array, "B M"],
  targets: Int[Array, "B M"],
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
  """Returns the log-probabilities of `targets` after positions `at`, and whether each is likeliest.

  Both are whole on every device.
  """
  hidden = model(batch, dropless=True, branch_ids=branch_ids).hidden
  hidden = jax.sharding.reshard(hidden, LAYOUT.act_b)
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  weight = model.decoder.head_weight(hidden)
  rows = hidden.shape[0] // num_row_shards(jax.sharding.get_abstract_mesh())
  size = math.gcd(hidden.shape[1], max(1, power_of_two(CHUNK // rows)))

  def chunks(x):
    shape = (x.shape[0], x.shape[1] // size, size, *x.shape[2:])
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=LAYOUT.act_b), 1, 0)

  def of_chunk(xs):
    hidden, targets = xs
    logits = model.decoder.logits(hidden, weight)
    # A masked sum, not a gather: the vocabulary may be split over chips.
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    of_target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return of_target - jax.nn.logsumexp(logits, axis=-1), of_target >= jnp.max(logits, axis=-1)

  found = jax.lax.map(of_chunk, (chunks(hidden), chunks(targets)))
  return tuple(
    jax.sharding.reshard(jnp.moveaxis(x, 0, 1), LAYOUT.replicated).reshape(targets.shape)
    for x in found
  )
