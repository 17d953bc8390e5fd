# SPDX-License-Identifier: Apache-2.0
"""What a run begins with: whether its config fits the params that it starts from.

A run's own `config.json` is compared before anything is written over it, that of `train.init_from`
before anything is compiled. Settings that change what the params compute (`train.meaning`) are
refused; all other changes in a resumed run are logged.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from mm1_jax import checkpoint, untrusted
from mm1_jax.checkpoint import CheckpointError
from mm1_jax.config import PARTS, ConfigError, RunConfig
from mm1_jax.data.tokenizer import TOKENIZER_CONFIG, Tokenizer
from mm1_jax.train import meaning
from mm1_jax.train.meaning import Change, Kind
from mm1_jax.train.optimizer import make_schedule
from mm1_jax.untrusted import read_object

TOKENIZER, DELIMITERS = "data.tokenizer", "data.image_delimiters"
LORA_ALPHA = "model.decoder.lora.alpha"


class Before(NamedTuple):
  """What a run was last trained with."""

  run: RunConfig
  values: dict[str, Any]  # as they are in config.json


def check_resume(run: RunConfig, workdir: epath.PathLike) -> Before | None:
  """Returns what the run at `workdir` was last trained with, None if that cannot be told.

  Raises:
    CheckpointError: `run` would compute something else of its params, or config.json is damaged.
  """
  old = _read(epath.Path(workdir))
  if old is None:
    return None
  kinds = (Kind.MEANING, Kind.PRECISION)
  wrong = [change for change in _changes(old, run) if change.kind in kinds]
  if wrong:
    raise CheckpointError(
      f"'{workdir}' was trained with other settings, which change what its params compute: "
      f"{'; '.join(map(str, wrong))}. Set them back, or start another workdir from this one's "
      f"params: --config.train.init_from={workdir}"
    )
  return Before(old, read_object(epath.Path(workdir) / checkpoint.CONFIG, CheckpointError))


def log_resume(before: Before, run: RunConfig, *, step: int, accepted: int) -> None:
  """Logs the settings that have changed, and what that does to the learning rate.

  Args:
    step: the one that is resumed at.
    accepted: steps that the schedule has counted until then.
  """
  for line in changed(before.values, run.to_dict()):
    logging.info("changed since the last start: %s", line)
  was, now = (f"{np.asarray(make_schedule(c)(accepted)):.2g}" for c in (before.run, run))
  if was != now:
    logging.info("lr at step %d was %s, is %s", step, was, now)


def check_init_from(run: RunConfig, model: Any) -> None:
  """Compares a run with the one that it starts from.

  Args:
    model: the run's, abstract.

  Raises:
    CheckpointError: there is none, or its params have other arrays or would compute something else.
    ConfigError: `train.init_changes` names what is neither a part nor such a setting.
  """
  path, allowed = run.train.init_from, run.train.init_changes
  assert path is not None
  _check_names(allowed)
  source = _source(path)
  differ = [] if source is None else _changes(source, run)
  try:
    taken = checkpoint.check_init(path, model, fresh_parts=fresh_parts(run))
  except CheckpointError as e:
    settings = [str(change) for change in differ if change.kind is Kind.ARRAYS]
    why = f" Settings that differ: {'; '.join(settings)}." if settings else ""
    raise CheckpointError(f"{e}{why} {_way_on(path)}") from e
  wrong = [
    change
    for change in differ
    if change.kind is Kind.MEANING and change.part in taken.parts and change.path not in allowed
  ]
  if any(change.path == LORA_ALPHA for change in wrong):
    wrong_alpha = next(str(change) for change in wrong if change.path == LORA_ALPHA)
    raise CheckpointError(
      f"'{path}' has LoRA adapters that another alpha would rescale ({wrong_alpha}). "
      f"{checkpoint.MERGE}"
    )
  if wrong:
    raise CheckpointError(
      f"train.init_from '{path}' was trained with other settings, which change what its params "
      f"compute: {'; '.join(map(str, wrong))}. Set them as they were there; or, if that is meant, "
      f'--config.train.init_changes="{tuple(change.path for change in wrong)}".'
    )
  _warn_of_window(path, run.data.seq_len)


def _warn_of_window(path: epath.PathLike, seq_len: int) -> None:
  """Warns if rows are longer than the sliding window that the layers of imported params had."""
  file = checkpoint.find_step(path).parent.parent / checkpoint.IMPORT
  window = untrusted.read_object(file, CheckpointError).get("window") if file.exists() else None
  if isinstance(window, int) and window < seq_len:
    logging.warning(
      "data.seq_len %d: the params of '%s' are of layers that see the last %d positions only, and "
      "ours see all; longer rows are new to them",
      *(seq_len, path, window),
    )


def fresh_parts(run: RunConfig) -> tuple[str, ...]:
  """Returns the parts that are not taken from `train.init_from`, even if it has them."""
  return tuple(name for name in run.train.init_changes if name in PARTS)


def _way_on(path: str) -> str:
  return (
    f"Use the model's settings of '{path}', or name a part that is to start fresh: "
    f"--config.train.init_changes=\"('connector',)\". A dense run starts a sparse one by way of "
    "python -m mm1_jax.convert upcycle."
  )


def _check_names(allowed: tuple[str, ...]) -> None:
  names = [*PARTS, *meaning.meaningful(), TOKENIZER, DELIMITERS]
  names.remove(LORA_ALPHA)
  for name in allowed:
    if name not in names:
      raise ConfigError(f"train.init_changes names '{name}'; it can name any of {names}.")


def _source(path: epath.PathLike) -> RunConfig | None:
  """Returns the config of a run, or of the one that a step's folder is in; None without any."""
  step = checkpoint.find_step(path)
  return _read(step.parent.parent)


def _read(folder: epath.Path) -> RunConfig | None:
  """Returns a run's config; None, and a warning, if there is none that this version can read."""
  if not (folder / checkpoint.CONFIG).exists():
    logging.warning("'%s' has no %s: only arrays are compared", folder, checkpoint.CONFIG)
    return None
  try:
    return checkpoint.read_run(folder)
  except ConfigError as e:
    logging.warning("'%s' is not compared, but for arrays: %s", folder / checkpoint.CONFIG, e)
    return None


def _changes(old: RunConfig, new: RunConfig) -> list[Change]:
  """Returns the settings that matter to a model's params, and differ."""
  found = meaning.changes(old.model, new.model)
  ours, theirs = new.data.image_delimiters, old.data.image_delimiters
  if ours != theirs:
    found.append(Change(DELIMITERS, Kind.MEANING, theirs, ours))
  a, b = _tokenizer(old.data.tokenizer), _tokenizer(new.data.tokenizer)
  if a is not None and b is not None and not _same_tokenizer(old, new):
    found.append(Change(TOKENIZER, Kind.MEANING, a, b))
  return found


def _tokenizer(path: str) -> str | None:
  """Returns a tokenizer's path and hash; None if there is no file (of an encoder alone)."""
  file = epath.Path(path)
  if not path or not file.exists():
    return None
  return f"{path} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"


def _same_tokenizer(old: RunConfig, new: RunConfig) -> bool:
  """Returns whether two tokenizers give the same ids, those that begin, end and pad texts too."""
  files = [epath.Path(run.data.tokenizer) for run in (old, new)]
  if files[0].read_bytes() != files[1].read_bytes():
    return False
  beside = [file.parent / TOKENIZER_CONFIG for file in files]
  if files[0].suffix != ".json" or beside[0].read_bytes() == beside[1].read_bytes():
    return True
  a, b = (Tokenizer(str(file)) for file in files)
  return (a.pad_id, a.bos_id, a.eos_id) == (b.pad_id, b.bos_id, b.eos_id)


def changed(old: Any, new: Any, path: str = "") -> Iterator[str]:
  """Yields "name: old -> new" for what differs in plain nested values.

  Settings that `old` lacks, being of an older version, are left out.
  """
  if isinstance(old, dict) and isinstance(new, dict):
    for key in (key for key in new if key in old):
      yield from changed(old[key], new[key], f"{path}.{key}" if path else key)
  elif _are_named(old) and _are_named(new):
    a, b = ({entry["name"]: entry for entry in entries} for entries in (old, new))
    for name in {**a, **b}:
      yield from changed(a.get(name), b.get(name), f"{path}.{name}")
  elif json.dumps(old) != json.dumps(new):
    yield f"{path}: {old} -> {new}"


def _are_named(entries: Any) -> bool:
  """Returns whether it is a list of groups with names."""
  return isinstance(entries, list | tuple) and all(
    isinstance(entry, dict) and "name" in entry for entry in entries
  )
