# SPDX-License-Identifier: Apache-2.0
"""Thousands of questions from a file, one JSON object a line, answered into another.

  {"id": "1", "prompt": "<image>\\nWhat is this?", "images": ["a.jpg"]}
  {"id": "2", "turns": [{"role": "user", "content": "Hi"}]}
  {"id": "3", "prompt": "And this?", "images": ["gone.jpg"]}

become

  {"id": "1", "answer": "A cat.", "asked": {"question": "5f0c...", "model": "9e1b...", ...}}
  {"id": "2", "answer": "Hello.", "asked": {...}}
  {"id": "3", "error": "image 'gone.jpg' cannot be read: No such file or directory."}

`id` is the line's number where it is missing. Pictures fill the `<image>` slots of a prompt, or of
the turns, in order; a prompt without slots has its pictures in front. Answers are written as they
come. Whatever goes wrong with one line is that line's error.

The same command continues where it was stopped: questions with an answer are not asked again, those
that failed are. `asked` decides which answer is whose: a hash of the question (its id, if it has
one, its texts, its pictures' bytes), the model, and the settings. So a line may be inserted, moved
or edited between two runs; a line without an id that only moved keeps its answer, under its new
number. Answers that no longer are those of their lines are moved into OUTPUT.replaced.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, TypeVar

from etils import epath

from mm1_jax import untrusted
from mm1_jax.config import UserError
from mm1_jax.inference import settings
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import (
  Picture,
  Prompt,
  PromptError,
  Request,
  fill_slots,
  read_picture,
)
from mm1_jax.inference.sampler import Sampling

BATCHES_AT_ONCE = 8  # batches whose questions are sorted by length together
MAX_FILE_BYTES = 1 << 30  # of questions, or of answers: the file is read whole
NUM_THREADS = 4  # that decode pictures
SECONDS_BETWEEN_NEWS = 10.0
T = TypeVar("T")
QUESTION = "question"  # the hash of one, in what was asked


class Question(NamedTuple):
  id: str
  row: Any  # as it is in the file
  key: str  # what makes it this question and no other: its id, or else its content


class AnswerCounts(NamedTuple):
  answered: int
  failed: int
  before: int  # had an answer from an earlier run


class _Ready(NamedTuple):
  question: Question
  request: Request
  asked: dict[str, Any]


def answer_file(
  model: Model,
  input: epath.PathLike,
  output: epath.PathLike,
  *,
  images: epath.PathLike | None = None,
  max_new_tokens: int | None = None,
  sampling: Sampling | BeamSearch,
  stop: Sequence[str] = (),
  chat: bool | None = None,
  seed: int = 0,
  batch_size: int = 8,
  tell: Callable[[str], None] = print,
) -> AnswerCounts:
  """Answers the questions of a file that have no answer yet.

  Args:
    model: gives the answers.
    input: JSON lines, as above.
    output: JSON lines; those with an answer to one of the questions, and of none of them, stay.
    images: folder of pictures with relative paths; None is the one of `input`.
    max_new_tokens: as in `Model.generate`, like the arguments below.
    sampling: see above.
    stop: see above.
    chat: see above.
    seed: see above; what is drawn for a question depends on it and on the question's id, or on
      its content where it has no id.
    batch_size: see above.
    tell: is given a line of news now and then.

  Raises:
    PromptError: a setting is out of range.
    UserError: a file cannot be read or written, or two questions have the same id.
  """
  input, output = epath.Path(input), epath.Path(output)
  folder = input.parent if images is None else epath.Path(images)
  seed, batch_size = settings.integer("seed", seed), settings.whole("batch_size", batch_size, 1)
  sampling, stop = settings.sampling(sampling), settings.stop(stop)
  how = _how(model, max_new_tokens, sampling, stop, chat, seed)
  questions = read_questions(input)
  done = _keep_answers(output, questions, folder, how, tell)
  todo = [question for question in questions if question.id not in done]
  before = len(questions) - len(todo)
  tell(f"{len(questions)} questions in '{input}', {before} of them answered before")
  news = _News(len(todo), tell)

  def read(question: Question) -> _Ready | str:
    try:
      prompt = read_question(question.row, folder)
      request = model.encode(prompt, chat=chat, max_new_tokens=max_new_tokens)
      return _Ready(question, request, {QUESTION: _hash(question, prompt), **how})
    except Exception as e:  # whatever reading one line raises is that line's
      return _reason(e)

  def ask(batch: Sequence[_Ready]) -> Iterator[tuple[_Ready, dict[str, Any]]]:
    try:
      answers = model.generate(
        [ready.request for ready in batch],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        seed=[_crc(f"{seed} {ready.question.key}") for ready in batch],
        batch_size=batch_size,
      )
    except Exception as e:  # one of them is too much for the device, or for the model's code
      if len(batch) == 1:
        yield batch[0], {"error": _reason(e)}
      else:
        for ready in batch:
          yield from ask([ready])
      return
    for ready, answer in zip(batch, answers, strict=True):
      yield ready, {"answer": answer, "asked": ready.asked}

  with _append(output) as file, concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    for part in _parts(todo, BATCHES_AT_ONCE * batch_size):
      found = [*zip(part, pool.map(read, part), strict=True)]
      for question, ready in found:
        if isinstance(ready, str):
          _write(file, {"id": question.id, "error": ready})
          news.add("error")
      good = [ready for _, ready in found if isinstance(ready, _Ready)]
      good.sort(key=lambda ready: (len(ready.request.images), len(ready.request.ids)))
      for batch in _parts(good, batch_size):
        for ready, result in ask(batch):
          _write(file, {"id": ready.question.id, **result})
          news.add(*result)
      news.tell()
  return AnswerCounts(news.counts["answer"], news.counts["error"], before)


def read_questions(path: epath.Path) -> list[Question]:
  """Returns the questions of a file; a line that is no JSON fails when it is asked.

  Raises:
    UserError: there is no such file, no question in it, or an id is there twice.
  """
  data = untrusted.read_bytes(path, UserError, most=MAX_FILE_BYTES)
  questions, numbers, alike = [], {}, collections.Counter()
  for number, line in enumerate(data.split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      row = untrusted.loads(line)
    except untrusted.Malformed as e:
      row = e
    if isinstance(row, Mapping) and "id" in row:
      id = key = str(row["id"])
    else:
      id, content = str(number), _content(row)
      alike[content] += 1
      key = f"{alike[content]} {content}"
    if id in numbers:
      id = untrusted.visible(id)
      raise UserError(f"'{path}' has the id '{id}' in lines {numbers[id]} and {number}.")
    numbers[id] = number
    questions.append(Question(id, row, key))
  if not questions:
    raise UserError(f"'{path}' has no question.")
  return questions


def _content(row: Any) -> str:
  """Returns what a line asks, as a text."""
  if isinstance(row, Mapping):
    row = [row.get(name) for name in ("prompt", "turns", "images")]
  return json.dumps(row, sort_keys=True, default=str)


def read_question(row: Any, folder: epath.Path) -> Prompt:
  """Returns the prompt of a line, with its pictures' bytes.

  Raises:
    PromptError: it is not of the form above, or a picture cannot be read.
  """
  if isinstance(row, untrusted.Malformed):
    raise PromptError(f"the line is {row}.")
  if not isinstance(row, Mapping) or ("prompt" in row) == ("turns" in row):
    raise PromptError("the line must be an object with either 'prompt' or 'turns'.")
  names = row.get("images", [])
  names = [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise PromptError(f"'images' is {untrusted.shown(names)}; it must be a list of paths.")
  images = [read_picture(folder / name) for name in names]
  if "prompt" in row:
    if not isinstance(row["prompt"], str):
      raise PromptError(f"'prompt' is {untrusted.shown(row['prompt'])}; it must be a text.")
    return fill_slots(row["prompt"], images)
  return _turns(row["turns"], images)


def _turns(turns: Any, images: list[Picture]) -> Prompt:
  """Returns turns with their contents as items; each slot takes the next of the pictures."""
  if not isinstance(turns, list) or not turns:
    raise PromptError(
      f"'turns' is {untrusted.shown(turns)}; it must be a list with at least one turn."
    )
  filled = []
  for turn in turns:
    text = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(text, str):
      turn = untrusted.shown(turn)
      raise PromptError(f"a turn is {turn}; it must be {{'role': ..., 'content': a text}}.")
    num = text.count("<image>")
    filled.append({**turn, "content": fill_slots(text, images[:num])})
    images = images[num:]
  if images:
    raise PromptError(f"there are {len(images)} more images than <image> slots.")
  return filled


def _how(
  model: Model,
  max_new_tokens: int | None,
  sampling: Sampling | BeamSearch,
  stop: Sequence[str],
  chat: bool | None,
  seed: int,
) -> dict[str, Any]:
  """Returns what decides an answer besides the question, as JSON has it."""
  if max_new_tokens is None:
    max_new_tokens = model.answer_length
  chat = settings.chat(chat)
  how: dict[str, Any] = {
    "model": model.digest,
    "max_new_tokens": settings.whole("max_new_tokens", max_new_tokens, 1),
    "stop": [*stop],
    "chat": model.chat if chat is None else chat,
  }
  if isinstance(sampling, Sampling) and not sampling.temperature:
    return {**how, "temperature": 0.0}  # nothing is drawn
  drawn = {"seed": seed} if isinstance(sampling, Sampling) else {}
  return {**how, **sampling._asdict(), **drawn}


def _hash(question: Question, prompt: Prompt) -> str:
  """Returns a hash of what is asked, and of nothing else."""

  def plain(item: Any) -> Any:
    if isinstance(item, Picture):
      return {"image": hashlib.sha256(item.data).hexdigest()}
    if isinstance(item, Mapping):
      return {"role": item["role"], "content": plain(item["content"])}
    return item if isinstance(item, str) else [*map(plain, item)]

  asked = json.dumps([question.key, plain(prompt)])
  return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _keep_answers(
  output: epath.Path,
  questions: list[Question],
  folder: epath.Path,
  how: dict[str, Any],
  tell: Callable[[str], None],
) -> set[str]:
  """Returns which questions have an answer, by their ids, and leaves only answers in the file.

  Questions that failed will be asked again; a last line that a crash cut off is removed. An answer
  under a question's id that is not that question's is moved into another file.
  """
  if not output.exists():
    return set()
  rows = _read_answers(output)
  ids = {question.id for question in questions}
  hashes = _hashes(questions, folder) if rows else {}
  kept, done, replaced, reasons = [], set(), [], collections.Counter()
  for row in rows:
    asked: Any = row.get("asked")
    known = hashes.get(str(asked.get(QUESTION))) if isinstance(asked, dict) else None
    if known is not None and known not in done and asked == {**how, QUESTION: asked[QUESTION]}:
      done.add(known)
      kept.append({**row, "id": known})
    elif known is None and str(row["id"]) not in ids:
      kept.append(row)  # of another file of questions
    else:
      replaced.append(row)
      reasons.update(_changes(asked, how))
  if replaced:
    old = output.with_name(f"{output.name}.replaced")
    with _append(old) as file:
      for row in replaced:
        _write(file, row)
    why = "; ".join(f"{number} with {reason}" for reason, number in reasons.most_common())
    tell(f"{len(replaced)} answers in '{output}' are not those of its questions now: {why}")
    tell(f"they are in '{old}' from now on, and their questions are asked again")
  new = output.with_name(f"{output.name}.tmp")
  with new.open("w") as file:
    for row in kept:
      _write(file, row)
  new.replace(output)
  return done


def _read_answers(output: epath.Path) -> list[dict[str, Any]]:
  """Returns the lines with an answer.

  Raises:
    UserError: the file is none of answers.
  """
  rows = []
  data = untrusted.read_bytes(output, UserError, most=MAX_FILE_BYTES)
  for line in filter(None, data.split(b"\n")):
    try:
      row = untrusted.loads(line)
    except untrusted.Malformed:
      continue
    if not isinstance(row, dict) or "id" not in row or not {"answer", "error"} & row.keys():
      raise UserError(f"'{output}' is there, but is not a file of answers; give another --output.")
    if "answer" in row:
      rows.append(row)
  return rows


def _hashes(questions: list[Question], folder: epath.Path) -> dict[Any, str]:
  """Returns the ids of the questions that can be read, by their hashes."""

  def of_one(question: Question) -> tuple[str, str] | None:
    with contextlib.suppress(Exception):  # it fails when it is asked
      return _hash(question, read_question(question.row, folder)), question.id
    return None

  with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    return dict(filter(None, pool.map(of_one, questions)))


def _changes(asked: Any, how: dict[str, Any]) -> list[str]:
  """Returns in what an answer differs from what is asked now."""
  if not isinstance(asked, dict):
    return ["no record of what was asked"]
  names = [name for name in dict.fromkeys((*how, *asked)) if name != QUESTION]
  changed = [name for name in names if asked.get(name) != how.get(name)]
  if "model" in changed:
    return ["another model"]
  return [
    f"another {name} ({untrusted.shown(asked.get(name))}, now {untrusted.shown(how.get(name))})"
    for name in changed
  ] or ["another question"]


def _append(output: epath.Path):
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.open("a")
  except OSError as e:
    raise UserError(f"'{output}' cannot be written ({type(e).__name__}).") from e


def _write(file: IO[Any], row: dict[str, Any]) -> None:
  """Writes a line at once; halves of characters, as ids and errors may have, as `\\ud800`."""
  line = json.dumps(row, ensure_ascii=False)
  file.write(f"{line if untrusted.is_text(line) else json.dumps(row)}\n")
  file.flush()


def _reason(error: Exception) -> str:
  return str(error) if isinstance(error, UserError) else untrusted.why(error)


def _crc(text: str) -> int:
  return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _parts(items: Sequence[T], size: int) -> Iterator[list[T]]:
  left = iter(items)
  while part := [*itertools.islice(left, size)]:
    yield part


class _News:
  """Counts what was done, and tells of it now and then."""

  def __init__(self, total: int, tell: Callable[[str], None]):
    self.counts = collections.Counter()
    self._total, self._say = total, tell
    self._start = self._told = time.monotonic()

  def add(self, *kinds: str) -> None:
    self.counts.update(kinds)

  def tell(self) -> None:
    failed = self.counts["error"]
    done, now = self.counts["answer"] + failed, time.monotonic()
    if now - self._told <= SECONDS_BETWEEN_NEWS and done < self._total:
      return
    self._told = now
    rate = done / max(now - self._start, 1e-9)
    left = (self._total - done) / max(rate, 1e-9)
    self._say(
      f"{done} of {self._total} done, {failed} failed, {rate:.1f} a second"
      f"{f', {left / 60:.0f} min left' if done < self._total else ''}"
    )
