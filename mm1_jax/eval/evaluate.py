# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model: tasks x forms x shots x controls x trials, each of them a `Job`."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mm1_jax import distributed
from mm1_jax.eval import replies, tasks
from mm1_jax.eval.few_shot import Demonstrations
from mm1_jax.eval.metrics.statistics import Estimate, paired
from mm1_jax.eval.replies import Answered, Asking
from mm1_jax.eval.task import EvalError, Form, Item, Likelihood, Scores, Task, source
from mm1_jax.inference.model import Model
from mm1_jax.metrics import format_seconds

# What an item is shown, or what is said without asking a model.
CONTROLS = {
  "own": "its own pictures",
  "blind": "no pictures",
  "other": "another item's pictures",
  "frequent": "no model: the most frequent answer of the demonstration split",
}
SECONDS_BETWEEN_NEWS = 10.0
ALL_SOURCES = ""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is evaluated.

  Attributes:
    tasks: names, see `tasks.TASKS`, or files.
    shots: numbers of demonstrations.
    form: protocol, see `Task.forms`; None is each task's first that fits the model: a user's turn
      for a model that was trained on conversations, else the beginning of a document.
    split: None is each task's default.
    limit: items of each task, drawn by `seed`; None is all.
    trials: with demonstrations, how many draws of them.
    seed: of draws.
    controls: keys of `CONTROLS`.
    batch_size: prompts that are generated from at once.
    bos: whether documents begin with `<s>`, as in training. Imported models that were trained
      without one, and lm-eval's `hf` model of them, begin with the text.
  """

  tasks: tuple[str, ...]
  shots: tuple[int, ...] = (0,)
  form: str | None = None
  split: str | None = None
  limit: int | None = None
  trials: int = 1
  seed: int = 0
  controls: tuple[str, ...] = ("own",)
  batch_size: int = 8
  bos: bool = True


class Job(NamedTuple):
  """One pass over a task's items."""

  task: Task
  form: str
  split: str
  shots: int
  control: str
  trial: int

  @property
  def name(self) -> str:
    parts = [self.task.name, self.split, self.form, f"{self.shots}shot"]
    parts += [self.control] * (self.control != "own") + [f"trial{self.trial}"] * (self.trial > 0)
    return "-".join(part.replace("/", "_") for part in parts)


class Result(NamedTuple):
  """A job and what came of it."""

  job: Job
  answered: list[Answered]  # in the task's order
  scores: Scores | None  # None where only a server or a judge can score

  @property
  def dropped(self) -> list[Answered]:
    return [a for a in self.answered if a.reply is None]

  @property
  def scored(self) -> list[Answered]:
    return [a for a in self.answered if a.reply is not None]


class Data:
  """Items of tasks under one folder, each split read once."""

  def __init__(self, folder: epath.Path, limit: int | None, seed: int):
    self._folder, self._limit, self._seed = folder, limit, seed
    self._splits: dict[tuple[str, str], list[Item]] = {}

  def items(self, job: Job) -> list[Item]:
    """Returns what is evaluated."""
    items = self._read(job.task, job.split)
    if self._limit is None or self._limit >= len(items):
      return items
    # Not the first ones: files are often sorted by kind. Pairs and rotations stay together.
    groups = list(dict.fromkeys(group(item) for item in items))
    order = np.random.default_rng(self._seed).permutation(len(groups))
    kept, chosen = 0, set()
    sizes = collections.Counter(group(item) for item in items)
    for i in order:
      if kept >= self._limit:
        break
      chosen.add(groups[i])
      kept += sizes[groups[i]]
    return [item for item in items if group(item) in chosen]

  def prepare(self, job: Job) -> int:
    """Reads all that a job needs; returns how many items it has."""
    if job.shots or job.task.forms[job.form].text_demonstrations or job.control == "frequent":
      self.demonstrations(job)
    return len(self.items(job))

  def demonstrations(self, job: Job) -> list[Item]:
    """Returns the split that demonstrations are drawn from."""
    if job.task.demonstrations is None:
      raise EvalError(f"{job.task.name} has no split for demonstrations; give --shots=0.")
    return self._read(job.task, job.task.demonstrations)

  def _read(self, task: Task, split: str) -> list[Item]:
    key = task.name, split
    if key not in self._splits:
      self._splits[key] = tasks.read_items(task, self._folder, split)
    return self._splits[key]


def group(item: Item) -> Any:
  """Returns what is only scored together: MME's questions of a picture, MMBench's rotations."""
  return item.details.get("group", item.id)


def plan(settings: Settings, *, chat: bool) -> list[Job]:
  """Returns the jobs that settings ask for.

  Args:
    settings: what is evaluated.
    chat: whether the model was trained on conversations.

  Raises:
    EvalError: a name, a split or a control is unknown, two tasks have the same name, or a task
      lacks what is asked for.
  """
  jobs = []
  for control in settings.controls:
    if control not in CONTROLS:
      raise EvalError(f"there is no control '{control}'; there are {', '.join(CONTROLS)}.")
  all_tasks = [tasks.get_task(name) for name in settings.tasks]
  names = collections.Counter(task.name for task in all_tasks)
  if twice := [name for name, count in names.items() if count > 1]:
    raise EvalError(f"two tasks are called '{twice[0]}'; rename a file, or evaluate one at a time.")
  for task in all_tasks:
    form = settings.form or _default_form(task, chat)
    if form not in task.forms:
      raise EvalError(f"{task.name} has no form '{form}'; it has {', '.join(task.forms)}.")
    split = settings.split or task.split
    if split not in task.splits:
      raise EvalError(f"{task.name} has no split '{split}'; it has {', '.join(task.splits)}.")
    for shots in settings.shots:
      if shots and (task.demonstrations is None or task.forms[form].demonstration is None):
        raise EvalError(
          f"{task.name} has no demonstrations in form '{form}', so --shots={shots} cannot be."
        )
      for control in settings.controls:
        if control == "frequent" and (shots or task.score is None):
          continue
        trials = settings.trials if shots or task.forms[form].text_demonstrations else 1
        jobs += [Job(task, form, split, shots, control, trial) for trial in range(trials)]
  return jobs


def _default_form(task: Task, chat: bool) -> str:
  fits = [name for name, form in task.forms.items() if form.chat == chat]
  return (fits or list(task.forms))[0]


def evaluate(
  model: Model,
  settings: Settings,
  folder: epath.PathLike,
  *,
  kept: epath.Path | None = None,
  digest: str = "",
  share: tuple[int, int] = (0, 1),
  tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Result]:
  """Yields the result of each job as it is done.

  Args:
    model: that is evaluated.
    settings: what is evaluated.
    folder: of the benchmarks' official files.
    kept: folder of replies, for a job that is stopped and started again; None keeps none.
    digest: of the model's checkpoint; needed with `kept`.
    share: this process, and how many share the chunks of each job, through `kept`. The first one
      yields the results.
    tell: is given a line of news now and then.

  Raises:
    EvalError: settings, files or demonstrations do not fit.
  """
  jobs = plan(settings, chat=model.chat)
  data = Data(epath.Path(folder), settings.limit, settings.seed)
  for number, job in enumerate(jobs, start=1):
    num = data.prepare(job)  # all are read before hours are spent on the first
    tell(f"{number} of {len(jobs)}: {job.name}, {num} items")
  for job in jobs:
    ask = functools.partial(
      run_job, model, job, data, settings, kept=kept, digest=digest, tell=tell
    )
    if share[1] > 1:
      ask(share=share)
      distributed.barrier(job.name)
    if share[0] == 0:
      yield ask()


def run_job(
  model: Model,
  job: Job,
  data: Data,
  settings: Settings,
  *,
  kept: epath.Path | None = None,
  digest: str = "",
  share: tuple[int, int] = (0, 1),
  tell: Callable[[str], None] = lambda line: None,
  check: Callable[[], None] = lambda: None,
) -> Result:
  """Returns the result of one job, or a share's replies without scores; see `evaluate`.

  `check` is called after each batch; what it raises ends the job.
  """
  items, form = data.items(job), job.task.forms[job.form]
  if job.control == "frequent":
    return _scored(job, _most_frequent(items, data.demonstrations(job), form))
  pictures = any(item.pictures for item in items)
  if job.control != "own" and not pictures:
    raise EvalError(f"{job.task.name} has no pictures, so it has no control '{job.control}'.")
  if pictures and job.control != "blind" and not model.run.data.images_per_row:
    raise EvalError(
      f"{job.task.name} shows pictures, and the model was trained on none (data.images_per_row 0)."
    )
  news = _News(job.name, len(items), tell)
  asking = dataclasses.replace(make_asking(job, items, data, settings), check=check)
  chunks = replies.answer(model, items, asking, kept=kept, digest=digest, share=share, tell=news)
  answered = [one for chunk in chunks for one in chunk]
  return _scored(job, answered) if share == (0, 1) else Result(job, answered, None)


def make_asking(job: Job, items: Sequence[Item], data: Data, settings: Settings) -> Asking:
  """Returns how a job's items are put to a model."""
  form = job.task.forms[job.form]
  shown = None
  if job.shots or form.text_demonstrations:
    shown = Demonstrations.drawn(data.demonstrations(job), seed=settings.seed, trial=job.trial)
  change = {
    "own": lambda item, content: content,
    "blind": replies.no_pictures,
    "other": replies.other_pictures(items) if job.control == "other" else None,
  }[job.control]
  assert change is not None
  return Asking(form, job.shots, shown, change, settings.batch_size, settings.bos)


def _scored(job: Job, answered: list[Answered]) -> Result:
  """Scores the items that could be asked.

  Raises:
    EvalError: none of them could be.
  """
  scored = [a for a in answered if a.reply is not None]
  if not scored:
    reason = answered[0].problem if answered else "there are none"
    raise EvalError(
      f"{job.name}: none of {len(answered)} items could be asked; the first: {reason}"
    )
  scores = None
  published = any(a.item.answers for a in scored)  # else the benchmark's server scores
  if job.task.score is not None and (published or job.task.submission is None):
    scores = job.task.score([a.item for a in scored], [a.reply for a in scored])  # pyright: ignore
  return Result(job, answered, scores)


def _most_frequent(items: list[Item], shown: list[Item], form: Form) -> list[Answered]:
  """Answers each item with what is right most often among demonstrations of its source.

  Where these have none of its source, all of them count.
  """
  right: dict[str, collections.Counter[Any]] = collections.defaultdict(collections.Counter)
  for item in shown:
    said = item.answers if form.options is None else (item.right,)
    for key in (ALL_SOURCES, source(item)):
      right[key].update(said)
  if not right[ALL_SOURCES]:
    raise EvalError("the demonstration split has no answers, so none is the most frequent.")
  found = []
  for item in items:
    (most, _), *_ = (right.get(source(item)) or right[ALL_SOURCES]).most_common(1)
    if form.options is not None:
      num = len(form.options(item))
      most = tuple(Likelihood(0.0 if i == most else -1.0, False, 1) for i in range(num))
    found.append(Answered(item, (), most))
  return found


class _News:
  """Tells now and then how far a job is, and how long it will take."""

  def __init__(self, name: str, num: int, tell: Callable[[str], None]):
    self._name, self._num, self._tell = name, num, tell
    self._start = self._told = time.monotonic()

  def __call__(self, done: int) -> None:
    now = time.monotonic()
    if now - self._told < SECONDS_BETWEEN_NEWS and done < self._num:
      return
    self._told = now
    rate = done / max(now - self._start, 1e-9)
    left = f", {format_seconds((self._num - done) / rate)} left" if done < self._num else ""
    self._tell(f"{self._name}: {done} of {self._num} items, {rate:.1f} a second{left}")


def over_trials(results: Sequence[Result]) -> dict[str, Estimate]:
  """Returns the mean of each metric over trials, see `mean_of_trials`."""
  scores = [r.scores for r in results if r.scores is not None]
  metrics = scores[0].values if scores else ()
  return {metric: mean_of_trials([s.values[metric] for s in scores]) for metric in metrics}


def mean_of_trials(values: Sequence[Estimate]) -> Estimate:
  """Returns the mean over trials, which differ in their demonstrations.

  Trials have the same items, so more of them do not shrink the error that comes from the items: the
  standard error is the root of the mean variance of a trial's mean, plus the variance between
  trials over their number.
  """
  means = np.array([v.mean for v in values])
  between = float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0
  within = float(np.mean([v.standard_error**2 for v in values]))
  return Estimate(float(means.mean()), (within + between) ** 0.5, values[0].n)


def difference(a: Result, b: Result) -> Estimate:
  """Returns the paired difference of two results' headline over the items that both scored.

  Raises:
    EvalError: they have no items in common, or one has no scores.
  """
  if a.scores is None or b.scores is None:
    raise EvalError(f"{a.job.name} and {b.job.name} have no scores here, so no difference.")
  first, second = (
    {x.item.id: value for x, value in zip(of.scored, scores.per_item, strict=True)}
    for of, scores in ((a, a.scores), (b, b.scores))
  )
  common = [id for id in first if id in second]
  common = [id for id in common if np.isfinite(first[id]) and np.isfinite(second[id])]
  if not common:
    raise EvalError(f"{a.job.name} and {b.job.name} have no items in common.")
  return paired([first[id] for id in common], [second[id] for id in common])
