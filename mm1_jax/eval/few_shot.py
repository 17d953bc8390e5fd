# SPDX-License-Identifier: Apache-2.0
"""Demonstrations: which items a question is asked after, and how they read.

They are drawn anew for each question, from a pool that is drawn once from the demonstration split
(OpenFlamingo's protocol, which MM1 follows: 2,048 items). None has the question's id or one of its
pictures. The same seed, trial and item give the same demonstrations, whatever else is evaluated.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence

import numpy as np

from mm1_jax.eval.task import Content, EvalError, Form, Item, Picture

POOL = 2048


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """What demonstrations are drawn from.

  Args:
    items: the demonstration split, or the part of it that is drawn from.
    seed: of the draw.
    trial: another draw with the same seed.
  """

  items: Sequence[Item]
  seed: int = 0
  trial: int = 0

  @classmethod
  def drawn(cls, items: Sequence[Item], *, seed: int, trial: int, pool: int = POOL):
    """Returns a pool of at most `pool` items, in the split's order."""
    random = np.random.default_rng([seed, trial])
    chosen = random.choice(len(items), min(pool, len(items)), replace=False)
    return cls([items[i] for i in sorted(chosen)], seed, trial)

  def of(self, item: Item, num: int) -> list[Item]:
    """Returns the demonstrations of a question, in order.

    Raises:
      EvalError: there are fewer than `num` that it may see.
    """
    random = np.random.default_rng([self.seed, self.trial, zlib.crc32(item.id.encode())])
    own = set(map(identity, item.pictures))
    found = []
    for i in random.permutation(len(self.items)):
      if len(found) == num:
        break
      other = self.items[i]
      if other.id != item.id and not own.intersection(map(identity, other.pictures)):
        found.append(other)
    if len(found) < num:
      raise EvalError(
        f"{num} demonstrations are asked for, and item '{item.id}' may see {len(found)}: the "
        f"demonstration split has {len(self.items)} items, those with its own picture included."
      )
    return found


def identity(picture: Picture) -> str:
  """Returns what two pictures have in common if they are the same one."""
  return hashlib.blake2b(picture).hexdigest() if isinstance(picture, bytes) else str(picture)


def context(form: Form, demonstrations: Sequence[Item], content: Content) -> Content | list[dict]:
  """Returns what the model reads: demonstrations with their answers, then an item's content.

  In a conversation each demonstration is a turn of the user and one of the assistant. A form with
  `text_demonstrations` shows these without their pictures.

  Raises:
    EvalError: the form has no demonstrations.
  """
  if demonstrations and form.demonstration is None:
    raise EvalError("this form of the task has no demonstrations; give --shots=0.")
  turns, document = [], []
  for item in demonstrations:
    assert form.demonstration is not None
    shown, said = form.prompt(item), form.demonstration(item)
    turns += [{"role": "user", "content": shown}, {"role": "assistant", "content": said.strip()}]
    document += [*shown, said]
  if form.chat:
    return [*turns, {"role": "user", "content": content}] if turns else content
  return joined([*document, *content])


def joined(content: Content) -> Content:
  """Returns content with neighbouring texts as one, so that they are tokenised as one."""
  found: Content = []
  for part in content:
    if isinstance(part, str) and found and isinstance(found[-1], str):
      found[-1] += part
    else:
      found.append(part)
  return found


def without_pictures(content: Content) -> Content:
  return joined([part for part in content if isinstance(part, str)])
