# SPDX-License-Identifier: Apache-2.0
"""Thousands of questions from a file, one JSON object a line, answered into another.

  {"id": "1", "prompt": "<image>\\nWhat is this?", "images": ["a.jpg"]}
  {"id": "2", "turns": [{"role": "user", "content": "Hi"}]}
  {"id": "3", "prompt": "And this?", "images": ["gone.jpg"]}

become

  {"id": "1", "answer": "A cat."}
  {"id": "2", "answer": "Hello."}
  {"id": "3", "error": "image 'gone.jpg' cannot be read: No such file or directory."}

`id` is the line's number where it is missing. Pictures fill the `<image>` slots of a prompt, or of
the turns, in order; a prompt without slots has its pictures in front. Answers are written as they
come. The same command continues where it was stopped: questions with an answer are not asked again,
those that failed are.
"""

import concurrent.futures
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from mm1_jax import untrusted
from mm1_jax.config import UserError
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Prompt, PromptError, Request, fill_slots
from mm1_jax.inference.sampler import Sampling

BATCHES_AT_ONCE = 8  # batches whose questions are sorted by length together, and written together
MAX_FILE_BYTES = 1 << 30  # of questions, or of answers: the file is read whole
NUM_THREADS = 4  # that decode pictures
SECONDS_BETWEEN_NEWS = 10.0


class Question(NamedTuple):
  id: str
  row: Any  # as it is in the file


class AnswerCounts(NamedTuple):
  answered: int
  failed: int
  before: int  # had an answer from an earlier run


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
    output: JSON lines; those with an answer stay.
    images: folder of pictures with relative paths; None is the one of `input`.
    max_new_tokens: as in `Model.generate`, like the arguments below.
    sampling: see above.
    stop: see above.
    chat: see above.
    seed: see above; what is drawn for a question depends on it and on the question's id.
    batch_size: see above.
    tell: is given a line of news now and then.

  Raises:
    PromptError: a setting is out of range.
    UserError: a file cannot be read or written, or two questions have the same id.
  """
  input, output = epath.Path(input), epath.Path(output)
  folder = input.parent if images is None else epath.Path(images)
  questions = read_questions(input)
  done = _keep_answers(output)
  todo = [question for question in questions if question.id not in done]
  before = len(questions) - len(todo)
  tell(f"{len(questions)} questions in '{input}', {before} of them answered before")
  answered, failed, start, told = 0, 0, time.monotonic(), time.monotonic()
  max_new_tokens = model.answer_length if max_new_tokens is None else max_new_tokens
  generate = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop}

  def encode(question: Question) -> Request | PromptError:
    try:
      prompt = read_question(question.row, folder)
      return model.encode(prompt, chat=chat, max_new_tokens=max_new_tokens)
    except PromptError as e:
      return e

  with _append(output) as file, concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    for part in _parts(todo, BATCHES_AT_ONCE * batch_size):
      requests = [*pool.map(encode, part)]
      good = {i: request for i, request in enumerate(requests) if isinstance(request, Request)}
      answers = model.generate(
        [*good.values()],
        seed=[zlib.crc32(f"{seed} {part[i].id}".encode()) for i in good],
        batch_size=batch_size,
        **generate,
      )
      said = dict(zip(good, answers, strict=True))
      for i, (question, request) in enumerate(zip(part, requests, strict=True)):
        result = {"answer": said[i]} if i in said else {"error": str(request)}
        file.write(json.dumps({"id": question.id, **result}, ensure_ascii=False) + "\n")
      file.flush()
      answered, failed = answered + len(good), failed + len(part) - len(good)
      if time.monotonic() - told > SECONDS_BETWEEN_NEWS or answered + failed == len(todo):
        told = time.monotonic()
        tell(_news(answered, failed, len(todo), told - start))
  return AnswerCounts(answered, failed, before)


def read_questions(path: epath.Path) -> list[Question]:
  """Returns the questions of a file; a line that is no JSON fails when it is asked.

  Raises:
    UserError: there is no such file, no question in it, or an id is there twice.
  """
  data = untrusted.read_bytes(path, UserError, most=MAX_FILE_BYTES)
  questions, numbers = [], {}
  for number, line in enumerate(data.split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      row = untrusted.loads(line)
    except untrusted.Malformed as e:
      row = e
    id = str(row.get("id", number)) if isinstance(row, Mapping) else str(number)
    if not untrusted.is_text(id):
      raise UserError(f"'{path}' has the id {untrusted.shown(id)} in line {number}; it is no text.")
    if id in numbers:
      raise UserError(f"'{path}' has the id '{id}' in lines {numbers[id]} and {number}.")
    numbers[id] = number
    questions.append(Question(id, row))
  if not questions:
    raise UserError(f"'{path}' has no question.")
  return questions


def read_question(row: Any, folder: epath.Path) -> Prompt:
  """Returns the prompt of a line.

  Raises:
    PromptError: it is not of the form above.
  """
  if isinstance(row, untrusted.Malformed):
    raise PromptError(f"the line is {row}.")
  if not isinstance(row, Mapping) or ("prompt" in row) == ("turns" in row):
    raise PromptError("the line must be an object with either 'prompt' or 'turns'.")
  names = row.get("images", [])
  names = [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise PromptError(f"'images' is {untrusted.shown(names)}; it must be a list of paths.")
  images = [folder / name for name in names]
  if "prompt" in row:
    if not isinstance(row["prompt"], str):
      raise PromptError(f"'prompt' is {untrusted.shown(row['prompt'])}; it must be a text.")
    return fill_slots(row["prompt"], images)
  return _turns(row["turns"], images)


def _turns(turns: Any, images: list[epath.Path]) -> Prompt:
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


def _keep_answers(output: epath.Path) -> set[str]:
  """Returns which questions have an answer, and leaves only those in the file.

  Questions that failed will be asked again; a last line that a crash cut off is removed.
  """
  if not output.exists():
    return set()
  lines, done = [], set()
  data = untrusted.read_bytes(output, UserError, most=MAX_FILE_BYTES)
  for line in filter(None, data.split(b"\n")):
    try:
      row = untrusted.loads(line)
    except untrusted.Malformed:
      continue
    if not isinstance(row, dict) or "id" not in row or not {"answer", "error"} & row.keys():
      raise UserError(f"'{output}' is there, but is not a file of answers; give another --output.")
    if "answer" in row:
      lines.append(line.decode())
      done.add(str(row["id"]))
  new = output.with_name(f"{output.name}.tmp")
  new.write_text("".join(f"{line}\n" for line in lines))
  new.replace(output)
  return done


def _append(output: epath.Path):
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.open("a")
  except OSError as e:
    raise UserError(f"'{output}' cannot be written ({type(e).__name__}).") from e


def _parts(questions: list[Question], size: int) -> Iterator[list[Question]]:
  left = iter(questions)
  while part := [*itertools.islice(left, size)]:
    yield part


def _news(answered: int, failed: int, total: int, seconds: float) -> str:
  done = answered + failed
  rate = done / max(seconds, 1e-9)
  left = (total - done) / max(rate, 1e-9)
  return (
    f"{done} of {total} done, {failed} failed, {rate:.1f} a second"
    f"{f', {left / 60:.0f} min left' if done < total else ''}"
  )
