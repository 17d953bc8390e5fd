# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a program starts: one line, at once.

Starting is importing, for seconds. A KeyboardInterrupt that is raised in an import may end in a
library's `except`, or in native code that crashes of it; and nothing is there yet to be put away.
"""

import os
import signal
import sys
import threading
import types

CODE = 130  # as shells have it
LINE = "stopped by Ctrl-C"
COMMAND = "mm1"  # the console command


def watch() -> None:
  """Ends the process at Ctrl-C while a module is imported; later it is a KeyboardInterrupt."""
  if threading.current_thread() is not threading.main_thread():
    return
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_or_raise)


def is_program() -> bool:
  """Returns whether this package is imported to run one of its programs: `python -m`, or `mm1`."""
  return os.path.basename(sys.argv[0] if sys.argv else "") in ("-m", COMMAND)


def _end_or_raise(number: int, frame: types.FrameType | None) -> None:
  inner = frame
  while frame is not None:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      os.write(2, f"{LINE}\n".encode())
      os._exit(CODE)
    frame = frame.f_back
  signal.default_int_handler(number, inner)
