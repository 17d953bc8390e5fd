# SPDX-License-Identifier: Apache-2.0
"""Bounds on the page's requests: they are counted before anything reads them.

Gradio parses a request of any size, keeps what it held in the visitor's session, and keeps all
files that are uploaded. Here each has a bound; requests above one are refused by their first bytes.
"""

import asyncio
import dataclasses
import hmac
import math
import os
import pathlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

SECONDS_BETWEEN_SWEEPS = 60.0
SECONDS_AFTER_A_WRONG_PASSWORD = 1.0
LEAST_FILE_BYTES = 4_096  # that a file takes on a disk
OTHER_BYTES = 64_000  # of a request, besides its texts: keys, numbers, names of files
BYTES_PER_CHARACTER = 12  # of JSON, where half of a pair is \uXXXX


@dataclasses.dataclass(frozen=True)
class DoorBounds:
  """Bounds on requests, on the files that they leave, and on sessions."""

  request_bytes: int
  upload_bytes: int  # of one request; it may have several files
  disk_bytes: int  # of all uploads
  upload_seconds: float  # that an upload is kept
  request_seconds: float  # in which all of a request must have come
  session_seconds: float  # that a session is kept after its last request


class Refused(Exception):
  """A request that is above a bound."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


class Door:
  """ASGI middleware in front of Gradio's routes.

  Args:
    app: what it passes requests to.
    bounds: see above.
    folder: where uploads are.
    sessions: returns Gradio's holder of sessions; it is there once the page is served.
  """

  def __init__(
    self, app: Any, *, bounds: DoorBounds, folder: pathlib.Path, sessions: Callable[[], Any]
  ):
    self._app = app
    self._bounds = bounds
    self._folder = folder
    self._sessions = sessions
    self._coming = 0  # bytes of uploads that are on their way
    self._swept = time.monotonic()

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    self._sweep_now_and_then()
    is_upload = scope["path"].rstrip("/").endswith("/upload")
    started = False

    async def noted_send(message: Any) -> None:
      nonlocal started
      started = True
      await send(message)

    try:
      pass_on = self._upload if is_upload else self._small
      await pass_on(scope, receive, noted_send)
    except Refused as e:
      if not started:
        await _answer(send, e.status, str(e))

  async def _small(self, scope: Any, receive: Any, send: Any) -> None:
    """Passes a request on once all of it is here."""
    most = self._bounds.request_bytes
    if _length(scope) > most:
      raise Refused(413, f"a request may have {most:,} bytes")
    body = b""
    if scope["method"] not in ("GET", "HEAD"):
      body = await self._body(receive, most)
    sent = False

    async def replay() -> Any:
      nonlocal sent
      if sent:
        return await receive()
      sent = True
      return {"type": "http.request", "body": body, "more_body": False}

    await self._app(scope, replay, send)

  async def _body(self, receive: Any, most: int) -> bytes:
    body, left = bytearray(), self._bounds.request_seconds
    while True:
      start = time.monotonic()
      message = await _within(left, receive())
      left -= time.monotonic() - start
      body += message.get("body", b"")
      if len(body) > most:
        raise Refused(413, f"a request may have {most:,} bytes")
      if not message.get("more_body"):
        return bytes(body)

  async def _upload(self, scope: Any, receive: Any, send: Any) -> None:
    """Passes an upload on as it comes, when there is room for all of it."""
    length = _length(scope)
    if not length:
      raise Refused(411, "an upload must say its length")
    if length > self._bounds.upload_bytes:
      raise Refused(413, f"an upload may have {self._bounds.upload_bytes:,} bytes")
    self._make_room(length)
    end, came = time.monotonic() + self._bounds.request_seconds, 0

    async def counted() -> Any:
      nonlocal came
      left = end - time.monotonic() if came < length else math.inf  # all of it is here
      message = await _within(left, receive())
      came += len(message.get("body", b""))
      if came > length:
        raise Refused(413, "an upload is longer than it says")
      return message

    self._coming += length
    try:
      await self._app(scope, counted, send)
    finally:
      self._coming -= length

  def _make_room(self, length: int) -> None:
    """Removes the oldest uploads until there is room for one more.

    Raises:
      Refused: there is none, because of other uploads that are on their way.
    """
    files = _files(self._folder)
    used = sum(size for _, size, _ in files) + self._coming + length
    while used > self._bounds.disk_bytes and files:
      _, size, path = files.pop(0)
      path.unlink(missing_ok=True)
      used -= size
    if used > self._bounds.disk_bytes:
      raise Refused(507, "there is no room for uploads now; try again in a minute")

  def _sweep_now_and_then(self) -> None:
    """Removes old uploads, and sessions that were not used for long."""
    if time.monotonic() - self._swept < SECONDS_BETWEEN_SWEEPS:
      return
    self._swept = time.monotonic()
    for changed, _, path in _files(self._folder):
      if time.time() - changed > self._bounds.upload_seconds:
        path.unlink(missing_ok=True)
    expire(self._sessions(), self._bounds.session_seconds)


def expire(sessions: Any, seconds: float) -> None:
  """Drops the sessions whose last request is longer ago."""
  for key, used in list(sessions.time_last_used.items()):
    if time.time() - used.timestamp() > seconds:
      sessions.session_data.pop(key, None)
      sessions.time_last_used.pop(key, None)


def password_check(password: str) -> Callable[[str, str], Awaitable[bool]]:
  """Returns what Gradio asks about a visitor's name and password; a wrong one takes a second."""

  async def check(_: str, given: str) -> bool:
    if hmac.compare_digest(given.encode("utf-8", "replace"), password.encode()):
      return True
    await asyncio.sleep(SECONDS_AFTER_A_WRONG_PASSWORD)
    return False

  return check


async def _within(seconds: float, message: Awaitable[Any]) -> Any:
  try:
    return await asyncio.wait_for(message, None if seconds == math.inf else max(seconds, 0.001))
  except TimeoutError as e:
    raise Refused(408, "the request took too long to come") from e


def _length(scope: Any) -> int:
  text = dict(scope["headers"]).get(b"content-length", b"0")
  if not text.isdigit() or len(text) > 18:
    raise Refused(400, "the length of the request is no number")
  return int(text)


def _files(folder: pathlib.Path) -> list[tuple[float, int, pathlib.Path]]:
  """Returns when each file below a folder was changed, and its bytes; the oldest first."""
  found = []
  for place, _, names in os.walk(folder):
    for name in names:
      path = pathlib.Path(place, name)
      try:
        info = path.stat()
      except FileNotFoundError:  # removed just now
        continue
      found.append((info.st_mtime, max(info.st_size, LEAST_FILE_BYTES), path))
  return sorted(found)


async def _answer(send: Any, status: int, reason: str) -> None:
  headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
  await send({"type": "http.response.start", "status": status, "headers": headers})
  await send({"type": "http.response.body", "body": f"{reason}.\n".encode()})
