# SPDX-License-Identifier: Apache-2.0
"""Who owns a workdir: one run at a time, as two would tear each other's checkpoints.

A run's process 0 writes `owner.json` into the workdir, with its host and process, rewrites it every
`BEAT_SECONDS`, and removes it at its end. Commands that only read do not look at it.

A run that was killed leaves the file there. On the same host it counts no longer once its process
is gone; of another host, once the file has not been rewritten for `STALE_SECONDS`, watched by this
host's clock. A local file is made so that only one of two can make it. Object stores have no such
call: there the file is written, and read again after `SETTLE_SECONDS`; whoever wrote last has it.
What is left is a store that answers a write later than that; a run that finds another's name in the
file at a beat ends.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import psutil
from absl import logging
from etils import epath

from mm1_jax import distributed
from mm1_jax.config import UserError

OWNER = "owner.json"
BEAT_SECONDS = 15.0
STALE_SECONDS = 60.0
OLD_SECONDS = 600.0  # by the writer's clock; then nothing is watched, clocks being closer than that
SETTLE_SECONDS = 3.0
WATCH_SECONDS = 1.0  # between looks at another's file


class WorkdirInUse(UserError):
  """Another run has the workdir, or it cannot be written."""


@dataclasses.dataclass(frozen=True)
class Owner:
  """A run's process 0."""

  host: str
  place: str  # boot and process namespace: where `pid` means something
  pid: int
  begun: float  # of the process, by the host's clock
  since: str  # when it took the workdir
  token: str  # another one each time

  @classmethod
  def me(cls) -> "Owner":
    process = psutil.Process()
    return cls(
      host=socket.gethostname(),
      place=_place(),
      pid=process.pid,
      begun=process.create_time(),
      since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
      token=uuid.uuid4().hex,
    )

  @property
  def has_ended(self) -> bool | None:
    """Whether its process is gone; None where that cannot be seen from here."""
    if (self.host, self.place) != (socket.gethostname(), _place()):
      return None
    try:
      return abs(psutil.Process(self.pid).create_time() - self.begun) > 2.0
    except psutil.NoSuchProcess:
      return True

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}, since {self.since}"


def _place() -> str:
  """Returns what differs between boots and containers; "" where the system does not tell."""
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  return ""


@contextlib.contextmanager
def owning(workdir: epath.PathLike) -> Iterator["Lock"]:
  """Owns a workdir for the block, on process 0 for all.

  Raises:
    WorkdirInUse: another run owns it, or it cannot be written.
  """
  lock = Lock(epath.Path(workdir) / OWNER)
  if jax.process_index() != 0:
    yield lock
    return
  try:
    lock.take()
  except OSError as e:
    raise WorkdirInUse(
      f"--workdir '{workdir}' cannot be written: {type(e).__name__}: {e}. Give another one, or the "
      "right to write there."
    ) from e
  done = threading.Event()
  beat = threading.Thread(target=_beat, args=(lock, done), name="owner of the workdir", daemon=True)
  beat.start()
  try:
    with distributed.before_exit(lock.give_back):
      yield lock
  finally:
    done.set()
    lock.give_back()


def _beat(lock: "Lock", done: threading.Event) -> None:
  told = False
  while not (lock.lost or done.wait(BEAT_SECONDS)):
    try:
      lock.beat()
    except OSError as e:
      if not told:
        logging.warning("%s cannot be rewritten (%s): another host may take it over", lock.path, e)
        told = True


class Lock:
  """The file that names a workdir's owner; see the module.

  Attributes:
    lost: who has taken it over, as found at a beat.
  """

  def __init__(self, path: epath.Path):
    self.path, self._me, self._beats = path, Owner.me(), 0
    self.lost: Owner | None = None
    self._store = "://" in str(path)
    self._given_back = False
    self._lock = threading.Lock()  # of the beat and of giving back

  def take(self) -> None:
    """Raises WorkdirInUse if another run has it, after waiting for a sign of life where need be."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    found = self._read()
    if found is not None:
      self._wait_for_its_end(found)
    if self._store:
      self.path.write_text(self._text())
      time.sleep(SETTLE_SECONDS)
      self._check_mine()
    else:
      with self._alone():
        if found is not None:
          self._remove(found)
        self._make()

  def check(self) -> None:
    """Raises WorkdirInUse if another run has taken it over; reads no file."""
    if self.lost:
      raise WorkdirInUse(
        f"another run has taken the workdir '{self.path.parent}' over: {self.lost}. This one had "
        f"not written {self.path.name} for {STALE_SECONDS:.0f} s; it ends without a save."
      )

  def beat(self) -> None:
    """Rewrites the file, unless it names another owner."""
    with self._lock:
      if self._given_back:
        return
      owner = _owner(self._read())
      if owner is not None and owner.token != self._me.token:
        self.lost = owner
        return
      self._beats += 1
      if self._store:
        self.path.write_text(self._text())
      else:
        new = self.path.with_name(f"{self.path.name}.{self._me.token}")
        new.write_text(self._text())  # a full disk must not leave an empty file
        new.replace(self.path)

  def give_back(self) -> None:
    """Removes the file, if it is this run's."""
    with self._lock:
      if self._given_back:
        return
      self._given_back = True
      with contextlib.suppress(OSError):
        owner = _owner(self._read())
        if owner is not None and owner.token == self._me.token:
          self.path.unlink()

  def _text(self) -> str:
    values = dataclasses.asdict(self._me) | {"beats": self._beats, "beat": time.time()}
    return json.dumps(values) + "\n"

  def _read(self) -> str | None:
    try:
      return self.path.read_text()
    except FileNotFoundError:
      return None

  def _make(self) -> None:
    """Makes the local file, unless it is there."""
    try:
      descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
      self._refuse(_owner(self._read()))
    with open(descriptor, "w") as file:
      file.write(self._text())

  @contextlib.contextmanager
  def _alone(self) -> Iterator[None]:
    """Lets one run at a time remove a local file and make its own: of two, the second would remove
    the first one's. The kernel holds the lock, so none is left by a run that is killed."""
    folder = os.open(self.path.parent, os.O_RDONLY)
    try:
      with contextlib.suppress(OSError):  # of file systems that have none
        fcntl.flock(folder, fcntl.LOCK_EX)
      yield
    finally:
      os.close(folder)

  def _remove(self, found: str) -> None:
    """Removes the local file of a run that has ended, unless another has taken its place."""
    now = self._read()
    if now is not None and now != found:
      self._refuse(_owner(now))
    if now is not None:
      self.path.unlink()

  def _wait_for_its_end(self, found: str) -> None:
    """Returns when the file counts no longer; raises WorkdirInUse when its owner lives."""
    owner = _owner(found)
    ended = owner.has_ended if owner else None
    if ended is False:
      self._refuse(owner)
    if ended or time.time() - _beat_time(found) > OLD_SECONDS:
      logging.info("the workdir's last owner has ended without giving it back: %s", owner)
      return
    logging.info(
      "the workdir is owned by %s; watching for %.0f s whether it lives",
      *(owner or "a damaged file", STALE_SECONDS),
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
      time.sleep(WATCH_SECONDS)
      now = self._read()
      if now is None:
        return  # given back
      if now != found:
        self._refuse(_owner(now))

  def _check_mine(self) -> None:
    owner = _owner(self._read())
    if owner is None or owner.token != self._me.token:
      self._refuse(owner)

  def _refuse(self, owner: Owner | None) -> None:
    raise WorkdirInUse(
      f"another run has the workdir '{self.path.parent}': {owner or 'by a damaged file'}. Wait for "
      f"its end or stop it (kill {owner.pid if owner else 'PID'}, on its host), or give another "
      f"--workdir. If you know that it has ended, remove {self.path}."
    )


def _owner(text: str | None) -> Owner | None:
  """Returns the owner that a file names, None if it names none or is damaged."""
  try:
    values: dict[str, Any] = json.loads(text or "")
    owner = Owner(**{f.name: values[f.name] for f in dataclasses.fields(Owner)})
    return owner if isinstance(owner.pid, int) and isinstance(owner.begun, int | float) else None
  except (ValueError, KeyError, TypeError):
    return None


def _beat_time(text: str) -> float:
  try:
    return float(json.loads(text)["beat"])
  except (ValueError, KeyError, TypeError):
    return time.time()
