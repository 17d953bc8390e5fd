# SPDX-License-Identifier: Apache-2.0
"""Each filter, on cases whose verdict is worked out by hand; MM1's all together on one corpus."""

import json
from collections import Counter

import numpy as np
import pytest

from mm1_jax.config import ConfigError
from mm1_jax.data.build.__main__ import main
from mm1_jax.data.build.filters import Refiner
from mm1_jax.data.build.options import BuildOptions, parse
from mm1_jax.data.build.rows import Draft, Filtered, Image, RowError, digest
from tests.helpers.hostile import encode

SQUARE = encode("PNG", (8, 8))


def options(format: str = "mmc4", **changes) -> BuildOptions:
  values = {"format": format, "input": "", "output": "", "max_chars": 100, "max_image_mb": 1.0}
  return BuildOptions(**{**values, **changes})


def page(*items: str | Image) -> Draft:
  content = [{"text": i} if isinstance(i, str) else {"image": i} for i in items]
  header = {"id": "x", "source": "", "license": "", "credit": ""}
  return Draft({**header, "content": content}, "here")


def picture(width: int = 8, height: int = 8, url: str = "") -> Image:
  return Image(url=url, data=encode("PNG", (width, height)))


def lost(image: Image, repeated: frozenset[bytes] = frozenset(), **changes) -> str:
  """Why a picture is lost out of a page; '' if it is not."""
  counts: Counter = Counter()
  record = Refiner(options(**changes), None, repeated).refine(page("a", image, "b"), counts)
  assert len(record["content"]) == (1 if counts else 3)
  return next(iter(counts), "")


@pytest.mark.parametrize(
  ("size", "is_lost"),
  [
    *(((100, 200), False), ((100, 201), True), ((200, 100), False), ((201, 100), True)),
    *(((7, 7), False), ((3, 7), True), ((1, 2), False)),
  ],
)
def test_aspect(size, is_lost):
  assert lost(picture(*size), max_aspect=2.0) == ("image filtered: aspect" if is_lost else "")


@pytest.mark.parametrize(
  ("size", "reason"),
  [
    *(((100, 100), ""), ((99, 100), "too small"), ((100, 99), "too small")),
    *(((101, 300), ""), ((100, 301), "too large"), ((301, 100), "too large")),
  ],
)
def test_sides(size, reason):
  expected = f"image filtered: {reason}" if reason else ""
  assert lost(picture(*size), min_side=100, max_side=300) == expected


@pytest.mark.parametrize(
  ("url", "is_lost"),
  [
    *(("http://a/logo.png", True), ("http://a/Site_LOGO2.png", True), ("http://icons.a/x", True)),
    *(("http://a/x.png", False), ("http://a/log.png", False), ("", False)),
  ],
)
def test_url_words(url, is_lost):
  reason = "image filtered: word in its URL" if is_lost else ""
  assert lost(picture(url=url), url_words=("logo", "icon")) == reason


def test_repeated_by_url_or_bytes():
  reason = "image filtered: repeated in the corpus"
  other = encode("PNG", (9, 9))
  assert lost(Image(url="u", data=other), frozenset({digest("u")})) == reason
  assert lost(Image(url="v", data=other), frozenset({digest("u")})) == ""
  assert lost(Image(url="v", data=other), frozenset({digest(other)})) == reason


def test_first_copy_on_a_page():
  a, b = picture(8, 8, "a"), picture(9, 9, "b")
  same_url = Image(url="a", data=encode("PNG", (5, 5)))
  same_bytes = Image(url="c", data=a.data)
  counts: Counter = Counter()
  refiner = Refiner(options(first_copy_only=True), None, frozenset())
  for _ in range(2):  # pages are independent
    record = refiner.refine(page(a, "1", b, "2", same_url, "3", same_bytes, "4"), counts)
    texts = [{"text": "1"}, {"text": "2\n3\n4"}]
    pictures = [{"image": a.data}, {"image": b.data}]
    assert record["content"] == [pictures[0], texts[0], pictures[1], texts[1]]
  assert counts == {"image filtered: copy on the same page": 4}


@pytest.mark.parametrize(
  ("num", "reason"), [(0, "too few images"), (1, ""), (3, ""), (4, "too many images")]
)
def test_number_of_images(num, reason):
  refiner = Refiner(options(min_images=1, max_images=3), None, frozenset())
  draft = page("a", *[picture()] * num)
  if not reason:
    assert len(refiner.refine(draft, Counter())["content"]) == num + 1
    return
  with pytest.raises(Filtered, match=reason):
    refiner.refine(draft, Counter())


def test_what_is_lost_does_not_count():
  """The number of pictures is taken of those that are left."""
  refiner = Refiner(options(min_images=1, min_side=9), None, frozenset())
  with pytest.raises(Filtered, match="too few images"):
    refiner.refine(page("a", picture(8, 8)), Counter())


def test_texts_around_a_lost_picture_become_one():
  bad = Image(data=b"no picture")
  refiner = Refiner(options(), None, frozenset())
  for before, after, joined in [("a", "b", "a\nb"), ("a\n", "b", "a\nb"), ("a", " b", "a b")]:
    record = refiner.refine(page(before, bad, bad, after), Counter())
    assert record["content"] == [{"text": joined}]


def test_a_picture_takes_its_caption_with_it():
  draft = page(picture(1, 9), "a caption")
  with pytest.raises(Filtered, match="image filtered: aspect"):
    Refiner(options("webdataset", max_aspect=2.0), None, frozenset()).refine(draft, Counter())
  refiner = Refiner(options("webdataset"), None, frozenset())
  unreadable, silent = page(Image(data=b"no picture"), "a caption"), page(picture(), " ")
  with pytest.raises(RowError, match="unreadable image"):
    refiner.refine(unreadable, Counter())
  with pytest.raises(RowError, match="empty text"):
    refiner.refine(silent, Counter())


def test_characters():
  refiner = Refiner(options(), None, frozenset())
  assert refiner.refine(page("x" * 60, "y" * 40), Counter())
  with pytest.raises(Filtered, match="text too long"):
    refiner.refine(page("x" * 60, "y" * 41), Counter())


def test_damage_within_needs_decoding():
  """A header and an end are whole, what is between is not; a PNG has checksums of it."""
  data = bytearray(encode("PNG", (64, 64)))
  data[200:400] = bytes(200)
  assert lost(Image(data=bytes(data))) == "unreadable image"
  data = bytearray(encode("GIF", (64, 64)))
  data[1000:1200] = b"\xff" * 200
  assert lost(Image(data=bytes(data))) == ""
  assert lost(Image(data=bytes(data)), decode_images=True) in (
    "unreadable image",
    "truncated image",
  )


def test_mm1_preset():
  flags = ["obelics", "--input=x", "--images=y", "--output=z"]
  mm1, _ = parse([*flags, "--mm1_filters", "--min_side=50"], "")
  assert (mm1.min_images, mm1.max_images, mm1.max_aspect) == (1, 30, 2.0)
  assert (mm1.min_side, mm1.max_side, mm1.max_repeats) == (50, 10_000, 10)
  assert mm1.url_words == ("logo", "button", "icon", "plugin", "widget")
  assert mm1.first_copy_only
  plain, _ = parse(flags, "")
  assert (plain.min_images, plain.max_aspect, plain.url_words) == (None, None, ())
  for wrong in ("--max-aspect=0.5", "--min-side=200 --max_side=100", "--max-repeats=0"):
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
      parse([*flags, *wrong.split()], "")


def test_mm1_on_a_corpus(tmp_path):
  """A URL or picture on more than 10 pages goes everywhere; twice on one page counts once."""
  (tmp_path / "images").mkdir()
  rng = np.random.default_rng(0)

  def add(name: str, size: tuple[int, int] = (120, 100)) -> None:
    import PIL.Image

    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "images" / name)

  for name in ("everywhere.png", "ten.png", "twice.png"):
    add(name)
  for i in range(12):
    add(f"own{i}.png")
    add(f"url{i}.png")
  add("small.png", (99, 150))
  add("wide.png", (301, 150))
  rows = []
  for i in range(12):
    names = {f"own{i}.png": "", f"url{i}.png": "http://a/same-url"}  # 12 pages, 12 pictures
    names |= {"everywhere.png": f"http://a/{i}"}  # 12 pages, 12 URLs
    if i < 10:
      names |= {"ten.png": "http://a/ten"}
    infos = [{"image_name": n, "raw_url": u, "matched_text_index": 0} for n, u in names.items()]
    rows.append({"text_list": [f"page {i}"], "image_info": infos})
  twice = {"image_name": "twice.png", "matched_text_index": 0}
  odd = [
    {"image_name": name, "matched_text_index": 0, "raw_url": url}
    for name, url in [
      *(("small.png", ""), ("wide.png", ""), ("own0.png", "http://a/button")),
      *(("gone.png", ""), ("own1.png", "http://a/one")),
    ]
  ]
  rows += [{"text_list": ["twice"], "image_info": [twice] * 12}]
  rows += [{"text_list": ["odd"], "image_info": odd}]
  rows += [{"text_list": ["none"], "image_info": odd[:3]}, {"text_list": ["0"], "image_info": []}]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = [f"--input={tmp_path}/a.jsonl", f"--images={tmp_path}/images", "--rows_per_shard=3"]
  main(["mmc4", *flags, f"--output={tmp_path}/out", "--mm1_filters"])
  manifest = json.loads((tmp_path / "out-manifest.json").read_text())
  assert manifest["lost_images"] == {
    "image filtered: aspect": 2,
    "image filtered: copy on the same page": 11,
    "image filtered: repeated in the corpus": 24,
    "image filtered: too small": 2,
    "image filtered: word in its URL": 2,
    "image not found": 1,
  }
  assert manifest["filtered"] == {"too few images": 2}
  assert manifest["images"] == 12 + 10 + 1 + 1
  assert manifest["records"] == 14
