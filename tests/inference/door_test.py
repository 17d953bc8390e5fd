# SPDX-License-Identifier: Apache-2.0
"""The page over HTTP: strangers are refused before work is done, others are served."""

import asyncio
import contextlib
import io
import json
import pathlib
import random
import shutil
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request

import httpx
import numpy as np
import PIL.Image
import psutil
import pytest

from mm1_jax.config import UserError
from mm1_jax.inference import app

pytestmark = pytest.mark.compiles

BEGIN, ANSWER, END = 0, 2, 3  # the page's events, in the order in which it connects them
PROMPT = "Hello?"


def png(width: int, height: int) -> bytes:
  data = io.BytesIO()
  PIL.Image.new("RGB", (width, height), 1).save(data, "PNG")
  return data.getvalue()


class Visitor:
  """Speaks to the queue as the page does."""

  def __init__(self, client: httpx.AsyncClient):
    self._client = client
    self.session = "".join(random.choices(string.ascii_lowercase, k=11))

  async def call(self, event: int, data: list) -> dict:
    """Returns what the queue says last of an event: whether it succeeded, and its output."""
    call = {"data": data, "event_data": None, "fn_index": event, "trigger_id": 4}
    response = await self._client.post(
      "/gradio_api/queue/join", json={**call, "session_hash": self.session}
    )
    if response.status_code != 200:
      return {"success": False, "status": response.status_code, "output": response.text}
    id = response.json()["event_id"]
    place = {"session_hash": self.session}
    async with self._client.stream("GET", "/gradio_api/queue/data", params=place) as events:
      async for line in events.aiter_lines():
        message = json.loads(line[5:]) if line.startswith("data:") else {}
        if message.get("event_id") not in (None, id):
          continue
        if message.get("msg") in ("process_completed", "unexpected_error", "queue_full"):
          return {"success": False, **message}
    raise AssertionError("the queue ended")

  async def begin(self, text: str, files: tuple[str, ...] = (), system: str = "") -> dict:
    named = [
      {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}} for path in files
    ]
    return await self.call(BEGIN, [None, {"text": text, "files": named}, system])

  async def ask(self, text: str, *files: str) -> str:
    """Returns the answer to a question."""
    begun = await self.begin(text, files)
    assert begun["success"], begun
    answered = await self.call(ANSWER, [None, 0.0, 1.0, 4])
    assert answered["success"], answered
    ended = await self.call(END, [None])
    assert ended["success"], ended
    return json.dumps(ended["output"]["data"][0][-1]["content"])

  async def upload(self, data: bytes, name: str = "x.png") -> httpx.Response:
    return await self._client.post("/gradio_api/upload", files={"files": (name, data)})


@contextlib.contextmanager
def served(run: pathlib.Path, *flags: str):
  """Yields the address and the process of a page."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "mm1_jax.inference.app", f"--checkpoint={run}"]
  process = subprocess.Popen([*command, f"--port={port}", "--max-new-tokens=4", *flags])
  url = f"http://127.0.0.1:{port}"
  try:
    while True:
      assert process.poll() is None, "the page ended before it began"
      try:
        urllib.request.urlopen(url, timeout=60).close()
        break
      except urllib.error.HTTPError:
        break
      except urllib.error.URLError:
        time.sleep(0.1)
    yield url, process
  finally:
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def run(workdir, tmp_path_factory):
  """The run, taken for one of conversations."""
  run = shutil.copytree(workdir, tmp_path_factory.mktemp("page") / "run")
  config = json.loads((run / "config.json").read_text())
  config["data"] |= {"chat": True}
  (run / "config.json").write_text(json.dumps(config))
  return run


@pytest.fixture(scope="module")
def page(run):
  flags = ["--max-chars=1000", "--max-upload-mb=1", "--max-disk-mb=3", "--max-waiting=100"]
  flags += ["--max-request-seconds=3", "--max-images=8"]
  with served(run, *flags) as page:
    yield page


def visit(url: str, what, **options):
  """Returns what a function of a client returns."""

  async def inner():
    async with httpx.AsyncClient(base_url=url, timeout=600, **options) as client:
      return await what(client)

  return asyncio.run(inner())


def memory(process: subprocess.Popen) -> int:
  """Returns the megabytes that a process has in memory."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  return int(status.partition("VmRSS:")[2].split()[0]) // 1000


def cpu_seconds(process: subprocess.Popen) -> float:
  """Returns the seconds that a process has computed."""
  times = psutil.Process(process.pid).cpu_times()
  return times.user + times.system


def test_one_picture_named_60_times_holds_nobody_up(page):
  """130 kB that decode to 2.4 billion pixels."""
  url, process = page

  async def attack(client):
    await Visitor(client).ask(PROMPT)  # compiles
    picture = (await Visitor(client).upload(png(6200, 6400))).json()[0]
    start = cpu_seconds(process)
    first, second = Visitor(client), Visitor(client)
    often, twice = await asyncio.gather(
      first.begin("?", (picture,) * 60), second.begin("?", (picture,) * 3)
    )
    spent = cpu_seconds(process) - start
    await Visitor(client).ask(PROMPT)
    return often, twice, spent

  often, twice, spent = visit(url, attack)
  assert "60 images; at most 8 are looked at" in often["output"]["error"]
  assert "119.0 million pixels together; at most 80" in twice["output"]["error"]
  print(f"{spent:.2f} s of the processor for both")
  assert spent < 1  # decoding one of the 63 takes about as long


def test_texts_are_counted_before_they_are_read(page):
  url, process = page

  async def attack(client):
    before, start = memory(process), cpu_seconds(process)
    with contextlib.suppress(httpx.TransportError):  # the connection is closed while it is sent
      large = await Visitor(client).begin("word " * 16_000_000)
      assert (large["status"], "a request may have" in large["output"]) == (413, True)
    spent = cpu_seconds(process) - start
    question = await Visitor(client).begin("a" * 1001)
    system = await Visitor(client).begin("a", system="b" * 1001)
    await Visitor(client).ask("a" * 100)
    return question, system, spent, memory(process) - before

  question, system, spent, grown = visit(url, attack)
  print(f"{spent:.2f} s of the processor, {grown} MB")
  assert "question has 1,001 characters; at most 1,000" in question["output"]["error"]
  assert "instructions have 1,001 characters" in system["output"]["error"]
  assert spent < 1
  assert grown < 100


def test_uploads_have_a_quota(page):
  """20 files of 0.9 MB: the oldest made room and are gone, the newest can be asked of."""
  url, _ = page

  async def fill(client):
    visitor = Visitor(client)
    noise = np.random.default_rng(0).bytes(850_000)
    answers = [await visitor.upload(png(9, 9) + noise[i:]) for i in range(20)]
    paths = [pathlib.Path(answer.json()[0]) for answer in answers]
    folder = paths[0].parents[1]
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    answer = await visitor.ask("?", str(paths[-1]))
    gone = await Visitor(client).begin("?", (str(paths[0]),))
    too_long = await visitor.upload(bytes(1_100_000))
    return held, paths, answer, gone, too_long.status_code

  held, paths, answer, gone, status = visit(url, fill)
  assert held < 4_000_000
  assert not paths[0].exists()
  assert answer
  assert not gone["success"]
  assert status == 413


def test_a_request_must_come_in_time(page):
  """Both a question and a picture whose bytes never end; a wrong length; none at all."""
  url, _ = page
  host, port = url.removeprefix("http://").split(":")

  def say(path: str, *headers: str) -> bytes:
    lines = [f"POST /gradio_api/{path} HTTP/1.1", f"host: {host}", *headers]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
      connection.sendall("\r\n".join([*lines, "", "{"]).encode())
      return connection.recv(100)

  assert b" 408 " in say("queue/join", "content-length: 99", "content-type: application/json")
  assert b" 413 " in say("queue/join", "content-length: 99999999")
  assert b" 411 " in say("upload", "transfer-encoding: chunked")
  assert b" 413 " in say("upload", "content-length: 999999999")
  multipart = "content-type: multipart/form-data; boundary=a"
  assert any(
    code in say("upload", "content-length: 99", multipart) for code in (b" 408 ", b" 400 ")
  )


def test_50_visitors_at_once(page):
  url, _ = page

  async def all_at_once(client):
    return await asyncio.gather(*(Visitor(client).ask(PROMPT) for _ in range(50)))

  answers = visit(url, all_at_once, limits=httpx.Limits(max_connections=200))
  assert len(set(answers)) == 1
  assert answers[0]


@pytest.mark.slow
def test_memory_is_flat_over_500_requests(page):
  """Of visitors who ask, of some who do not, and of refused ones."""
  url, process = page

  async def requests(client):
    sizes = []
    for i in range(500):
      visitor = Visitor(client)
      if i % 5 == 0:
        await visitor.ask(PROMPT)
      elif i % 5 == 1:
        await visitor.begin("word " * 190)
      else:
        await visitor.begin("word " * 10_000)
      if i % 100 == 99:
        sizes.append(memory(process))
    return sizes

  sizes = visit(url, requests)
  print("MB after each 100 requests:", sizes)
  assert sizes[-1] - sizes[1] < 30


def test_a_password_is_asked_for(run, tmp_path):
  (tmp_path / "password.txt").write_text("correct horse\n")
  with served(run, f"--password-file={tmp_path / 'password.txt'}") as (url, _):

    async def enter(client):
      closed = [
        (await client.post("/gradio_api/queue/join", json={})).status_code,
        (await Visitor(client).upload(png(9, 9))).status_code,
        (await client.get("/gradio_api/info")).status_code,
      ]
      wrong = await client.post("/login", data={"username": "a", "password": "battery"})
      right = await client.post("/login", data={"username": "a", "password": "correct horse"})
      opened = (await Visitor(client).upload(png(9, 9))).status_code
      return closed, wrong.status_code, right.status_code, opened

    assert visit(url, enter) == ([401, 401, 401], 400, 200, 200)


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (["--host=0.0.0.0"], r"others reach the page .*--password-file=FILE or in \$MM1_PASSWORD"),
    (["--share"], r"others reach the page .*--no-password"),
    (["--password-file=gone.txt"], "--password-file=gone.txt cannot be read"),
    (["--password-file=short.txt"], "the password has 5 characters; give it 8"),
    (["--max-chars=0"], "--max-chars is 0; it must be above 0"),
    (["--max-disk-mb=nan"], "--max-disk-mb is nan; it must be above 0"),
  ],
)
def test_mistakes(tmp_path, monkeypatch, flags, says):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv(app.PASSWORD, raising=False)
  (tmp_path / "short.txt").write_text("abcde")
  with pytest.raises(UserError, match=says):
    app.main(["--checkpoint=x", *flags])


def test_a_password_from_the_environment(monkeypatch):
  monkeypatch.setenv(app.PASSWORD, "correct horse")
  args = app._parse(["--checkpoint=x", "--host=0.0.0.0"])
  assert app.find_password(args) == "correct horse"
  assert app.find_password(app._parse(["--checkpoint=x", "--no-password"])) == ""


def test_bounds_are_in_the_help(capsys):
  with pytest.raises(SystemExit):
    app.main(["--help"])
  shown = " ".join(capsys.readouterr().out.split())
  for name, (default, *_) in app.BOUNDS.items():
    assert f"--{name}" in shown
    assert f"({default:,g})" in shown
