# SPDX-License-Identifier: Apache-2.0
"""Benchmarks inside a training run: `config.eval_tasks`."""

import math

from etils import epath
from jax.sharding import Mesh

from mm1_jax.config import EvalTaskConfig, RunConfig
from mm1_jax.eval.evaluate import Data, Settings, plan, run_job
from mm1_jax.eval.task import EvalError
from mm1_jax.inference.model import Model
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
    self.every = cfg.every
    self._run, self._name = run, cfg.name
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
    self._model: Model | None = None

  def __call__(self, params: MM1, mesh: Mesh) -> dict[str, float]:
    """Returns `eval_tasks/NAME/METRIC`, and its standard error under the same name."""
    if self._model is None:
      # Its tokenizer and template are read once.
      self._model = Model(params, self._run, mesh)
    self._model.params = params
    try:
      scores = run_job(self._model, self._job, self._data, self._settings).scores
    finally:
      self._model.params = None  # pyright: ignore[reportAttributeAccessIssue] - memory of the step
    assert scores is not None
    found = {}
    for metric, value in scores.values.items():
      name = f"eval_tasks/{self._name}/{metric}"
      found[name] = value.mean
      if math.isfinite(value.standard_error):
        found[f"{name}{STANDARD_ERROR}"] = value.standard_error
    return found


def make_evaluators(run: RunConfig) -> list[TaskEvaluator]:
  """Returns the evaluators of a run's `eval_tasks`, their items read."""
  return [TaskEvaluator(run, cfg) for cfg in run.eval_tasks]
