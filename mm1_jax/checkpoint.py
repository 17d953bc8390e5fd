# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on Orbax: save and resume a run, and start another from its params alone.

A workdir holds `config.json`, the tokenizer, `chat_template.json` if it is your own file,
`good.json`, and `checkpoints/STEP/`; a step has four items: `params` (the model, under the names
of its attributes), `train` (optimizer state and counters), `data` (the pipeline's state, JSON), and
`checksums` of the three. Saving is asynchronous and atomic: a step's folder has its name only when
all of it is there. Arrays are restored straight onto the current mesh, whatever mesh they were
saved from. Their checksums are computed where the arrays are, before they are written and after
they are read: what is between (copies, network, disk, time) cannot change a bit unseen.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath

from mm1_jax import distributed, untrusted
from mm1_jax.checksum import checksums
from mm1_jax.config import CheckpointConfig, RunConfig, UserError
from mm1_jax.models.layers import resize_grid

CONFIG, STEPS = "config.json", "checkpoints"
GOOD = "good.json"  # the newest step whose params a step of training was accepted from
# Suffixes of steps that were set aside: no longer taken for checkpoints.
REFUSED, DAMAGED = ".refused", ".damaged"
TEMPLATE = "chat_template.json"
IMPORT = "import.json"  # of imported weights: what became of them
# A tokenizer's files by the suffix of its own, which comes first.
TOKENIZERS = {
  ".model": ("tokenizer.model",),
  ".json": ("tokenizer.json", "tokenizer_config.json"),
}
NONE_GOOD = -1
GRIDS = ("vit.positions", "connector.positions")  # [H, W, D]: learned, for a grid of patches
ADAPTER = ".lora."  # in the names of adapters
MERGE = (
  "Merge them: python -m mm1_jax.convert merge_lora --checkpoint=RUN --out=NEW_RUN; then start "
  "from that."
)
PARAMS, TRAIN, DATA, CHECKSUMS = "params", "train", "data", "checksums"
ARRAYS, FILES = "arrays", "files"  # in the checksums: by item and name, and of the run, by name
JSON_FILE = "metadata"  # of an item that is JSON, as Orbax calls it
CHECKSUMS_VERSION = 1  # raise it when the same values have other checksums
SAVED_AT_ONCE_GB = 1  # of params without the rest of a run, on their way to the disk
CAST_AT_ONCE = 1 << 30  # bytes that are in memory in the dtype they were saved in and in another
SHOWN = 5  # names listed in a message before "and N more"


class CheckpointError(UserError):
  """A checkpoint that is missing, damaged, or of another model; the message says which and why."""


class DamagedError(CheckpointError):
  """A checkpoint that cannot be read, or is not what was written."""


class Restored(NamedTuple):
  """What a run resumes from."""

  step: int
  params: Any
  train: Any
  data: dict[str, Any]


class Checkpointer:
  """The checkpoints of one run.

  A checkpoint is known to be good only when a step from its params was accepted. A run saves none
  right after a refused step, so all but the newest are good; and at least two are kept, so that one
  of them is good.
  """

  def __init__(self, workdir: epath.PathLike, cfg: CheckpointConfig):
    self._path = absolute(workdir) / STEPS
    self._good_file = absolute(workdir) / GOOD
    self._good = _read_good(self._good_file)
    self._verify = cfg.verify
    self._saving: int | None = None  # the step whose save has not been seen to end
    self._failed = False  # a save
    self._manager = ocp.CheckpointManager(
      self._path,
      item_names=(PARAMS, TRAIN, DATA, CHECKSUMS),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max(2, cfg.keep), keep_period=cfg.keep_period
      ),
    )

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  @property
  def good_step(self) -> int | None:
    """The newest step that is known to be good."""
    steps = sorted(self._manager.all_steps())
    return next((s for s in reversed(steps) if s <= self._good or s < steps[-1]), None)

  def folder(self, step: int) -> epath.Path:
    return self._path / str(step)

  def prove(self, step: int) -> None:
    """Records on disk that a step from the params of `step` was accepted."""
    if step != self._good:
      self._good = step
      if jax.process_index() == 0:
        self._good_file.write_text(json.dumps({"step": step}) + "\n")

  def set_aside(self) -> epath.Path:
    """Renames the newest step, so that the one before it is resumed from; returns its new place.

    For the end of a run: no process may be saving, and the checkpointer is of no use after it.
    """
    folder = self.folder(self._manager.latest_step() or 0)
    aside = folder.with_name(folder.name + REFUSED)
    if jax.process_index() == 0:
      if aside.exists():
        aside.rmtree()
      folder.rename(aside)
    return aside

  def save(self, step: int, *, params: Any, train: Any, data: dict[str, Any]) -> None:
    """Starts saving; arrays may be donated as soon as it returns.

    Raises:
      CheckpointError: this save, or the one before it, failed.
    """
    self.wait()
    self._saving = step
    if self._good >= step:  # recorded of one that was never finished, or was deleted
      self.prove(NONE_GOOD)
    arrays = {PARAMS: to_names(params), TRAIN: to_names(train)}
    items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in arrays.items()}
    items[DATA] = ocp.args.JsonSave(data)
    if self._verify:
      # Process 0 writes them.
      files = hash_files(self._path.parent) if jax.process_index() == 0 else {}
      items[CHECKSUMS] = ocp.args.JsonSave(_record(arrays, data, files))
    with self._saves():
      self._manager.save(step, args=ocp.args.Composite(**items))

  def newest_data(self) -> tuple[int, dict[str, Any]] | None:
    """Returns the newest step whose data's state is whole, and that; None without any checkpoint.

    Raises:
      DamagedError: no step has one.
    """
    error = None
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        return step, self.restore_data(step)
      except DamagedError as e:
        error = error or e
    if error is not None:
      raise error
    return None

  def restore_data(self, step: int) -> dict[str, Any]:
    """Returns the pipeline's state at a step.

    Raises:
      DamagedError: it cannot be read, or is not what was written; on all processes alike.
    """
    where = self.folder(step) / DATA
    data, error = {}, None
    try:
      data = _read_json(where)
      recorded = read_checksums(self.folder(step)) if self._verify else None
      for line in changed_data(self.folder(step), recorded):
        raise DamagedError(f"{line}. {_WAY_ON}")
    except DamagedError as e:
      error = str(e)
    _agree(error)
    return data

  def restore_newest(self, *, params: Any, train: Any) -> Restored:
    """Returns the newest step that is whole, shaped and placed like the abstract trees given.

    Newer ones are renamed to STEP.damaged, so that they are not taken again, and are kept.

    Raises:
      DamagedError: none is whole; nothing is renamed.
      CheckpointError: its arrays are not the ones asked for.
    """
    wrong: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        arrays = self.restore(step, params=params, train=train)
        restored = Restored(step, *arrays, self.restore_data(step))
      except DamagedError as e:  # kept as text: the traceback would keep the arrays
        wrong[step] = str(e)
      else:
        self._set_damaged_aside(wrong, step)
        return restored
    first = next(iter(wrong.values()), f"no checkpoint under '{self._path}'.")
    more = f" Nor can any of the {len(wrong) - 1} before it." if len(wrong) > 1 else ""
    raise DamagedError(first + more)

  def _set_damaged_aside(self, wrong: Mapping[int, str], resumed: int) -> None:
    if not wrong:
      return
    if jax.process_index() == 0:
      for step, reason in wrong.items():
        aside = _free(self.folder(step), DAMAGED)
        self.folder(step).rename(aside)
        logging.warning("step %d is left out and now %s: %s", step, aside, reason)
      logging.warning("resuming from step %d instead: the steps after it are repeated", resumed)
    distributed.everyone(f"set aside before {resumed}", None)
    self._manager.reload()

  def restore(self, step: int, *, params: Any, train: Any) -> tuple[Any, Any]:
    """Returns (params, train) of a step, shaped and placed like the abstract trees given.

    Raises:
      DamagedError: the step cannot be read, or is not what was written; on all processes alike.
      CheckpointError: its arrays are not the ones asked for.
    """
    where, error, recorded = self.folder(step), None, None
    try:
      recorded = self.check(step, params=params, train=train)
    except DamagedError as e:
      error = str(e)
    _agree(error)
    return (
      from_names(params, _restore(where / PARAMS, to_names(params), recorded)),
      from_names(train, _restore(where / TRAIN, to_names(train), recorded)),
    )

  def check(self, step: int, *, params: Any, train: Any) -> dict[str, Any] | None:
    """Checks that a step has exactly these arrays; reads none. Returns its checksums, if any.

    Raises:
      CheckpointError: it has others.
      DamagedError: it cannot be read, or by its checksums it had exactly these.
    """
    where = self.folder(step)
    recorded = read_checksums(where) if self._verify else None
    for item, tree in ((PARAMS, params), (TRAIN, train)):
      wanted = to_names(tree)
      try:
        check_match(saved_shapes(where / item), wanted, where / item)
      except DamagedError:
        raise
      except CheckpointError as e:
        saved = recorded[ARRAYS].get(item, {}) if recorded else {}
        if not saved or _differences({n: x.shape for n, x in saved.items()}, _shapes(wanted)):
          raise
        raise damaged(where / item, e) from e
    return recorded

  def wait(self) -> None:
    """Returns when what is being saved is on disk; raises CheckpointError if that failed."""
    if self._saving is not None:
      with self._saves():
        self._manager.wait_until_finished()
      self._saving = None

  def check_saved(self) -> None:
    """Raises CheckpointError if the newest save has failed; does not wait for one that runs."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  @contextlib.contextmanager
  def _saves(self) -> Iterator[None]:
    """Says of an error in the block that the save failed; after that nothing is waited for."""
    step = self._saving
    try:
      yield
    except Exception as e:
      self._saving, self._failed = None, True
      steps = [s for s in self._manager.all_steps() if s != step]
      whole = f"the newest whole checkpoint is step {max(steps)}" if steps else "there is no other"
      reason = (str(e).splitlines() or [""])[0][:300]
      raise CheckpointError(
        f"saving step {step} in '{self._path}' failed: {type(e).__name__}: {reason}; {whole}. Make "
        "room or mend the disk, and run again to continue from there."
      ) from e

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, error, *_) -> None:
    # Closing waits for the other processes, which never close where this one has failed.
    if error is None or jax.process_count() == 1:
      with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
        self._manager.close()  # a save that failed fails here again


def _read_good(path: epath.Path) -> int:
  if not path.exists():
    return NONE_GOOD
  try:
    with untrusted.of_form(f"'{path}'", CheckpointError):
      return int(untrusted.read_object(path, CheckpointError)["step"])
  except CheckpointError:
    return NONE_GOOD  # it was cut off by a crash


def write_run_files(workdir: epath.PathLike, run: RunConfig) -> None:
  """Puts config, tokenizer and template beside the checkpoints: a run can be moved whole."""
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / CONFIG).write_text(json.dumps(run.to_dict(), indent=2) + "\n")
  tokenizer = epath.Path(run.data.tokenizer)
  own, *beside = TOKENIZERS[".json" if tokenizer.suffix == ".json" else ".model"]
  (workdir / own).write_bytes(tokenizer.read_bytes())
  for name in beside:
    (workdir / name).write_bytes((tokenizer.parent / name).read_bytes())
  template = epath.Path(run.data.chat_template)
  if template.suffix:  # a file; shipped ones go by their name
    (workdir / TEMPLATE).write_bytes(template.read_bytes())


def hash_files(workdir: epath.Path) -> dict[str, str]:
  """Returns the sha256 of the files that `write_run_files` put into a workdir, by name."""
  names = (CONFIG, TEMPLATE, *(name for group in TOKENIZERS.values() for name in group))
  there = [workdir / name for name in names if (workdir / name).exists()]
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in there}


def read_run(workdir: epath.PathLike) -> RunConfig:
  """Returns the config of a run, reading the tokenizer that travels with it.

  Raises:
    CheckpointError: `workdir` is not a run, or its config cannot be read.
  """
  workdir = epath.Path(workdir)
  path = workdir / CONFIG
  if not path.exists():
    raise CheckpointError(
      f"'{workdir}' is not a run: it has no {CONFIG}. Give the --workdir of a training run."
    )
  values = untrusted.read_object(path, CheckpointError)
  files = [workdir / own for own, *_ in TOKENIZERS.values()]
  tokenizer = next((file for file in files if file.exists()), files[0])
  with untrusted.of_form(f"'{path}' is damaged", CheckpointError):
    values["data"]["tokenizer"] = str(tokenizer)
    if (workdir / TEMPLATE).exists():
      values["data"]["chat_template"] = str(workdir / TEMPLATE)
  return RunConfig.from_dict(values)


def find_step(path: epath.PathLike) -> epath.Path:
  """Returns the folder of a step: `path` itself, or the newest one of the run at `path`.

  Raises:
    CheckpointError: there is none.
  """
  path = absolute(path)
  if (path / PARAMS).exists():
    return path
  folder = path / STEPS
  names = [p.name for p in folder.iterdir()] if folder.exists() else []
  steps = sorted(int(name) for name in names if name.isdigit())
  if not steps:
    partial = sorted(name for name in names if "tmp" in name)
    found = f" Only unfinished ones: {partial}." if partial else ""
    raise CheckpointError(f"no checkpoint under '{path}'.{found}")
  return folder / str(steps[-1])


def restore_params(path: epath.PathLike, like: Any) -> Any:
  """Returns the params of a run's newest step, or of the step at `path`, placed like `like`.

  Raises:
    CheckpointError: missing, damaged, of another model, or of a part of one.
  """
  step = find_step(path)
  saved, wanted = saved_shapes(step / PARAMS), to_names(like)
  if missing := sorted({*map(_part, wanted)} - {*map(_part, saved)}):
    raise CheckpointError(
      f"'{step / PARAMS}' has no {' and no '.join(missing)}: it is of a part of a model, as "
      f"an import is without --fill. Import it with --fill for a whole model, random where nothing "
      f"was imported; or train one from it, with --config.train.init_from={step.parent.parent}."
    )
  check_match(saved, wanted, step / PARAMS)
  params = from_names(like, _restore(step / PARAMS, to_names(like), read_checksums(step)))
  logging.info("read the params of step %s of '%s'", step.name, step.parent.parent)
  return params


def digest(path: epath.PathLike) -> str:
  """Returns a hash that differs between checkpoints, of the run's newest step or the one at `path`.

  Of the params' files it takes names, sizes, and the first and last 64 kB: names and the index at a
  file's end change with each save, so that 100 GB need not be read.
  """
  step, edge = find_step(path), 65536
  workdir, hasher = step.parent.parent, hashlib.sha256()
  for own in (CONFIG, TEMPLATE, *(name for name, *_ in TOKENIZERS.values())):
    if (workdir / own).exists():
      hasher.update(own.encode() + (workdir / own).read_bytes())
  for file in sorted(_files(step / PARAMS)):
    size = file.stat().length
    hasher.update(f"{file.relative_to(step)} {size}".encode())
    with file.open("rb") as opened:
      hasher.update(opened.read(edge))
      opened.seek(max(0, size - edge))
      hasher.update(opened.read(edge))
  return hasher.hexdigest()[:32]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    yield from _files(path) if path.is_dir() else (path,)


def refuse_run(workdir: epath.PathLike) -> None:
  """Raises CheckpointError if there is a run at `workdir` already, so that none is overwritten."""
  workdir = epath.Path(workdir)
  if (workdir / CONFIG).exists() or (workdir / STEPS).exists():
    raise CheckpointError(f"'{workdir}' is a run already; give another --out.")


def save_params(workdir: epath.PathLike, step: int, params: Mapping[str, jax.Array]) -> None:
  """Writes params by name as a step of a run that has nothing else; little is in memory twice."""
  path = absolute(workdir) / STEPS / str(step) / PARAMS
  record = json.dumps(_record({PARAMS: params}, None, {}))
  if jax.process_index() == 0:
    (path.parent / CHECKSUMS).mkdir(parents=True, exist_ok=True)
    (path.parent / CHECKSUMS / JSON_FILE).write_text(record)
  handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=SAVED_AT_ONCE_GB)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(params))


class Taken(NamedTuple):
  """What another run's params are for a model."""

  where: epath.Path
  names: list[str]
  grids: dict[str, tuple[int, ...]]  # of those, learned positions to be resized, and their shapes
  adapters: list[str]  # of LoRA: new
  fresh: list[str]  # parts that keep their fresh params

  @property
  def parts(self) -> set[str]:
    return {_part(name) for name in self.names}


def check_init(path: epath.PathLike, params: Any, *, fresh_parts: Collection[str] = ()) -> Taken:
  """Returns what `init_from` will take of a checkpoint; reads no array.

  A part (ViT, connector, decoder) that the checkpoint has is taken whole: all params of both sides
  have the same names and shapes. But for learned positions on another grid, which are resized, and
  for LoRA adapters that only the model has. A part that the checkpoint lacks stays fresh, as do
  `fresh_parts`.

  Raises:
    CheckpointError: missing, damaged, or it does not fit; names what does not.
  """
  where = find_step(path) / PARAMS
  saved = saved_shapes(where)
  wanted = {name: tuple(x.shape) for name, x in to_names(params).items()}
  theirs = {_part(name) for name in saved}
  ours = {_part(name) for name in wanted}
  if not theirs & ours:
    raise CheckpointError(f"'{where}' has no param of this model; is it another kind of model?")
  parts = theirs - set(fresh_parts)
  saved = {name: shape for name, shape in saved.items() if _part(name) in parts}
  wanted = {name: shape for name, shape in wanted.items() if _part(name) in parts}
  _check_adapters(where, saved, wanted)
  adapters = [name for name in wanted if ADAPTER in name and name not in saved]
  grids = {n: saved[n] for n in GRIDS if n in saved and _is_other_grid(saved[n], wanted.get(n))}
  wrong = _differences(
    {n: s for n, s in saved.items() if n not in grids},
    {n: s for n, s in wanted.items() if n not in {*grids, *adapters}},
  )
  if wrong:
    raise CheckpointError(f"'{where}' does not fit this model: {'; '.join(wrong)}.")
  names = [name for name in wanted if name not in adapters]
  return Taken(where, names, grids, adapters, sorted(ours - parts))


def init_from(path: epath.PathLike, params: Any, *, fresh_parts: Collection[str] = ()) -> Any:
  """Returns `params` with what a checkpoint has of them, and logs what was taken and what was not.

  Raises:
    CheckpointError: see `check_init`.
  """
  fresh = to_names(params)
  taken = check_init(path, params, fresh_parts=fresh_parts)
  logging.info(
    "init_from '%s': loaded %d params; resized: %s; new adapters: %d",
    taken.where,
    len(taken.names),
    {n: f"{s[:2]} to {fresh[n].shape[:2]}" for n, s in taken.grids.items()} or "none",
    len(taken.adapters),
  )
  if taken.fresh:
    names = ", ".join(taken.fresh)
    logging.warning("init_from '%s': nothing is taken for %s: random params", taken.where, names)
  wanted = {name: fresh[name] for name in taken.names}
  for name, shape in taken.grids.items():
    x = wanted[name]
    wanted[name] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
  loaded = _restore(taken.where, wanted, read_checksums(taken.where.parent))
  for name in taken.grids:
    resize = jax.jit(resize_grid, static_argnums=1, out_shardings=fresh[name].sharding)
    loaded[name] = resize(loaded[name], fresh[name].shape[:2])
  return from_names(params, fresh | loaded)


def _check_adapters(
  where: epath.Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises CheckpointError if LoRA adapters that were trained have no place in a model."""
  lost = [name for name in saved if ADAPTER in name and saved[name] != wanted.get(name)]
  if lost:
    name = lost[0]
    ours = f"of shape {wanted[name]}" if name in wanted else "none"
    raise CheckpointError(
      f"'{where}' has LoRA adapters that this model lacks ({name} {saved[name]}; here {ours}): "
      f"what was trained would be lost. {MERGE}"
    )


def _is_other_grid(saved: tuple[int, ...], wanted: tuple[int, ...] | None) -> bool:
  return wanted is not None and saved != wanted and saved[2:] == wanted[2:]


def _part(name: str) -> str:
  return name.split(".")[0]


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path that Orbax can find from its own threads; `gs://` ones are whole already."""
  return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def to_names(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves by name, such as `decoder.units.layers.0.mlp.gate`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def from_names(like: Any, leaves: Mapping[str, Any]) -> Any:
  """Returns a tree of the structure of `like` with the leaves of `to_names`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], like)


def _name(path) -> str:
  parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
  return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def saved_shapes(item: epath.Path) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of an item's arrays by name; reads no array.

  Raises:
    CheckpointError: the item is missing or damaged.
  """
  try:
    with _quiet_once_failed(), ocp.StandardCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(item).item_metadata
      return {name: tuple(array.shape) for name, array in metadata.items()}
  except Exception as e:
    raise damaged(item, e) from e


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: tuple(x.shape) for name, x in arrays.items()}


def _differences(
  saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """Returns one line for each array that differs."""
  wrong = [f"{n} is {saved[n]}, not {s}" for n, s in wanted.items() if saved.get(n, s) != s]
  wrong += [f"{n} is missing" for n in wanted if n not in saved]
  return wrong + [f"{n} is not in this model" for n in saved if n not in wanted]


def check_match(saved: dict[str, tuple[int, ...]], wanted: dict[str, Any], where: Any) -> None:
  """Raises CheckpointError unless a checkpoint has exactly the arrays wanted, in their shapes."""
  wrong = _differences(saved, _shapes(wanted))
  if wrong:
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise CheckpointError(
      f"'{where}' is of another model or optimizer: {'; '.join(wrong[:SHOWN])}{more}. Use the "
      "config it was trained with, or start anew with train.init_from."
    )


def damaged(where: Any, error: BaseException) -> DamagedError:
  reason = str(error).splitlines()[0] if str(error) else ""
  return DamagedError(
    f"'{where}' cannot be read: {type(error).__name__}: {reason[:300]}. {_WAY_ON}"
  )


_WAY_ON = (
  "A run that is trained on goes back to the newest step that is whole; for all else give an older "
  "step's folder, or a copy of this one."
)


def _restore(
  where: epath.Path, wanted: dict[str, Any], recorded: Mapping[str, Any] | None
) -> dict[str, Any]:
  """Reads the arrays named in `wanted`, and no other, onto their shardings, and compares them.

  Args:
    where: the item they are of.
    wanted: abstract arrays, of any dtype.
    recorded: what `read_checksums` returned for the step.

  Raises:
    DamagedError: an array cannot be read or is not what was saved; on all processes alike.
  """
  if where.name == PARAMS:
    warn_of_changes(where.parent, recorded)
  arrays = {}
  saved = recorded[ARRAYS].get(where.name, {}) if recorded else {}
  for names in _groups(wanted, saved):
    # Checksums are of values in the dtype that they were saved in.
    like = {
      name: jax.ShapeDtypeStruct(
        wanted[name].shape,
        saved[name].dtype if name in saved else wanted[name].dtype,
        sharding=getattr(wanted[name], "sharding", None),
      )
      for name in names
    }
    group = _read_arrays(where, like)
    _compare(where, group, saved)
    arrays |= {name: x.astype(wanted[name].dtype) for name, x in group.items()}
  return arrays


def _groups(wanted: Mapping[str, Any], saved: Mapping[str, "_Array"]) -> Iterator[list[str]]:
  """Yields names to be read at once: all that keep their dtype, then others, some bytes of them."""
  others = [name for name in wanted if name in saved and saved[name].dtype != wanted[name].dtype]
  yield [name for name in wanted if name not in {*others}]
  group, size = [], 0
  for name in others:
    num_bytes = math.prod(wanted[name].shape) * np.dtype(saved[name].dtype).itemsize
    if group and size + num_bytes > CAST_AT_ONCE:
      yield group
      group, size = [], 0
    group, size = [*group, name], size + num_bytes
  if group:
    yield group


def _read_arrays(where: epath.Path, like: Mapping[str, Any]) -> dict[str, Any]:
  if not like:
    return {}
  arrays, error, like = {}, None, dict(like)
  args = ocp.args.PyTreeRestore(
    like,
    restore_args=ocp.checkpoint_utils.construct_restore_args(like),
    partial_restore=True,
  )
  try:
    with _quiet_once_failed():
      # The handler alone: a checkpointer would wait here for processes that could not read.
      arrays = ocp.PyTreeCheckpointHandler().restore(where, args=args)
  except Exception as e:
    error = str(damaged(where, e.__cause__ or e))
  _agree(error)
  return arrays


@contextlib.contextmanager
def _quiet_once_failed() -> Iterator[None]:
  """After a read that failed in the block, prints no failures of those that Orbax began with it.

  Orbax reads all arrays at once, and leaves the other reads to the garbage collector and to threads
  of TensorStore: their failures, which no code can catch, come later. So the hooks stay.
  """
  hooks = sys.unraisablehook, sys.excepthook

  def unraisable(failure: Any) -> None:
    is_read = "_read_array" in getattr(failure.object, "__qualname__", "")
    if not is_read and _LOOP_CLOSED not in str(failure.exc_value):
      hooks[0](failure)

  def uncaught(kind: Any, error: BaseException, traceback: Any) -> None:
    if _LOOP_CLOSED not in str(error):
      hooks[1](kind, error, traceback)

  sys.unraisablehook, sys.excepthook = unraisable, uncaught
  yield
  sys.unraisablehook, sys.excepthook = hooks


_LOOP_CLOSED = "Event loop is closed"


def _compare(where: epath.Path, arrays: Mapping[str, Any], saved: Mapping[str, "_Array"]) -> None:
  now = checksums({name: x for name, x in arrays.items() if name in saved})
  wrong = [name for name, value in now.items() if value != saved[name].checksum]
  if wrong:
    raise not_as_saved(where, wrong)


def not_as_saved(where: Any, names: list[str]) -> DamagedError:
  """Returns the error of arrays whose checksums differ from those that were saved with them."""
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  shown = ", ".join(names[:SHOWN])
  return DamagedError(
    f"'{where}' is not what was saved: checksums differ of {shown}{more}. {_WAY_ON}"
  )


_reads = itertools.count()  # each agreement has a name of its own; processes read in one order


def _agree(error: str | None) -> None:
  """Raises DamagedError on all processes if one has an error to tell."""
  for i, said in enumerate(distributed.everyone(f"checkpoint read {next(_reads)}", error)):
    if said is not None:
      raise DamagedError(said if jax.process_count() == 1 else f"process {i}: {said}")


# --- checksums of a step


class _Array(NamedTuple):
  shape: tuple[int, ...]
  dtype: str
  checksum: str


def _record(
  arrays: Mapping[str, Mapping[str, Any]], data: Any, files: Mapping[str, str]
) -> dict[str, Any]:
  """Returns the checksums of a step, as JSON.

  Args:
    arrays: by item and name.
    data: state of the pipeline; None without any.
    files: hashes of the run's files.
  """
  of_arrays = {}
  for item, tree in arrays.items():
    sums = checksums(tree)
    of_arrays[item] = {
      name: _Array(tuple(x.shape), str(x.dtype), sums[name]) for name, x in tree.items()
    }
  values = {
    "version": CHECKSUMS_VERSION,
    ARRAYS: of_arrays,
    DATA: _digest(data),
    FILES: dict(files),
  }
  return {**values, "sha256": _digest(values)}


def read_checksums(step: epath.Path) -> dict[str, Any] | None:
  """Returns the checksums of a step; None if it was saved without, or by another version.

  Raises:
    DamagedError: they cannot be read, or are not what was saved.
  """
  if not (step / CHECKSUMS).exists():
    return None
  values = _read_json(step / CHECKSUMS)
  try:
    if values.pop("sha256") != _digest(values):
      raise ValueError("its own checksum differs")
    if values["version"] != CHECKSUMS_VERSION:
      return None
    values[ARRAYS] = {
      item: {name: _Array(tuple(shape), *rest) for name, (shape, *rest) in tree.items()}
      for item, tree in values[ARRAYS].items()
    }
  except (KeyError, TypeError, ValueError) as e:
    raise damaged(step / CHECKSUMS, e) from e
  return values


def warn_of_changes(step: epath.Path, recorded: Mapping[str, Any] | None) -> None:
  """Logs what of a run has changed since a step was saved, or that this cannot be told."""
  if recorded is None:
    logging.warning("'%s' is read without checksums: what has changed is not seen", step)
  for line in changed_files(step, recorded):
    logging.warning("%s", line)


def changed_files(step: epath.Path, recorded: Mapping[str, Any] | None) -> Iterator[str]:
  """Yields a line for each file of the run that is not what it was when a step was saved."""
  workdir = step.parent.parent
  now = hash_files(workdir)
  for name, saved in recorded[FILES].items() if recorded else ():
    if now.get(name) != saved:
      yield (
        f"'{workdir / name}' is not what it was when step {step.name} was saved: it is damaged, or "
        "the run was started again with other settings"
      )


def changed_data(step: epath.Path, recorded: Mapping[str, Any] | None) -> Iterator[str]:
  """Yields a line if the data's state is not the one that was saved; it may have none."""
  if recorded is None or recorded[DATA] == _digest(None):
    return
  try:
    if recorded[DATA] != _digest(_read_json(step / DATA)):
      yield f"'{step / DATA}' is not what was saved: its checksum differs"
  except DamagedError as e:
    yield str(e)


def open_array(item: epath.Path, name: str) -> Any:
  """Opens an array of a step's item; returns TensorStore's, of which parts can be read."""
  base = item if "://" in str(item) else f"file://{item}"
  spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": str(base), "path": f"{name}/"}}
  return tensorstore.open(spec, open=True, read=True).result()


def _read_json(item: epath.Path) -> dict[str, Any]:
  """Returns an item that is JSON; raises DamagedError if it cannot be read."""
  try:
    values = json.loads((item / JSON_FILE).read_text())
    if not isinstance(values, dict):
      raise ValueError(f"a {type(values).__name__}, not a dict")
    return values
  except Exception as e:
    raise damaged(item, e) from e


def _digest(values: Any) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _free(folder: epath.Path, suffix: str) -> epath.Path:
  """Returns where a folder can be renamed to, so that none is overwritten."""
  names = (f"{folder.name}{suffix}{f'-{i}' if i else ''}" for i in itertools.count())
  return next(path for path in map(folder.with_name, names) if not path.exists())
