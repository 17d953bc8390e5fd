# SPDX-License-Identifier: Apache-2.0
"""Folders that have their name only when they are whole.

Until then they are NAME.unfinished, which goes away with whatever ends the work: an error, Ctrl-C,
or a signal that asks a program to end.
"""

import contextlib
import pathlib
import shutil
import signal
import threading
import types
from collections.abc import Iterator
from typing import NoReturn

from mm1_jax.convert import ConvertError

SUFFIX = ".unfinished"
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the folder to write to, and gives it its name when the block is done.

  Raises:
    ConvertError: `out` is not empty, or no folder; or there is an unfinished one of its name.
  """
  refuse(out)
  working = _working(out)
  with _signals_raise():
    working.mkdir(parents=True)
    try:
      yield working
      if out.exists():
        out.rmdir()
      working.rename(out)
    except BaseException:
      shutil.rmtree(working, ignore_errors=True)
      raise


def refuse(out: pathlib.Path) -> None:
  """Raises ConvertError where `folder` would, before anything is computed."""
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ConvertError(f"'{out}' is there already; name another --out.")
  if _working(out).exists():
    raise ConvertError(f"'{_working(out)}' is left of one that was cut off; delete it.")


def _working(out: pathlib.Path) -> pathlib.Path:
  return out.with_name(out.name + SUFFIX)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
  """Lets a signal to end unwind the stack, as Ctrl-C does."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {number: signal.getsignal(number) for number in SIGNALS}

  for number in SIGNALS:
    signal.signal(number, _end)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _end(number: int, frame: types.FrameType | None) -> NoReturn:
  del frame
  for other in SIGNALS:
    signal.signal(other, signal.SIG_IGN)  # while the folder is taken away
  raise SystemExit(128 + number)
