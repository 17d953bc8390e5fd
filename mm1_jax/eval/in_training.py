# SPDX-License-Identifier: Apache-2.0
"""Benchmarks inside a training run: `config.eval_tasks`."""

import math
from collections.abc import Callable

from etils import epath
from jax.sharding import Mesh

from mm1_jax.config import EvalTaskConfig, RunConfig
from mm1_jax.eval.evaluate import Data, Settings, make_asking, plan, run_job
from mm1_jax.eval.task import EvalError
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import PromptError
from mm1_jax.legend import STANDARD_ERROR
from mm1_jax.models.mm1 import MM1


class TaskEvaluator:
  """Scores a fixed part of a benchmark with the params of a step.

  All processes read the same items and answer them together, on the run's mesh. Nothing of the
  run's state or data is touched.

  Raises:
    EvalError: files, names or demonstrations do not fit; before the first step.
  """

  def __init__(self, run: RunConfig, cfg: EvalTaskConfig):
    self.name, self.every = cfg.name, cfg.every
    self._run = run
    self._settings = Settings(
      tasks=(cfg.task or cfg.name,),
      shots=(cfg.shots,),
      form=cfg.form,
      split=cfg.split,
      limit=cfg.limit,
      seed=cfg.seed,
    )
    (self._job,) = plan(self._settings, chat=run.data.chat)
    if self._job.task.score is None:
      raise EvalError(f"eval_tasks.{cfg.name}: {self._job.task.name} has no score here.")
    self._data = Data(epath.Path(cfg.data), cfg.limit, cfg.seed)
    self._data.prepare(self._job)
    # It encodes prompts; params and mesh come with each call.
    self._model = Model(None, run, None)  # pyright: ignore[reportArgumentType]
    self._check()

  def _check(self) -> None:
    """Encodes all items, so that what cannot be asked does not end the run at a later step."""
    items = self._data.items(self._job)
    asking = make_asking(self._job, items, self._data, self._settings)
    problems = []
    for item in items:
      try:
        asking.encode(self._model, item)
      except PromptError as e:
        problems.append(str(e))
    if len(problems) == len(items):
      raise EvalError(f"eval_tasks.{self.name}: no item can be asked; the first: {problems[0]}")

  def __call__(
    self, params: MM1, mesh: Mesh, check: Callable[[], None] = lambda: None
  ) -> dict[str, float]:
    """Returns `eval_tasks/NAME/METRIC` with its standard error, and how many items were dropped.

    `check` is called between batches, and may raise.
    """
    self._model.params, self._model.mesh = params, mesh
    try:
      result = run_job(self._model, self._job, self._data, self._settings, check=check)
    finally:
      self._model.params = None  # pyright: ignore[reportAttributeAccessIssue] - memory of the step
    assert result.scores is not None
    found = {}
    for metric, value in result.scores.values.items():
      name = f"eval_tasks/{self.name}/{metric}"
      found[name] = value.mean
      if math.isfinite(value.standard_error):
        found[f"{name}{STANDARD_ERROR}"] = value.standard_error
    return found | {f"eval_tasks/{self.name}/dropped": float(len(result.dropped))}


def make_evaluators(run: RunConfig) -> list[TaskEvaluator]:
  """Returns the evaluators of a run's `eval_tasks`, their items read."""
  return [TaskEvaluator(run, cfg) for cfg in run.eval_tasks]
