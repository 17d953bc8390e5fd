# SPDX-License-Identifier: Apache-2.0
"""Inputs that are wrong, each with the reason that a build must count it under.

A case is (what it is, the reason); None is a case that looks bad and is good.
"""

import io
import json
import os
import pathlib
import struct
import zlib

import numpy as np
import PIL.Image

from mm1_jax.data.build import raw_sample

EMPTY, UNREADABLE = "empty image", "unreadable image"
TRUNCATED, BOMB = "truncated image", "image too large"
MISSING, OUTSIDE, NO_FILE = (
  "image not found",
  "image name leaves the store",
  "image is no regular file",
)
TOO_BIG = "image file too large"  # for --max_image_mb=1

Case = tuple[object, str | None]


def encode(kind: str, size: tuple[int, int] = (40, 40), mode: str = "RGB", **options) -> bytes:
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
  data = io.BytesIO()
  PIL.Image.fromarray(pixels).convert(mode).save(data, kind, **options)
  return data.getvalue()


def photo(number: int = 0) -> bytes:
  return raw_sample.read("captions", number + 1)[number]["content"][0]["image"]


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
  """A PNG that claims a size."""
  chunks = [
    (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
    (b"IDAT", data or zlib.compress(bytes(1000))),
    (b"IEND", b""),
  ]
  body = b"".join(
    struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
  )
  return b"\x89PNG\r\n\x1a\n" + body


def jpeg_of(width: int, height: int) -> bytes:
  """A JPEG whose header claims a size."""
  data = bytearray(encode("JPEG"))
  place = data.index(b"\xff\xc0") + 5
  data[place : place + 4] = struct.pack(">HH", height, width)
  return bytes(data)


def images() -> list[Case]:
  """Pictures: bytes and reason."""
  jpeg, png, gif, webp = (encode(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))
  tiff = encode("TIFF", compression="tiff_lzw")
  grey = io.BytesIO()
  PIL.Image.fromarray(np.zeros((9, 9), np.float32)).save(grey, "TIFF")
  cases: list[Case] = [(b"", EMPTY)]
  cases += [(jpeg[:n], UNREADABLE) for n in (1, 2, 3, 10, 20, 100)]
  cases += [
    (jpeg[: int(len(jpeg) * share)], TRUNCATED) for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
  ]
  cases += [(photo(i)[: len(photo(i)) // 2], TRUNCATED) for i in range(4)]
  cases += [(png[:n], UNREADABLE) for n in (1, 8, 12, 20)]
  cases += [(png[: len(png) * n // 10], TRUNCATED) for n in (5, 7, 9)]
  cases += [(gif[:n], UNREADABLE) for n in (1, 6, 10)]
  cases += [(webp[:n], UNREADABLE) for n in (4, 11)]
  cases += [(data, UNREADABLE) for data in (b"GIF89a" + bytes(8), b"\xff\xd8\xff", b"RIFF")]
  cases += [(data * 100, UNREADABLE) for data in (b"\0", b"\xff", b" ", b"\xff\xd8", b"\xff\xd9")]
  cases += [
    (b"<html><body>404 Not Found</body></html>", UNREADABLE),
    (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", UNREADABLE),
    (b"%PDF-1.4\n%%EOF", UNREADABLE),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", UNREADABLE),
    (b"PK\x03\x04" + bytes(99), UNREADABLE),
    (b"\x1f\x8b\x08" + bytes(99), UNREADABLE),
    (b"\x7fELF" + bytes(99), UNREADABLE),
    (b"BM" + bytes(9), UNREADABLE),
    (b'{"error": "not found"}', UNREADABLE),
    (grey.getvalue(), UNREADABLE),
    (png_of(0, 0), UNREADABLE),
    (tiff[: len(tiff) // 2], UNREADABLE),
  ]
  sides = ((8001, 8000), (65_000, 1000), (1, 64_000_001), (100_000, 100_000), (2**31 - 1, 2))
  cases += [(png_of(*size), BOMB) for size in sides]
  cases += [(jpeg_of(*size), BOMB) for size in ((8001, 8000), (65_500, 65_500))]
  cases += [(b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + gif[10:], BOMB)]
  cases += [(np.random.default_rng(1).bytes(1_000_001), TOO_BIG)]
  good = [png, gif, webp, tiff, jpeg + b"trailing", jpeg + bytes(1000), encode("BMP")]
  good += [encode("PNG", mode=mode) for mode in ("1", "L", "P", "RGBA", "LA")]
  good += [encode("JPEG", mode="CMYK"), encode("JPEG", progressive=True), encode("JPEG", (1, 1))]
  return [*cases, *((data, None) for data in good)]


def texts() -> list[Case]:
  """Values in the place of a text in JSON; --max_chars=100000 is set."""
  wrong = "'text' is of the wrong type"
  cases: list[Case] = [("", "empty"), (" \n\t ", "empty"), ("\ufeff", None)]
  cases += [(text, "NUL in text") for text in ("\0", "a\0b", "abc\0", "\0" * 9999)]
  half = ("\ud800", "a\udc00b", "\udfff" * 10, "\udc00\ud800", "ok \ud83d")
  cases += [(text, "half a character in text") for text in half]
  cases += [("x" * n, "text too long") for n in (100_001, 10_000_000)]
  cases += [("\U0001f600" * 100_001, "text too long"), ("x" * 100_000, None)]
  cases += [(value, wrong) for value in (0, 1.5, True, False, [], ["a"], {}, {"a": 1}, [[]])]
  cases += [(None, "'text' is missing")]
  good = (
    "<image>",
    "</s><s>",
    "\u202eabc",
    "e\u0301",
    "\U0001f600",
    "\r\n",
    "\\",
    '"',
    "\x7f",
    "\x1b[31m",
  )
  cases += [(text, "empty" if not text.strip() else None) for text in good]
  cases += [
    (text, None) for text in ("\u2028a", "\uffffa", "\ufffea", "a" + "\u0301" * 999, "%s{}$")
  ]
  return cases


def json_lines() -> list[Case]:
  """Whole lines."""
  bad = [b"{", b"}", b"[", b'{"text": ', b'{"text": "a"', b"{'text': 'a'}", b"text", b"<xml/>"]
  bad += [
    b'{"text": "a"} {"text": "b"}',
    b'{"text": "a",}',
    b'{"text" "a"}',
    b'"\\ud8"',
    b"\x00",
  ]
  bad += [
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"text": "\x01"}',
    b"nul",
    b"tru",
    b"+1",
    b"{]",
  ]
  cases: list[Case] = [(line, "not JSON") for line in bad]
  cases += [
    (line, "not an object")
    for line in (b"1", b"null", b'"a"', b"true", b"{}x"[:0] + b"[1]", b"1e5")
  ]
  cases += [(b"{}", "'text' is missing"), (b'{"Text": "a"}', "'text' is missing")]
  for depth in (10_000, 100_000):
    cases += [
      (b"[" * depth + b"]" * depth, "JSON nested too deeply"),
      (b'{"text": ' * depth + b"1" + b"}" * depth, "JSON nested too deeply"),
      (b'{"text": "a", "more": ' + b"[" * depth + b"]" * depth + b"}", "JSON nested too deeply"),
    ]
  cases += [(b"\x1f\x8b", "not UTF-8")]
  latin = ("caf\xe9", "\xff\xfe", "\x80", "a\xc3", "\xed\xa0\x80", "\xf5\x80\x80\x80")
  cases += [(b'{"text": "' + t.encode("latin-1") + b'"}', "not UTF-8") for t in latin]
  cases += [('{"text": "utf-16"}'.encode("utf-16-le"), "not JSON")]
  cases += [(b"\xef\xbb\xbf" + b'{"text": "mark"}', None), (b'{"text": "a", "text": "b"}', None)]
  cases += [(b'{"text": "nan", "n": NaN}', None), (b'  {"text": "spaces"}  \r', None)]
  return cases


def image_names(folder: pathlib.Path) -> list[Case]:
  """File names in a folder of pictures, which this fills with traps."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder.parent / "secret.jpg").write_bytes(photo())
  (folder / "good.jpg").write_bytes(photo())
  (folder / "folder.jpg").mkdir()
  (folder / "empty.jpg").write_bytes(b"")
  os.mkfifo(folder / "pipe.jpg")
  os.symlink("/etc/passwd", folder / "passwd.jpg")
  os.symlink("/dev/zero", folder / "zero.jpg")
  os.symlink("loop.jpg", folder / "loop.jpg")
  os.symlink("nowhere.jpg", folder / "dangling.jpg")
  os.symlink("good.jpg", folder / "link.jpg")
  outside = [
    "../secret.jpg",
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../secret.jpg",
    "..",
    "/",
    "//x",
  ]
  outside += [
    "..\\secret.jpg",
    "\\\\host\\share",
    str(folder / "good.jpg"),
    "a\0.jpg",
    "good.jpg\0.png",
    " ",
  ]
  cases: list[Case] = [(name, OUTSIDE) for name in outside]
  missing = [
    "gone.jpg",
    "x" * 5000,
    "a/b/c.jpg",
    "loop.jpg",
    "dangling.jpg",
    "good.jpg/x",
    "\ud800.jpg",
  ]
  missing += [
    "file:///etc/passwd",
    "http://169.254.169.254/",
    "gs://bucket/x.jpg",
    "*.jpg",
    "good.jp?",
    "~",
  ]
  cases += [(name, MISSING) for name in missing]
  cases += [(name, NO_FILE) for name in ("folder.jpg", "pipe.jpg", "zero.jpg", ".", "./")]
  cases += [("passwd.jpg", UNREADABLE), ("empty.jpg", EMPTY)]
  return [*cases, *((name, None) for name in ("good.jpg", "./good.jpg", ".//good.jpg", "link.jpg"))]


def conversations() -> list[Case]:
  """LLaVA's rows; good.jpg is there."""
  ask, answer = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}
  look = {"from": "human", "value": "<image>\nWhat?"}

  def talk(*turns: object, **more: object) -> dict:
    return {"conversations": list(turns), **more}

  turns = "'conversations' is of the wrong type"
  more_slots, more_images = "more <image> slots than images", "more images than <image> slots"
  open_end, order = "conversation does not end with an answer", "human and gpt do not take turns"
  nobody = "a turn is neither by human nor gpt"
  odd_image = "an image is neither a name, a URL nor bytes"
  nameless = "image without bytes, name or URL"
  return [
    ({}, "'conversations' is missing"),
    ([], "not an object"),
    ({"conversations": None}, "'conversations' is missing"),
    ({"conversations": "Hi"}, turns),
    ({"conversations": {}}, turns),
    (talk(), open_end),
    (talk(ask), open_end),
    (talk(ask, answer, ask), open_end),
    (talk({"from": "system", "value": "Be kind."}), open_end),
    (talk(answer, ask), order),
    (talk(ask, ask), order),
    (talk(ask, answer, answer), order),
    (
      talk(ask, answer, {"from": "system", "value": "x"}, answer),
      "a turn is neither by human nor gpt",
    ),
    (talk({"from": "Human", "value": "x"}, answer), None),
    (talk({"from": "tool", "value": "x"}, answer), nobody),
    (talk({"value": "x"}, answer), "'from' is missing"),
    (talk({"from": 1, "value": "x"}, answer), "'from' is of the wrong type"),
    (talk({"from": "human"}, answer), "'value' is missing"),
    (talk({"from": "human", "value": 7}, answer), None),
    (talk({"from": "human", "value": True}, answer), "'value' is of the wrong type"),
    (talk({"from": "human", "value": ""}, answer), "empty turn"),
    (talk(ask, {"from": "gpt", "value": "\n \n"}), "empty turn"),
    (talk({"from": "human", "value": [7]}, answer), "an item of a turn is no object"),
    (talk("Hi", "Yes"), "not an object"),
    (talk(None, answer), "not an object"),
    (talk(look, answer), more_slots),
    (talk(look, answer, image=[]), more_slots),
    (talk(look, answer, look, answer, image="good.jpg"), more_slots),
    (talk({"from": "human", "value": "<image>" * 50}, answer, image=["good.jpg"]), more_slots),
    (talk(ask, answer, image="good.jpg"), more_images),
    (talk(look, answer, image=["good.jpg"] * 2), more_images),
    (talk(look, answer, image=7), odd_image),
    (talk(look, answer, image={"path": "good.jpg"}), None),
    (talk(look, answer, image={"path": None}), nameless),
    (talk(look, answer, image=[["good.jpg"]]), odd_image),
    (talk(look, answer, image=[None]), odd_image),
    (talk({"from": "human", "value": "a\0"}, answer), "NUL in text"),
    (talk(ask, {"from": "gpt", "value": "\ud800"}), "half a character in text"),
    (talk(ask, {"from": "gpt", "value": "x" * 1_000_000}), "text too long"),
    (talk(ask, answer), None),
    (talk(look, answer, image="good.jpg"), None),
    (talk(look, answer, images=["good.jpg"], id=12), None),
    (talk({"from": "human", "value": "<image> <image>"}, answer, image=["good.jpg"] * 2), None),
    (talk(ask, {"from": "gpt", "value": "See <image>"}, image="good.jpg"), None),
    (talk({"from": "system", "value": "Be kind."}, ask, answer, id=["odd"]), None),
  ]


def pages() -> list[Case]:
  """OBELICS' rows of texts and images, as lists; a picture is embedded as bytes."""
  good = {"bytes": photo(), "path": "a.jpg"}
  lengths = "'texts' and 'images' are not of one length"
  return [
    ((["a"], []), lengths),
    (([], [good]), lengths),
    ((["a", None], [None]), lengths),
    ((["a"], [good]), None),
    (([None], [None]), "empty"),
    ((["a", "b"], [None, good]), None),
    ((None, [good]), "'texts' is missing"),
    ((["a"], None), "'images' is missing"),
    (([None], [{"bytes": None, "path": "x.jpg"}]), "empty"),
    (([], []), "empty"),
    ((["", " "], [None, None]), "empty"),
    ((["a\0"], [None]), "NUL in text"),
    ((["x" * 2_000_000], [None]), "text too long"),
    ((["a", None], [None, good]), None),
    ((["only text"], [None]), None),
    (([None, None], [good, good]), None),
  ]


def mmc4_rows() -> list[Case]:
  """MMC4's rows; good.jpg is there. An odd picture or sentence is lost, and its page is not."""
  info = {"image_name": "good.jpg", "matched_text_index": 0}
  return [
    ({"image_info": [info]}, "'text_list' is missing"),
    ({"text_list": "a", "image_info": []}, "'text_list' is of the wrong type"),
    ({"text_list": [1], "image_info": []}, "empty"),
    ({"text_list": ["a", None], "image_info": []}, None),
    ({"text_list": ["a"]}, None),
    ({"text_list": ["a"], "image_info": {}}, "'image_info' is of the wrong type"),
    ({"text_list": ["a"], "image_info": ["good.jpg"]}, None),
    ({"text_list": ["a"], "image_info": [{}]}, None),
    ({"text_list": ["a"], "image_info": [{**info, "matched_text_index": 1}]}, None),
    ({"text_list": ["a"], "image_info": [{**info, "matched_text_index": -1}]}, None),
    ({"text_list": [], "image_info": [info]}, "empty"),
    ({"text_list": ["a"], "image_info": [{**info, "matched_text_index": "0"}]}, None),
    ({"text_list": ["a"], "image_info": [{**info, "matched_text_index": True}]}, None),
    ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, None),
    ({"text_list": ["a"], "image_info": [{**info, "image_name": 5}]}, None),
    ({"text_list": [], "image_info": []}, "empty"),
    ({"text_list": ["\ud800"], "image_info": []}, "half a character in text"),
    ({"text_list": ["a"], "image_info": [info]}, None),
    ({"text_list": ["a", "b"], "image_info": [info, {**info, "matched_text_index": 1}]}, None),
  ]


def dumps(value: object) -> bytes:
  """JSON as Python's writes it, lone surrogates escaped."""
  return json.dumps(value).encode()
