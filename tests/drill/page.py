# SPDX-License-Identifier: Apache-2.0
"""Requests of strangers to the web page: each is refused or answered soon, and harms no other."""

import concurrent.futures
import http.server
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.drill.core import CRASHED, Fault, Outcome, Scene
from tests.drill.visitor import Answer, Site, Visitor, leave, memory_mb, named, site
from tests.helpers.hostile import png_of

REFUSES_WITHIN = 5  # seconds: one or less, on a machine with nothing else to do
ANSWERS_WITHIN = 30
SECRET = "this file is not for visitors"
VISITORS, SESSIONS, WORDS = 20, 60, 1_000_000
QUOTA_GB = 2.5  # that all visitors together may upload, at most


def faults() -> Iterator[Fault]:
  cases: dict[str, Callable[[Scene], None]] = {
    "60-times-one-picture": many_pictures,
    "80-mb-of-text": long_text,
    "20-mb-of-instructions": long_system,
    "5000-small-pictures": many_small_pictures,
    "claims-100000-pixels": claims,
    "foreign-paths": foreign_paths,
    "foreign-urls": foreign_urls,
    "absurd-settings": absurd_settings,
    "wrong-types": wrong_types,
    "deep-json": deep_json,
    "20-visitors": visitors,
    "60-sessions": sessions,
    "uploads": uploads,
  }
  for name, ask in cases.items():
    quick = name in ("60-times-one-picture", "80-mb-of-text", "foreign-paths")
    yield Fault(f"page/{name}", _on_the_page(ask), quick=quick, turn="page")


def _on_the_page(ask: Callable[[Scene], None]) -> Callable[[Scene], None]:
  """Returns a fault after which a plain question must be answered.

  The page is started again for the next fault where this one did harm.
  """

  def strike(scene: Scene) -> None:
    here = site(scene)
    ask(scene)
    if here.process.ended():
      scene.add(Outcome.WRONG, f"the page ended: {here.process.text[-300:]}")
    elif not scene.problems:
      after = _visitor(scene, here).ask("Hello?")
      if after.kind != "answered":
        scene.add(Outcome.WRONG, f"then a plain question is not answered: {after.text}")
    # Gradio tells its log of requests that no page makes.
    if ask not in FORGED and CRASHED.search(here.process.text):
      scene.add(Outcome.TRACEBACK, "in the page's log")
    if scene.problems or ask in FORGED:
      leave(scene.lab, here)

  return strike


def _visitor(scene: Scene, here: Site, within: float = ANSWERS_WITHIN) -> Visitor:
  return Visitor(here, scene.dice, scene.patient(within))


def _refused(scene: Scene, answer: Answer, within: float = REFUSES_WITHIN) -> None:
  scene.seconds, scene.message = answer.seconds, answer.text
  if answer.kind == "nothing" or answer.seconds > scene.patient(within):
    scene.add(Outcome.HUNG, f"{answer.kind} after {answer.seconds:.1f} s: {answer.text}")
  elif answer.kind != "refused":
    scene.add(Outcome.WRONG, f"{answer.kind}, not refused: {answer.text}")


def _beside_another(scene: Scene, attack: Callable[[Site], Answer]) -> None:
  """The attack is refused, and who asks meanwhile is answered."""
  here = site(scene)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    attacked = pool.submit(attack, here)
    time.sleep(0.5)
    other = _visitor(scene, here).ask("Hello?")
    _refused(scene, attacked.result())
  if other.kind != "answered":
    worse = Outcome.HUNG if other.kind == "nothing" else Outcome.WRONG
    scene.add(worse, f"another visitor: {other.kind} after {other.seconds:.0f} s, {other.text}")


def many_pictures(scene: Scene) -> None:
  """One picture of 130 kB and 40 megapixels, named 60 times."""
  import PIL.Image

  data = io.BytesIO()
  PIL.Image.new("RGB", (6200, 6400), 1).save(data, "PNG")

  def attack(here: Site) -> Answer:
    visitor = _visitor(scene, here)
    _, path = visitor.upload("large.png", data.getvalue())
    return visitor.ask("What are these?", [named(path)] * 60)

  _beside_another(scene, attack)


def long_text(scene: Scene) -> None:
  _beside_another(scene, lambda here: _visitor(scene, here).ask("word " * 16_000_000))


def long_system(scene: Scene) -> None:
  _beside_another(scene, lambda here: _visitor(scene, here).ask("Hello?", system="a " * 10_000_000))


def many_small_pictures(scene: Scene) -> None:
  here = site(scene)
  visitor = _visitor(scene, here)
  _, path = visitor.upload("small.png", _png())
  _refused(scene, visitor.ask("What are these?", [named(path)] * 5000))


def claims(scene: Scene) -> None:
  here = site(scene)
  visitor = _visitor(scene, here)
  _, path = visitor.upload("bomb.png", png_of(100_000, 100_000))
  _refused(scene, visitor.ask("What is this?", [named(path)]))


def foreign_paths(scene: Scene) -> None:
  """Files of the machine are neither shown nor looked at."""
  here = site(scene)
  visitor = _visitor(scene, here)
  secret = scene.folder / "secret.txt"
  secret.write_text(SECRET)
  for path in (str(secret), "/etc/passwd", "../../../../etc/passwd", f"file://{secret}"):
    _soon(scene, visitor.ask("What is this?", [named(path)]), path)
    for route in ("gradio_api/file=", "file=", "gradio_api/proxy=", "static/", "assets/"):
      got = visitor.http.get(f"{here.url}/{route}{path}")
      if SECRET in got.text or "root:" in got.text:
        scene.add(Outcome.WRONG, f"{route}{path} is shown")
  for name in ("../../escaped.txt", "..\\escaped.txt", "a" * 300, "x.png\0.html"):
    visitor.upload(name, b"escaped")
  escaped = [*here.folder.parent.glob("escaped*")]
  if escaped:
    scene.add(Outcome.WRONG, f"an upload left its folder: {escaped}")


def foreign_urls(scene: Scene) -> None:
  """The page fetches nothing for a visitor."""
  hits: list[str] = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      hits.append(self.path)
      self.send_response(200)
      self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    here = site(scene)
    visitor = _visitor(scene, here)
    url = f"http://127.0.0.1:{server.server_port}"
    _soon(scene, visitor.ask("?", [named(f"{url}/path.png")]), url)
    _, path = visitor.upload("a.png", _png())
    visitor.ask(f"<img src={url}/html> ![x]({url}/markdown)", [named(path, url=f"{url}/url.png")])
    visitor.http.get(f"{here.url}/gradio_api/file={url}/file")
    visitor.http.get(f"{here.url}/gradio_api/proxy={url}/proxy")
  finally:
    server.shutdown()
  if hits:
    scene.add(Outcome.WRONG, f"it fetched {hits}")


def absurd_settings(scene: Scene) -> None:
  """Temperature, top-p and length that no control gives: refused or bounded, and soon."""
  here = site(scene)
  nan, inf = float("nan"), float("inf")
  for settings in (
    (nan, 1.0, 4),
    (-5.0, 1.0, 4),
    (1e308, 1.0, 4),
    (inf, 1.0, 4),
    (1.0, 0.0, 4),
    (1.0, -1.0, 4),
    (0.0, 1.0, 10**9),
    (0.0, 1.0, -1),
    (0.0, 1.0, "x"),
    (None, None, None),
  ):
    _soon(scene, _visitor(scene, here).ask("Hello?", settings=settings), f"settings {settings}")


def wrong_types(scene: Scene) -> None:
  here = site(scene)
  for text in (5, None, ["a"], {"a": 1}, "a\0b", "half \ud800 of it", "\u202e\x1b[2J"):
    _soon(scene, _visitor(scene, here).ask(text), f"text {text!r}")
  for files in ([5], ["/etc/passwd"], [None], [{"path": 3}], [[]]):
    _soon(scene, _visitor(scene, here).ask("?", files), f"files {files}")
  for data in ([None, "no message", ""], [], [{"forged": 1}], [None] * 9):
    _soon(scene, _visitor(scene, here).call(here.begin, data), f"data {data}")
  _soon(scene, _visitor(scene, here).call(99, [None]), "event 99")


def deep_json(scene: Scene) -> None:
  here = site(scene)
  visitor = _visitor(scene, here)
  deep = b'{"data":' + b"[" * 100_000
  for body in (deep, deep + b"]" * 100_000 + b"}", b"{"):
    begun = time.monotonic()
    url, kind = f"{here.url}/gradio_api/queue/join", {"content-type": "application/json"}
    got = visitor.http.post(url, content=body, headers=kind)
    answer = Answer("refused", got.text, time.monotonic() - begun)
    _soon(scene, answer, f"body of {len(body)} bytes")
    if got.status_code == 200:
      scene.add(Outcome.WRONG, f"a body of {len(body)} bytes was taken")


def visitors(scene: Scene) -> None:
  """As many at once: all are answered, in turn."""
  here = site(scene)

  def ask(number: int) -> Answer:
    return _visitor(scene, here, 120).ask(f"Question {number}?")

  with concurrent.futures.ThreadPoolExecutor(VISITORS) as pool:
    answers = [*pool.map(ask, range(VISITORS))]
  scene.seconds = max(answer.seconds for answer in answers)
  bad = [answer for answer in answers if answer.kind != "answered"]
  scene.message = f"{len(answers) - len(bad)} of {len(answers)} answered"
  if bad:
    scene.add(Outcome.WRONG, f"{len(bad)} of {len(answers)} were not answered: {bad[0].text}")


def sessions(scene: Scene) -> None:
  """Visitors who bring text and never ask for its answer: what they bring is not kept."""
  here = site(scene)
  text = "word " * WORDS

  def come(_: int) -> None:
    visitor = _visitor(scene, here)
    visitor.call(here.begin, [None, {"text": text, "files": []}, text])
    visitor.http.close()

  come(0)
  before = memory_mb(here)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    list(pool.map(come, range(SESSIONS)))
  grown = memory_mb(here) - before
  scene.message = f"{grown:.0f} MB more for {SESSIONS} sessions of {2 * len(text) / 1e6:.1f} MB"
  if grown > 0.4 * SESSIONS * 2 * len(text) / 1e6:
    scene.add(Outcome.WRONG, scene.message)


def uploads(scene: Scene) -> None:
  """All uploads together have a quota."""
  here = site(scene)
  data, sent = scene.dice.randbytes(1000) + bytes(18_900_000), 0.0
  visitor = _visitor(scene, here)
  while sent < QUOTA_GB * 1e9:
    status, text = visitor.upload(f"{sent:.0f}.png", scene.dice.randbytes(16) + data)
    if status != 200:
      scene.message = f"{status} after {sent / 1e9:.2f} GB: {text}"
      break
    sent += len(data)
  else:
    scene.add(Outcome.WRONG, f"{sent / 1e9:.1f} GB were taken")
  for path in here.folder.rglob("*.png"):
    path.unlink(missing_ok=True)


def _soon(scene: Scene, answer: Answer, what: str) -> None:
  """Takes what came of a forged request: anything, but soon."""
  scene.seconds = max(scene.seconds or 0, answer.seconds)
  scene.message = f"{what}: {answer.kind}, {answer.text}"
  if answer.kind == "nothing":
    scene.add(Outcome.HUNG, f"{what}: {answer.text}")


# Requests that no browser makes of the page.
FORGED = (foreign_paths, foreign_urls, absurd_settings, wrong_types, deep_json)


def _png() -> bytes:
  import PIL.Image

  data = io.BytesIO()
  PIL.Image.new("RGB", (9, 9), 1).save(data, "PNG")
  return data.getvalue()
