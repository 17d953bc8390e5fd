# SPDX-License-Identifier: Apache-2.0
"""What a run reads: tokenizer, shards, first params. All is looked for before any is opened."""

from collections.abc import Iterator

from etils import epath

from mm1_jax.checkpoint import CheckpointError, find_step
from mm1_jax.config import ConfigError, RunConfig
from mm1_jax.data.sources import find_shards

_ADVICE = """
Three ways on:
- your data: `{build}` makes shards of raw files (docs/guides/your_data.md); name yours by
  --config.data.tokenizer=FILE, --config.data.sources.NAME.path=GLOB, --config.train.init_from=RUN.
- the shipped sample, with a tiny model of this kind, in minutes on a CPU:
  {sample}
- a plan of this run on a TPU slice (memory, time, cost), which reads no data:
  {plan}"""


def sample_config(run: RunConfig) -> str:
  """Returns the config that trains a tiny model of a run's kind on the shipped sample."""
  decoder = run.model.decoder
  if not run.data.chat:
    return f"mm1_debug:{'moe' if decoder.moe else 'dense'}"
  return f"mm1_debug_sft:{'moe' if decoder.moe else 'dense'}{',lora' if decoder.lora else ''}"


def check(run: RunConfig, workdir: epath.PathLike, *, build: str, sample: str, plan: str) -> None:
  """Checks that the files a run reads are there; opens none of them.

  Args:
    run: what is trained.
    workdir: of the run; where it has a checkpoint, `train.init_from` is not read.
    build: command that builds data; `sample` and `plan`, those that train on the sample and plan.

  Raises:
    ConfigError: listing all that is missing, and what to do.
  """
  lines = list(_missing(run, workdir))
  if lines:
    advice = _ADVICE.format(build=build, sample=sample, plan=plan)
    raise ConfigError(f"{run.name} reads what is not there:\n- " + "\n- ".join(lines) + advice)


def _missing(run: RunConfig, workdir: epath.PathLike) -> Iterator[str]:
  """Yields a line for each file, glob or checkpoint."""
  tokenizer = run.data.tokenizer
  try:
    if not tokenizer or not epath.Path(tokenizer).exists():
      yield f"data.tokenizer '{tokenizer}'"
  except (ImportError, OSError) as e:
    yield f"data.tokenizer '{tokenizer}' cannot be read ({e})"
  for kind, sources in (("sources", run.data.leaves), ("eval_sources", run.data.eval_sources)):
    for source in sources:
      try:
        if not find_shards(source.path):
          yield f"data.{kind}: source '{source.name}': no file matches {source.path}"
      except (ImportError, OSError) as e:
        yield f"data.{kind}: source '{source.name}': cannot list {source.path} ({e})"
  if run.train.init_from and not _has_checkpoint(workdir):
    try:
      find_step(run.train.init_from)
    except CheckpointError as e:
      yield f"train.init_from: {e}"
    except (ImportError, OSError) as e:
      yield f"train.init_from '{run.train.init_from}' cannot be read ({e})"


def _has_checkpoint(workdir: epath.PathLike) -> bool:
  try:
    return bool(find_step(workdir))
  except CheckpointError:
    return False
