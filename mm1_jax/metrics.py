# SPDX-License-Identifier: Apache-2.0
"""What a run reports about itself: numbers on disk, speed, memory.

`legend.py` has the names, units and meaning of all scalars and tables.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import directory_check

from mm1_jax.chips import PEAK_FLOPS

Event, SessionLog = event_pb2.Event, event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
# It warns at every NaN, which TensorBoard shows well: a source that a batch has nothing of has one.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)

FILE, SEGMENTS = "metrics.jsonl", "metrics"  # in the workdir
READERS = 16  # files of a log that are read at once: an object store takes a while for each
HELD_BYTES = 16 << 20  # of lines that wait for a disk that takes none
HISTOGRAM_BINS = 30
BOARD_EVENTS = 20_000  # that wait for TensorBoard's files; more are left out
BOARD_FLUSH_SECONDS = 120.0
BOARD_CLOSE_SECONDS = 10.0  # for what waits at the end


class MetricWriter:
  """Writes TensorBoard events and JSON lines under a workdir.

  A line is `{"step", "time", "values"}`, or has `texts` or `tables` instead of `values`, or is an
  `event` of the run: "first step", "saved", "evaluated", "ended" (`goodput.py` reads these);
  numbers that JSON cannot express are the strings "nan", "inf", "-inf". Each writer begins with a
  line `{"step", "time", "resumed": true, "launched"}`: what earlier attempts wrote past that step
  no longer counts. Only process 0 writes.

  No write ends a run. Lines that the disk does not take are kept, up to `HELD_BYTES`, and written
  with the next ones; TensorBoard's files are written by a thread (see `_Board`). Either failure is
  told once, and what was lost is told at the end.

  A local workdir has one file, `metrics.jsonl`, which grows with every call. Files of an object
  store cannot grow: there each `flush` writes the lines since the last one as a new segment,
  `metrics/00000.jsonl` and so on, which is never written again. Segments are newer than the file,
  so in a local workdir that has some each writer adds one more.
  """

  def __init__(
    self, workdir: epath.PathLike, *, start_step: int = 0, launched: float | None = None
  ):
    """Opens the files of `workdir`, which is made if missing, to continue from `start_step`.

    Args:
      workdir: of the run.
      start_step: the step that is resumed at.
      launched: when the command was, by `time.time()`; now if not given.
    """
    self.workdir, self._board = epath.Path(workdir), None
    self._pending, self._cut, self._lost_lines, self._told = "", False, 0, False
    self._lock = threading.Lock()  # a thread may flush on the way to the process's end
    if jax.process_index() != 0:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._appends = can_append(self.workdir)
    self._path, self._segments = self.workdir / FILE, self.workdir / SEGMENTS
    if not self._appends or self._segments.exists():
      self._segments.mkdir(exist_ok=True)
      self._path = self._next_segment()
    elif self._path.exists() and not self._path.read_text().endswith("\n"):
      self._cut = True  # an earlier attempt was cut off in the middle of a line
    self._board = _Board(self.workdir / "tensorboard", start_step)
    begun = {"resumed": True, "launched": round(launched or time.time(), 3)}
    self._write_line(start_step, begun)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes numbers: Python's, numpy's or JAX arrays of one element."""
    if self._board is None:
      return
    values = {name: float(np.asarray(value).item()) for name, value in scalars.items()}
    for name, value in values.items():
      self._board.add(step, summary.scalar, name, value)
    self._write_line(step, {"values": {name: _to_json(v) for name, v in values.items()}})

  def write_tables(self, step: int, tables: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of two dims, whole (to five digits), and their histograms to TensorBoard."""
    if self._board is None:
      return
    for name, table in tables.items():
      self._board.add(step, summary.histogram, name, np.array(table), HISTOGRAM_BINS)
    rounded = {
      name: [[_to_json(float(f"{value:.5g}")) for value in row] for row in table]
      for name, table in tables.items()
    }
    self._write_line(step, {"tables": rounded})

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes pictures, each `uint8[H, W, 3]`, to TensorBoard."""
    if self._board is None:
      return
    for name, image in images.items():
      self._board.add(step, functools.partial(summary.image, dataformats="HWC"), name, image)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts to TensorBoard (as Markdown) and as a line."""
    if self._board is None:
      return
    for name, text in texts.items():
      self._board.add(step, summary.text, name, text)
    self._write_line(step, {"texts": dict(texts)})

  def write_event(self, step: int, event: str, **values: Any) -> None:
    """Writes what happened to the run: "first step", "saved", "evaluated", "ended"."""
    if self._board is not None:
      self._write_line(step, {"event": event, **values})

  def flush(self) -> None:
    """Puts all lines written so far where other processes can read them; asks the board to."""
    if self._board is None:
      return
    with self._lock:
      if self._pending:
        self._put(end_segment=True)
    self._board.flush()

  def close(self) -> None:
    """Flushes and lets go of the files; the writer must not be used again."""
    if self._board is None:
      return
    self.flush()
    self._board.close()
    self._board = None
    lost = self._lost_lines + self._pending.count("\n")
    if lost:
      absl_logging.warning("%d lines of metrics could not be written to %s", lost, self._path)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _write_line(self, step: int, content: dict[str, Any]) -> None:
    line = {"step": int(step), "time": round(time.time(), 3), **content}
    with self._lock:
      self._pending += json.dumps(line, allow_nan=False) + "\n"
      if self._appends:
        self._put()

  def _put(self, *, end_segment: bool = False) -> None:
    """Writes the lines that wait, or keeps them where that fails."""
    try:
      if self._appends:
        with self._path.open("a") as f:
          f.write("\n" * self._cut + self._pending)
      else:
        self._path.write_text(self._pending)
      self._pending, self._cut = "", False
      if end_segment and not self._appends:
        self._path = self._next_segment()
    except OSError as e:
      self._hold(e)

  def _hold(self, error: OSError) -> None:
    if not self._told:
      absl_logging.warning("metrics wait: %s cannot be written (%s)", self._path, error)
      self._told = True
    while len(self._pending) > HELD_BYTES:
      _, _, self._pending = self._pending.partition("\n")
      self._lost_lines += 1
    self._cut = True  # a part may be in the file, without its end of line

  def _next_segment(self) -> epath.Path:
    numbers = [int(path.stem) for path in segments(self._segments)]
    return self._segments / f"{max(numbers, default=-1) + 1:05d}.jsonl"


class _Board:
  """TensorBoard's files, written by a thread with a bounded queue.

  A disk that is full, or that never answers, costs the run one warning and no time: what the queue
  cannot take, or comes after a failed write, is left out, counted, and told by `close`.
  """

  def __init__(self, folder: epath.Path, start_step: int):
    self._folder, self._start_step, self._lost, self._told = folder, start_step, 0, False
    self._waiting: queue.Queue[Any] = queue.Queue(BOARD_EVENTS)
    self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
    self._thread.start()

  def add(self, step: int, make: Callable[..., Any], *args: Any) -> None:
    """Takes a summary, `make(*args)`."""
    self._ask((int(step), time.time(), make, args))

  def flush(self) -> None:
    """Has all so far written soon; does not wait."""
    self._ask("flush")

  def close(self) -> None:
    """Waits a while for what is left, and tells how much was left out."""
    self._ask("close")
    self._thread.join(BOARD_CLOSE_SECONDS)
    lost = self._lost + (self._waiting.qsize() if self._thread.is_alive() else 0)
    if lost:
      absl_logging.warning("TensorBoard's files in %s lack about %d entries", self._folder, lost)

  def _ask(self, what: Any) -> None:
    try:
      self._waiting.put_nowait(what)
    except queue.Full:
      self._lose("its disk does not answer", num=isinstance(what, tuple))

  def _lose(self, reason: Any, num: int = 0) -> None:
    self._lost += num
    if not self._told:
      self._told = True
      absl_logging.warning(
        "TensorBoard's files in %s lack entries (%s); the run continues, and its numbers are in %s",
        *(self._folder, reason, FILE),
      )

  def _run(self) -> None:
    try:
      self._write(self._open())
    except Exception as e:  # also of the library's own code: none may end a run
      self._lose(f"{type(e).__name__}: {e}")
      while (what := self._waiting.get()) != "close":
        self._lost += isinstance(what, tuple)

  def _open(self) -> EventsWriter:
    directory_check(str(self._folder))
    # Not `SummaryWriter`: its own thread dies of an error, and the next write to it waits for ever.
    writer = EventsWriter(os.path.join(str(self._folder), "events"))
    if self._start_step:
      # TensorBoard hides what it has seen past this step: the first one still to come.
      for content in (
        {"file_version": "brain.Event:2"},
        {"session_log": SessionLog(status=SessionLog.START)},
      ):
        writer.write_event(Event(step=self._start_step + 1, **content))
    return writer

  def _made(self, make: Callable[..., Any], *args: Any) -> Any:
    """Returns a summary, None where there is none of such values, such as a histogram of NaN."""
    try:
      return make(*args)
    except Exception:
      self._lost += 1
      return None

  def _write(self, writer: EventsWriter) -> None:
    flushed = time.monotonic()
    while True:
      try:
        what = self._waiting.get(timeout=BOARD_FLUSH_SECONDS)
      except queue.Empty:
        what = "flush"
      if what == "close":
        writer.close()
        return
      if what != "flush":
        step, at, make, args = what
        if (content := self._made(make, *args)) is not None:
          writer.write_event(Event(step=step, wall_time=at, summary=content))
      if what == "flush" or time.monotonic() - flushed > BOARD_FLUSH_SECONDS:
        writer.flush()
        flushed = time.monotonic()


def can_append(path: epath.PathLike) -> bool:
  """Returns whether files below `path` can grow, which those of object stores cannot."""
  return "://" not in str(path)


def segments(folder: epath.Path) -> list[epath.Path]:
  """Returns the segments in a folder, oldest first; none where there is no folder."""
  paths = folder.iterdir() if folder.exists() else ()
  return sorted(p for p in paths if p.suffix == ".jsonl" and p.stem.isdigit())


def read_metrics(workdir: epath.PathLike) -> dict[str, dict[int, float]]:
  """Returns `{name: {step: value}}` of a workdir, steps in order; {} where nothing was written.

  The last value written for a step counts. Values past the step that a later attempt resumed from
  are left out, and so are lines cut off by a crash (with a warning).
  """
  return _read(workdir, "values", float)


def read_tables(workdir: epath.PathLike) -> dict[str, dict[int, np.ndarray]]:
  """Returns `{name: {step: table}}` of a workdir, as `read_metrics` does numbers."""
  return _read(workdir, "tables", lambda rows: np.array(rows, np.float64))


def _read(workdir: epath.PathLike, kind: str, parse: Callable[[Any], Any]) -> dict[str, Any]:
  series: dict[str, dict[int, Any]] = collections.defaultdict(dict)
  for line in read_lines(workdir):
    if line.get("resumed"):
      for values in series.values():
        for step in [s for s in values if s > line["step"]]:
          del values[step]
    for name, value in line.get(kind, {}).items():
      series[name][line["step"]] = parse(value)
  return {name: dict(sorted(values.items())) for name, values in series.items() if values}


def read_events(workdir: epath.PathLike, step: int) -> list[dict[str, Any]]:
  """Returns the events of a step that count, such as its evaluations; see `MetricWriter`."""
  found: list[dict[str, Any]] = []
  for line in read_lines(workdir):
    if line.get("resumed") and line["step"] < step:
      found = []  # what was taken back
    if "event" in line and line["step"] == step:
      found.append(line)
  return found


def read_lines(workdir: epath.PathLike) -> Iterator[dict[str, Any]]:
  """Yields the lines of all attempts, oldest first, also those that no longer count."""
  workdir = epath.Path(workdir)
  file = workdir / FILE
  paths = [*([file] if file.exists() else []), *segments(workdir / SEGMENTS)]
  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    texts = pool.map(lambda path: path.read_text(), paths)
    for path, text in zip(paths, texts, strict=True):
      yield from _parsed(path, text)


def _parsed(path: epath.Path, content: str) -> Iterator[dict[str, Any]]:
  """Yields the whole lines of a file."""
  for number, text in enumerate(content.splitlines(), start=1):
    if not text:
      continue
    try:
      line = json.loads(text)
    except json.JSONDecodeError:
      logging.warning("%s:%d is not a whole line of JSON; left out.", path, number)
    else:
      yield line


def _to_json(value: float) -> float | str:
  return value if math.isfinite(value) else str(value)


def load_scalars(load: np.ndarray) -> dict[str, float]:
  """Returns what is logged of the experts' load at each line.

  Of `load[U, E]`, U sparse layers and E experts, 1 where it is even:
    moe/load_min, moe/load_max  of the experts of all layers
    moe/load_entropy            entropy of a layer's shares over that of an even load, log E; mean
                                over the layers: 1 is even, 0 is one expert alone
    moe/dead_experts            how many experts no token chose
  """
  shares = load / load.shape[1]
  entropies = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=1)
  even = math.log(load.shape[1])
  return {
    "moe/load_min": float(load.min()),
    "moe/load_max": float(load.max()),
    "moe/load_entropy": float(np.mean(entropies)) / even if even else 1.0,
    "moe/dead_experts": float(np.sum(load == 0)),
  }


def mfu(flops: float, seconds: float, devices: Sequence[Any] | None = None) -> float | None:
  """Returns model FLOPs utilisation in [0, 1]: `flops` done in `seconds` over the devices' peak.

  `devices` are all that share the work, `jax.devices()` if not given. None where the peak of a
  device's kind is not in `chips.PEAK_FLOPS`, as for a CPU.
  """
  kinds = [d.device_kind for d in (jax.devices() if devices is None else devices)]
  if any(kind not in PEAK_FLOPS for kind in kinds):
    return None
  return flops / seconds / sum(PEAK_FLOPS[kind] for kind in kinds)


@dataclasses.dataclass(frozen=True)
class Rates:
  """Speed over the timer's window."""

  step_seconds: float
  tokens_per_second: float
  images_per_second: float
  data_wait: float  # share of the time that the step waited for its batch
  mfu: float | None

  def scalars(self) -> dict[str, float]:
    """Returns the rates under their metric names, `speed/...`, without what is unknown."""
    values = {f"speed/{name}": value for name, value in dataclasses.asdict(self).items()}
    return {name: value for name, value in values.items() if value is not None}


class StepTimer:
  """Measures steps over a moving window.

  Call `tick` when a step's results are there. The first tick only starts the clock, so the first
  step, which compiles, is in no rate; wrap evaluation and saving in `excluded`.
  """

  def __init__(
    self,
    *,
    flops: Callable[[float], float] | None = None,
    devices: Sequence[Any] | None = None,
    window: int = 50,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Measures over the last `window` steps; `flops` of a step give the MFU.

    Args:
      flops: of a step with so many pictures, in which they are linear (`models.flops.model_flops`).
      devices: that share the work, `jax.devices()` if not given.
      window: steps.
      clock: seconds.
    """
    self._flops, self._devices, self._clock = flops, devices, clock
    self._steps: collections.deque[np.ndarray] = collections.deque(maxlen=window)
    self._last: float | None = None

  def tick(self, *, tokens: int = 0, images: int = 0, data_wait: float = 0.0) -> None:
    """Ends a step that had so many real tokens and images and waited `data_wait` s for data."""
    now = self._clock()
    if self._last is not None:
      self._steps.append(np.array([now - self._last, tokens, images, data_wait]))
    self._last = now

  @contextlib.contextmanager
  def excluded(self) -> Iterator[None]:
    """Stops the clock inside the block."""
    begin = self._clock()
    try:
      yield
    finally:
      if self._last is not None:
        self._last += self._clock() - begin

  @property
  def rates(self) -> Rates | None:
    """The speed over the window, or None before two ticks."""
    if not self._steps:
      return None
    seconds, tokens, images, waited = np.sum(self._steps, axis=0)
    seconds = max(float(seconds), 1e-9)
    step_seconds, images_a_step = seconds / len(self._steps), float(images) / len(self._steps)
    return Rates(
      step_seconds=step_seconds,
      tokens_per_second=float(tokens) / seconds,
      images_per_second=float(images) / seconds,
      data_wait=min(1.0, float(waited) / seconds),
      mfu=mfu(self._flops(images_a_step), step_seconds, self._devices) if self._flops else None,
    )


def progress_line(
  step: int, num_steps: int, scalars: Mapping[str, float], rates: Rates | None
) -> str:
  """Returns one line on a run's progress.

  Of `scalars` it shows `loss`, `lr`, `grad_norm`, `skipped`, and, where a line's steps had them,
  what a save and the start took, those that are there:
  `step    40/300 (13%) | loss 5.123 | lr 2.1e-04 | grad 0.91 | 0.52 s/step | 15.7k tok/s |
  61 img/s | MFU - | data wait 3% | skipped 0 | ETA 2m14s`
  """
  width = len(str(num_steps)) + 2
  parts = [f"step {step:>{width}}/{num_steps} ({100 * step // num_steps}%)"]
  for name, text in (("loss", "loss {:.3f}"), ("lr", "lr {:.1e}"), ("grad_norm", "grad {:.2f}")):
    if name in scalars:
      parts.append(text.format(float(scalars[name])))
  if rates is None:
    parts.append("first step")
  else:
    share = "-" if rates.mfu is None else f"{rates.mfu:.1%}"
    parts += [
      f"{rates.step_seconds:.2f} s/step",
      f"{_short(rates.tokens_per_second)} tok/s",
      f"{_short(rates.images_per_second)} img/s",
      f"MFU {share}",
      f"data wait {rates.data_wait:.0%}",
    ]
  if "speed/save_seconds" in scalars:
    parts.append(f"save {scalars['speed/save_seconds']:.2f} s")
  if "speed/start_seconds" in scalars:
    started, compiled = scalars["speed/start_seconds"], scalars["speed/compile_seconds"]
    parts.append(f"start {format_seconds(started)}, of it compiling {format_seconds(compiled)}")
  if "skipped" in scalars:
    parts.append(f"skipped {int(scalars['skipped'])}")
  if rates is not None:
    parts.append(f"ETA {format_seconds(max(0, num_steps - step) * rates.step_seconds)}")
  return " | ".join(parts)


def format_seconds(seconds: float) -> str:
  """Returns a duration as its two largest units: 9s, 2m14s, 3h05m, 12d04h."""
  total = round(seconds)
  if total < 60:
    return f"{total}s"
  if total < 3600:
    return f"{total // 60}m{total % 60:02d}s"
  if total < 86400:
    return f"{total // 3600}h{total % 3600 // 60:02d}m"
  return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def _short(value: float) -> str:
  """Returns a count with at most three digits and a k, M or G."""
  for unit in ("", "k", "M"):
    if value < 999.5:
      return f"{value:.3g}{unit}"
    value /= 1000
  return f"{value:.3g}G"


def peak_memory_gib() -> float:
  """Returns the peak of memory so far in GiB: the fullest local device's, else this process's."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
  if peaks:
    return max(peaks) / 2**30
  rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return rss * (1 if sys.platform == "darwin" else 1024) / 2**30
