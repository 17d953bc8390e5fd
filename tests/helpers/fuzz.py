# SPDX-License-Identifier: Apache-2.0
"""Valid files changed at random, by seed: in their bytes, or in the values that they hold."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

ABSURD: tuple[Any, ...] = (
  *(None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e308, 2**31, 2**63, -(10**30)),
  *(float("nan"), float("inf"), "", "x", "\0", "\ud800", "../../x", "x" * 10_000, "1e999"),
  *([], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}}, ["x"] * 300),
)


def mutations(data: bytes, number: int, seed: int) -> Iterator[bytes]:
  """Yields `number` changed files; half of JSON's in their values, one to three at once."""
  rng = random.Random(seed)
  try:
    value = json.loads(data)
  except ValueError:
    value = None
  for _ in range(number):
    if value is not None and rng.random() < 0.7:
      yield json.dumps(mutated(value, rng)).encode()
    else:
      yield damaged(data, rng)


def mutated(value: Any, rng: random.Random) -> Any:
  """Returns a JSON value of which up to three parts are replaced, dropped, doubled or added."""
  value = json.loads(json.dumps(value))
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    box = [value]
    places = [(box, 0), *_places(value)]
    holder, key = rng.choice(places)
    change = rng.randrange(6)
    if change == 0 and holder is not box:
      del holder[key]
    elif change == 1 and isinstance(holder, dict):
      holder[rng.choice((f"{key}x", key.upper(), ""))] = copy.deepcopy(holder[key])
    elif change == 2 and isinstance(holder, list) and holder is not box:
      holder.insert(key, copy.deepcopy(rng.choice(holder)))
    elif change == 3:
      holder[key] = _deep(holder[key], rng.choice((1, 2, 50, 150)))
    else:
      holder[key] = copy.deepcopy(rng.choice(ABSURD))
    value = box[0]
  return value


def damaged(good: bytes, rng: random.Random) -> bytes:
  """Returns bytes with some flipped, cut out, put in or repeated."""
  data = bytearray(good)
  for _ in range(rng.choice((1, 1, 2, 8))):
    at = rng.randrange(len(data) + 1)
    change = rng.randrange(5)
    if change == 0 and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif change == 1:
      data[at : at + rng.choice((1, 2, 9, 1_000_000))] = b""
    elif change == 2:
      data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
    elif change == 3:
      data[at:at] = rng.choice(
        (b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5_000, b"\xff\xfe", b"\\ud800")
      )
    else:
      data[at:at] = data[max(0, at - rng.choice((1, 9, 99))) : at]
  return bytes(data)


def strays(
  cases: Iterator[bytes], read: Callable[[bytes], Any], allowed: type[Exception]
) -> list[str]:
  """Returns what `read` raises beyond the errors that are allowed, with the case."""
  found = []
  for case in cases:
    try:
      read(case)
    except allowed:
      pass
    except BaseException as e:
      found.append(f"{type(e).__name__}: {str(e)[:200]} of {case[:300]!r}")
      if isinstance(e, KeyboardInterrupt):
        raise
  return found


def _places(value: Any) -> list[tuple[Any, Any]]:
  if not isinstance(value, dict | list):
    return []
  entries = value.items() if isinstance(value, dict) else enumerate(value)
  return [place for key, inner in entries for place in ((value, key), *_places(inner))]


def _deep(value: Any, levels: int) -> Any:
  for _ in range(levels):
    value = [value]
  return value
