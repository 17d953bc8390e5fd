# SPDX-License-Identifier: Apache-2.0
"""What a model replies to items: read in chunks, and kept, so that a stopped job continues.

A chunk is `CHUNK` items in the task's order. What is kept of it lies in a file named by the hash of
all that was asked: the model's params and tokenizer, each item's ids and pixels as the model reads
them, and how its reply is made. So a reply is never taken for another question's, and a chunk gets
the same replies whether or not the job was stopped before it.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mm1_jax import untrusted
from mm1_jax.eval import few_shot
from mm1_jax.eval.few_shot import Demonstrations
from mm1_jax.eval.likelihood import Continuation, beginning, continuations, log_likelihoods
from mm1_jax.eval.task import Content, EvalError, Form, Item, Likelihood, Picture, Reply, source
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import PromptError, Request, RoomError
from mm1_jax.inference.sampler import GREEDY

MAX_REPLIES_BYTES = 1 << 30  # of a chunk
CHUNK = 256  # items that are read, sorted by shape and kept together
NUM_THREADS = 4  # that decode pictures
# What a prompt may lack and the model still be asked, but not the item's own pictures.
Change = Callable[[Item, Content], Content]


class Answered(NamedTuple):
  """An item, what it was asked after, and what the model gave."""

  item: Item
  demonstrations: tuple[Item, ...]
  reply: Reply | None  # None: it was not asked, for this reason
  problem: str = ""


@dataclasses.dataclass(frozen=True)
class Asking:
  """How the items of a task are put to a model.

  Args:
    form: the task's.
    shots: demonstrations in front of each.
    demonstrations: that are drawn from; None with 0 shots.
    change: what a control shows instead of an item's content.
    batch_size: prompts that are generated from at once.
    bos: whether documents begin with `<s>`, as in training.
    check: called after each batch; what it raises ends the asking.
  """

  form: Form
  shots: int = 0
  demonstrations: Demonstrations | None = None
  change: Change = lambda item, content: content
  batch_size: int = 8
  bos: bool = True
  check: Callable[[], None] = lambda: None

  def encode(
    self, model: Model, item: Item
  ) -> tuple[tuple[Item, ...], Request | list[Continuation]]:
    """Returns an item's demonstrations, and what the model reads.

    Raises:
      EvalError: the demonstrations do not fit.
      PromptError: the item cannot be asked, such as for a damaged picture.
    """
    form = self.form
    num = self.shots or form.text_demonstrations
    shown = self.demonstrations.of(item, num) if num and self.demonstrations else []
    try:
      return tuple(shown), self._encode(model, item, shown)
    except RoomError as e:
      if not shown or (fit := self._number_that_fits(model, item, shown)) is None:
        raise
      raise EvalError(
        f"{num} demonstrations and item '{item.id}' do not fit the {model.run.data.seq_len} "
        f"positions that the model was trained on; {fit} would. Give fewer --shots."
      ) from e

  def _encode(self, model: Model, item: Item, shown: list[Item]) -> Request | list[Continuation]:
    form = self.form

    def reads(content: Content) -> Any:
      return self._context(shown, self.change(item, content))

    if form.options is None:
      return self._request(model, reads(form.prompt(item)))
    options = form.options(item)
    found: list[Continuation] = []
    # Choices that follow the same content are encoded together, so that its pictures are read once.
    for content, group in itertools.groupby(options, lambda option: option[0]):
      texts = [text for _, text in group]
      found += continuations(model, reads(content), texts, chat=form.chat, bos=self.bos)
    return found

  def _request(self, model: Model, content: Any) -> Request:
    """Returns what a text is generated after."""
    form, tokenizer = self.form, model.tokenizer
    if not content:  # a control that shows nothing
      return Request([tokenizer.bos_id if self.bos else tokenizer.eos_id], [], chat=False)
    request = model.encode(content, chat=form.chat, max_new_tokens=form.max_new_tokens)
    return beginning(request, model, bos=self.bos)

  def _context(self, shown: list[Item], content: Content) -> Any:
    form = self.form
    if self.shots or not shown:
      return few_shot.context(form, shown, content)
    text_only = dataclasses.replace(
      form, prompt=lambda item: few_shot.without_pictures(form.prompt(item))
    )
    return few_shot.context(text_only, shown, content)

  def _number_that_fits(self, model: Model, item: Item, shown: list[Item]) -> int | None:
    """Returns how many demonstrations fit; None if they are not what is wrong."""
    for num in range(len(shown) - 1, -1, -1):
      try:
        self._encode(model, item, shown[:num])
      except RoomError:
        continue
      return num
    return None

  def reply(self, model: Model, asked: Sequence[Request | list[Continuation]]) -> list[Any]:
    """Returns what the model gives: a text each, or the likelihoods of each one's options."""
    form = self.form
    if form.options is None:
      sampling = GREEDY if form.num_beams == 1 else BeamSearch(form.num_beams, 0.0)
      return model.generate(
        [request for request in asked if isinstance(request, Request)],
        max_new_tokens=form.max_new_tokens,
        sampling=sampling,
        stop=form.stop,
        batch_size=self.batch_size,
        tell=lambda _: self.check(),
      )
    options = [one for each in asked if isinstance(each, list) for one in each]
    scores = iter(log_likelihoods(model, options, tell=lambda _: self.check()))
    return [tuple(next(scores) for _ in each) for each in asked]

  def settings(self) -> dict[str, Any]:
    """Returns what decides a reply besides what the model reads."""
    form = self.form
    if form.options is not None:
      return {"method": "likelihood"}
    return {
      "method": "generate",
      "max_new_tokens": form.max_new_tokens,
      "num_beams": form.num_beams,
      "stop": form.stop,
      "batch_size": self.batch_size,
    }


def answer(
  model: Model,
  items: Sequence[Item],
  asking: Asking,
  *,
  kept: epath.Path | None = None,
  digest: str = "",
  share: tuple[int, int] = (0, 1),
  tell: Callable[[int], None] = lambda done: None,
) -> Iterator[list[Answered]]:
  """Yields the items' replies, a chunk at a time.

  Pictures of the next chunk are decoded while the model is busy with this one.

  Args:
    model: that is asked.
    items: a task's.
    asking: how.
    kept: folder of replies; None keeps none.
    digest: of the model, see `checkpoint.digest`; needed to keep replies.
    share: this process, and how many share the chunks; others' are not yielded.
    tell: is given how many items are done, of this process's.
  """
  chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)][share[0] :: share[1]]
  done = 0
  with (
    concurrent.futures.ThreadPoolExecutor(1) as ahead,
    concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool,
  ):

    def read(chunk: Sequence[Item]):
      return [*pool.map(lambda item: _encoded(model, asking, item), chunk)]

    following = ahead.submit(read, chunks[0]) if chunks else None
    for number, chunk in enumerate(chunks, start=1):
      assert following is not None
      read_chunk = following.result()
      following = ahead.submit(read, chunks[number]) if number < len(chunks) else None
      yield _answer_chunk(model, chunk, read_chunk, asking, kept, digest)
      done += len(chunk)
      tell(done)


class _Read(NamedTuple):
  demonstrations: tuple[Item, ...]
  asked: Request | list[Continuation] | None
  problem: str


def _encoded(model: Model, asking: Asking, item: Item) -> _Read:
  try:
    return _Read(*asking.encode(model, item), "")
  except EvalError:
    raise
  except PromptError as e:
    return _Read((), None, str(e))
  except Exception as e:  # whatever reading one item raises is that item's
    return _Read((), None, untrusted.why(e))


def _answer_chunk(
  model: Model,
  chunk: Sequence[Item],
  read: list[_Read],
  asking: Asking,
  kept: epath.Path | None,
  digest: str,
) -> list[Answered]:
  asked = [each.asked for each in read if each.asked is not None]
  name = _name(asked, asking, digest) if kept is not None else ""
  replies = _load(kept / name) if kept is not None else None
  if replies is None:
    replies = asking.reply(model, asked)
    if kept is not None:
      _save(kept / name, replies)
  rest = iter(replies)
  found = []
  for item, each in zip(chunk, read, strict=True):
    reply = None if each.asked is None else next(rest)
    if isinstance(reply, str):
      reply = asking.form.clean(reply, item)
    found.append(Answered(item, each.demonstrations, reply, each.problem))
  return found


def _name(asked: Sequence[Request | list[Continuation]], asking: Asking, digest: str) -> str:
  """Returns the name of a chunk's file: a hash of all that decides its replies."""
  hasher = hashlib.sha256(json.dumps([digest, jax.__version__, asking.settings()]).encode())

  def add(request: Request) -> None:
    hasher.update(json.dumps([request.ids, request.chat, len(request.images)]).encode())
    for image in request.images:
      hasher.update(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())

  for each in asked:
    hasher.update(b"item")
    if isinstance(each, Request):
      add(each)
    else:
      for context, target in each:
        add(context)
        hasher.update(json.dumps(target).encode())
  return f"{hasher.hexdigest()[:32]}.json"


def _load(path: epath.Path) -> list[Any] | None:
  if not path.exists():
    return None
  data = untrusted.read_bytes(path, EvalError, most=MAX_REPLIES_BYTES)
  with untrusted.of_form(
    f"'{path}' is damaged; remove it, and its items are asked again", EvalError
  ):
    rows = untrusted.loads(data)
    return [r if isinstance(r, str) else tuple(Likelihood(*x) for x in r) for r in rows]


def _save(path: epath.Path, replies: list[Any]) -> None:
  """Writes a whole file or none, also if the process is killed."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(f"{path.name}.{jax.process_index()}.tmp")
  new.write_text(json.dumps(replies, ensure_ascii=False))
  new.replace(path)


def other_pictures(items: Sequence[Item]) -> Change:
  """Returns the control that shows each item the pictures of another one.

  The other one is of the same source where items have one (`details["source"]`), so that the kind
  of picture tells nothing, and has no picture in common: in the order of pictures, half of the
  items further on. A content gets as many pictures as it has.

  Raises:
    EvalError: all items have the same pictures.
  """
  shown: dict[str, tuple[Picture, ...]] = {}
  by_source: dict[str, list[Item]] = {}
  for item in items:
    by_source.setdefault(source(item), []).append(item)
  for group in by_source.values():
    shown |= _others(group)
  shown = _others(items) | shown if len(shown) < len(items) else shown
  if len(shown) < len(items):
    raise EvalError("no other item has another picture, so there is no control with one.")

  def change(item: Item, content: Content) -> Content:
    others, number, found = shown[item.id], 0, []
    for part in content:
      if not isinstance(part, str):
        part, number = others[number % len(others)], number + 1
      found.append(part)
    return found

  return change


def _others(items: Sequence[Item]) -> dict[str, tuple[Picture, ...]]:
  """Returns other items' pictures by an item's id, for each that has one with none in common."""
  named = [[*map(few_shot.identity, item.pictures)] for item in items]
  order = sorted(range(len(items)), key=lambda i: named[i])
  found = {}
  for at, i in enumerate(order):
    for shift in range(len(order)):
      other = order[(at + len(order) // 2 + shift) % len(order)]
      if named[other] and not set(named[i]) & set(named[other]):
        found[items[i].id] = items[other].pictures
        break
  return found


def no_pictures(item: Item, content: Content) -> Content:
  """The control that shows an item without its pictures."""
  return few_shot.without_pictures(content)
