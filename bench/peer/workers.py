# SPDX-License-Identifier: Apache-2.0
"""Two programs that do the same work by turns, in one run: ours and a peer's.

Each is a process of its own, with the same number of threads, and answers lines of JSON on its
standard input with lines of JSON: `{"do": "steps", "num": 5}` with `{"seconds": [...]}`.
"""

import json
import os
import subprocess
import sys
from typing import Any


class Worker:
  """A process that answers requests, one at a time."""

  def __init__(self, *command: str, python: str = sys.executable, threads: int | None = None):
    """Starts `python -m ...`, with `threads` threads for its arithmetic."""
    environment = dict(os.environ)
    if threads:
      names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
      environment |= dict.fromkeys(names, str(threads))
    self._process = subprocess.Popen(
      [python, "-m", *command],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )

  def ask(self, **request: Any) -> dict[str, Any]:
    """Returns the answer; raises RuntimeError if the process has ended instead."""
    assert self._process.stdin
    assert self._process.stdout
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    for line in self._process.stdout:
      if line.startswith("{"):  # libraries print, too
        return json.loads(line)
    raise RuntimeError(f"the worker ended with code {self._process.wait()}; see above.")

  def close(self) -> None:
    assert self._process.stdin
    self._process.stdin.close()
    self._process.wait()


def answer(handlers: dict[str, Any]) -> None:
  """Answers requests until there are none: `handlers[do](**others)` returns the answer."""
  for line in sys.stdin:
    request = json.loads(line)
    result = handlers[request.pop("do")](**request)
    print(json.dumps(result), flush=True)


def by_turns(workers: dict[str, Worker], turns: int, **request: Any) -> dict[str, list[float]]:
  """Returns the seconds that each worker took, asking them by turns."""
  seconds: dict[str, list[float]] = {name: [] for name in workers}
  for _ in range(turns):
    for name, worker in workers.items():
      seconds[name] += worker.ask(**request)["seconds"]
  return seconds
