# SPDX-License-Identifier: Apache-2.0
"""A visitor of the web page who speaks to it as a browser does, or worse."""

import contextlib
import json
import pathlib
import random
import string
import time
from typing import Any, NamedTuple

from tests.drill import runs
from tests.drill.core import Lab, NotRun, Scene
from tests.drill.process import Process

STARTS_WITHIN = 180  # seconds


class Answer(NamedTuple):
  """What came of a request."""

  kind: str  # "answered", "refused" (a message for the visitor), "error", or "nothing" in time
  text: str
  seconds: float


class Site(NamedTuple):
  """The page at work, and how its events are called."""

  process: Process
  url: str
  begin: int
  answer: int
  folder: pathlib.Path  # of uploads


def site(scene: Scene) -> Site:
  """Returns the page, of the reference run's model; it is started where it is not at work."""
  here = scene.lab.once("site", lambda folder: _serve(scene.lab, folder))
  if here.process.ended():
    scene.lab.forget("site")
    return site(scene)
  return here


def leave(lab: Lab, here: Site) -> None:
  """Ends the page: a request may still keep it busy."""
  here.process.kill()
  lab.forget("site")


def _serve(lab: Lab, folder: pathlib.Path) -> Site:
  import socket

  try:
    import gradio  # noqa: F401
    import httpx
  except ImportError as e:
    raise NotRun(f"the page needs {e.name}") from e
  import sys

  model = runs.reference(lab)
  folder = folder.with_name(f"site-{time.monotonic_ns()}")
  folder.mkdir()
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "mm1_jax.inference.app", f"--checkpoint={model}"]
  env = {"GRADIO_TEMP_DIR": str(folder / "uploads"), "GRADIO_ANALYTICS_ENABLED": "False"}
  flags = [f"--port={port}", "--max-new-tokens=8"]
  process = lab.start([*command, *flags], folder / "site.log", env)
  url = f"http://127.0.0.1:{port}"
  while True:
    if process.ended() or time.monotonic() > process.begun + STARTS_WITHIN:
      process.kill()
      raise RuntimeError(f"the page did not come: {process.text[-2000:]}")
    with contextlib.suppress(httpx.HTTPError):
      config = httpx.get(f"{url}/config", timeout=30).json()
      break
    time.sleep(0.1)
  # The submission's event takes visit, message and instructions; the answer's visit and settings.
  events = config["dependencies"]
  begin = next(e["id"] for e in events if any(t[1] == "submit" for t in e["targets"]))
  answer = next(e["id"] for e in events if len(e["inputs"]) == 4)
  return Site(process, url, begin, answer, folder)


class Visitor:
  """One session.

  Args:
    within: seconds that a request may take.
  """

  def __init__(self, here: Site, dice: random.Random, within: float = 30):
    import httpx

    self.site, self.within = here, within
    self.session = "".join(dice.choices(string.ascii_lowercase, k=11))
    self.http = httpx.Client(timeout=httpx.Timeout(within), trust_env=False)

  def ask(self, text: Any, files: Any = (), system: Any = "", settings: Any = (0.0, 1.0, 4)):
    """Sends a message, and asks for its answer; returns how that went, of both together."""
    begun = time.monotonic()
    message = {"text": text, "files": list(files)}
    taken = self.call(self.site.begin, [None, message, system])
    if taken.kind == "answered":
      taken = self.call(self.site.answer, [None, *settings])
    return taken._replace(seconds=time.monotonic() - begun)

  def call(self, event: int, data: list[Any]) -> Answer:
    import httpx

    begun = time.monotonic()
    body = {"data": data, "event_data": None, "fn_index": event, "session_hash": self.session}
    try:
      kind, text = self._call(json.dumps(body, allow_nan=True), begun)
    except (httpx.TimeoutException, TimeoutError):
      kind, text = "nothing", f"no answer in {self.within:.0f} s"
    except (httpx.HTTPError, json.JSONDecodeError) as e:
      kind, text = "error", f"{type(e).__name__}: {e}"
    return Answer(kind, text, time.monotonic() - begun)

  def _call(self, body: str, begun: float) -> tuple[str, str]:
    headers = {"content-type": "application/json"}
    joined = self.http.post(f"{self.site.url}/gradio_api/queue/join", content=body, headers=headers)
    if joined.status_code != 200:
      return "refused" if joined.status_code < 500 else "error", joined.text[:300]
    event = joined.json()["event_id"]
    query = {"session_hash": self.session}
    with self.http.stream("GET", f"{self.site.url}/gradio_api/queue/data", params=query) as stream:
      for line in stream.iter_lines():
        if time.monotonic() > begun + self.within:
          raise TimeoutError
        if not line.startswith("data:"):
          continue
        message = json.loads(line[len("data:") :])
        if message.get("event_id") not in (None, event):
          continue
        if message["msg"] == "process_completed":
          output = message.get("output") or {}
          if message["success"]:
            return "answered", json.dumps(output.get("data"))[:300]
          return ("refused" if output.get("error") else "error"), str(output.get("error"))[:300]
        if message["msg"] in ("close_stream", "unexpected_error", "server_stopped", "queue_full"):
          return "error", json.dumps(message)[:300]
    return "error", "the stream ended"

  def upload(self, name: str, data: bytes) -> tuple[int, str]:
    """Returns the status, and the path that the page gave the file."""
    files = {"files": (name, data, "image/png")}
    sent = self.http.post(f"{self.site.url}/gradio_api/upload", files=files)
    return sent.status_code, sent.json()[0] if sent.status_code == 200 else sent.text[:300]


def named(path: str, **more: Any) -> dict[str, Any]:
  """Returns a file as a message names it."""
  about = {"orig_name": "x.png", "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}}
  return {"path": path, **about, **more}


def memory_mb(here: Site) -> float:
  status = pathlib.Path(f"/proc/{here.process.pid}/status").read_text()
  return int(status.split("VmRSS:")[1].split()[0]) / 1000
