# SPDX-License-Identifier: Apache-2.0
"""Makes the sample that ships with the package, from our raw data dump.

  python -m mm1_jax.data.build.sample --raw=/path/to/data --out=mm1_jax/data/sample

Four parts (captions, interleaved, text, sft), each as `PART-train-*` and `PART-heldout-*` shards; a
tokenizer trained on the train side; the small world of `world.py`, its parts in shards beside them,
and a smaller tokenizer for it; a manifest; the credits. The same input gives the same bytes.

Nothing held out is seen in training: records that share a textbook module, a picture (or one that
looks the same), a caption, an exercise or a novel form a component, and a component goes to one
side as a whole.
"""

import collections
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import sentencepiece

from mm1_jax import cli
from mm1_jax.data import sources, tokenizer
from mm1_jax.data.build import world
from mm1_jax.data.image import on_white

SCHEMA_VERSION = 1
PARTS = ("captions", "interleaved", "text", "sft")
SIDES = ("train", "heldout")
NUM_SHARDS = {("captions", "train"): 2}  # a shard costs 64 KiB before its first record
HELDOUT_FRACTION = 0.1  # of components
# A component with more of the records than this is trained on: held out, it would be the only one.
MAX_HELDOUT_COMPONENT = 0.01
# Credit lines of images that the books could use, but that ask for more than attribution.
RESTRICTED = re.compile(
  r"BY[- ](?:NC|SA|ND)\b|share.?alike|non-?commercial|no-?deriv|GFDL|GNU|permission|fair use"
  r"|all rights|\u00a9|copyright(?! rice)",
  re.IGNORECASE,
)
# A credit in a printed caption: brackets that begin with it, or hold a copyright sign; one level of
# brackets inside them.
CREDIT_LINE = re.compile(
  r"\((?:credit|attribution|source)(?:[^()]|\([^()]*\))*\)|\([^()]*\u00a9[^()]*\)", re.IGNORECASE
)
MAX_PIXELS = 96 * 80  # of a shipped image; its aspect ratio is kept
JPEG_QUALITY = 80
MAX_CAPTION = 300  # characters
# Characters of a textbook module; longer ones link other records, but would leave room for few.
MAX_MODULE = 12_000
MAX_CHAPTER = 20_000  # characters of a novel or play
VOCAB_SIZE = 4096
SMALL_VOCAB = 1024  # of a tokenizer for the world and the captions: in minutes its head is trained

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Quota:
  """How much of one origin is shipped."""

  train_bytes: float  # JPEG bytes plus half the characters, which is near what zstd leaves
  num_heldout: int


QUOTAS = {
  ("captions", "openclipart"): Quota(float("inf"), 180),
  ("captions", "openstax"): Quota(6.1e6, 300),
  ("interleaved", "openstax"): Quota(2.1e6, 32),
  ("text", "openstax"): Quota(0.8e6, 30),
  ("text", "gutenberg"): Quota(1.0e6, 20),
  ("text", "tinyshakespeare"): Quota(0.2e6, 4),
  ("sft", "nlvr"): Quota(0.75e6, 100),
  ("sft", "openstax-exercise"): Quota(0.45e6, 50),
  ("sft", "openstax-alt"): Quota(0.5e6, 50),
  ("sft", "openstax-exercise-text"): Quota(0.25e6, 50),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A record that may be shipped, and its links to other records."""

  part: str
  origin: str
  record: sources.Record
  links: tuple[str, ...]

  @property
  def order(self) -> str:
    return _digest(f"order/{self.part}/{self.record['id']}")

  @property
  def cost(self) -> float:
    return sum(len(i["image"]) if "image" in i else len(i["text"]) / 2 for i in _items(self.record))


def main() -> None:
  parser = cli.make_parser("mm1_jax.data.build.sample", __doc__)
  parser.add_argument("--raw", type=pathlib.Path, required=True, help="the raw data dump")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
  args = parser.parse_args()
  logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
  build(args.raw, args.out)


def build(raw: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the sample in `raw` to `out`, over what is there."""
  images = Images(_image_credits(raw))
  candidates = [
    *_captions(raw, images),
    *_interleaved(raw, images),
    *_text(raw),
    *_sft(raw, images),
  ]
  sides = split_sides([c.links for c in candidates])
  chosen = choose(candidates, sides)
  out.mkdir(parents=True, exist_ok=True)
  for old in out.glob("*.arrayrecord"):
    old.unlink()
  manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "parts": {}}
  for (part, side), group in chosen.items():
    records = [c.record for c in group]
    shards = NUM_SHARDS.get((part, side), 1)
    paths = sources.write_shards(records, str(out / f"{part}-{side}"), shards)
    manifest["parts"][f"{part}-{side}"] = _statistics(records, paths)
  shipped = [c.record for group in chosen.values() for c in group]
  trained = [c.record for p in PARTS for c in chosen[p, "train"]]
  captions = [c.record for c in chosen["captions", "train"]]
  seen: list[sources.Record] = []
  for (part, side), records in world.records(raw).items():
    paths = sources.write_shards(records, str(out / f"{part}-{side}"), 1)
    manifest["parts"][f"{part}-{side}"] = _statistics(records, paths)
    shipped += records
    seen += records if side == "train" else []
  for name, size, read in (
    ("tokenizer", VOCAB_SIZE, trained),
    (f"tokenizer_{SMALL_VOCAB}", SMALL_VOCAB, [*seen, *captions]),
  ):
    model = train_tokenizer(_texts(read), size)
    (out / f"{name}.model").write_bytes(model)
    manifest[name] = {"vocab_size": size, "bytes": len(model)}
  (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
  (out / "CREDITS.md").write_text(_credits(raw, shipped))
  logging.info("%s", json.dumps(manifest, indent=2))


# --- images


class Images:
  """Raw image files, made small and linked to what looks the same.

  Args:
    credits: credit lines of the textbooks' images, by file stem.
  """

  def __init__(self, credits: Mapping[str, str]):
    self._credits = credits
    self._small: dict[pathlib.Path, tuple[bytes, tuple[str, ...]]] = {}

  def read(self, path: pathlib.Path) -> tuple[bytes, tuple[str, ...]]:
    """Returns a small JPEG of the file, and its links."""
    if path not in self._small:
      with PIL.Image.open(path) as file:
        image = on_white(file)
      data = _small_jpeg(image)
      links = [f"file/{path.stem}", f"bytes/{_digest(data)}"]
      if look := _look(image):
        links.append(f"look/{look}")
      self._small[path] = data, tuple(links)
    return self._small[path]

  def credit(self, paths: Iterable[str]) -> str:
    """Returns the credit lines of these files, each once."""
    lines = (self._credits.get(pathlib.Path(path).stem, "") for path in paths)
    return " ".join(dict.fromkeys(line for line in lines if line))

  def may_ship(self, paths: Iterable[str]) -> bool:
    """Returns whether no credit line asks for more than attribution."""
    return not RESTRICTED.search(self.credit(paths))


def _image_credits(raw: pathlib.Path) -> dict[str, str]:
  """Returns credit lines by file stem; some books print them at the end of the caption."""
  credits = {}
  for row in raw_rows(raw / "captions" / "openstax_alt.jsonl"):
    printed = CREDIT_LINE.findall(" ".join(row["captions"][1:]))
    credits[pathlib.Path(row["image"]).stem] = row["credit"] or " ".join(printed)
  return credits


def _small_jpeg(image: PIL.Image.Image) -> bytes:
  scale = min(1.0, (MAX_PIXELS / (image.width * image.height)) ** 0.5)
  size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
  data = io.BytesIO()
  if image.height > 2 * image.width:
    # The shipped ones had the height resized first, and the order shows in the last bits. Which one
    # Pillow takes for such pictures depends on its version.
    image = image.resize((image.width, size[1]), PIL.Image.Resampling.BICUBIC)
  small = image.resize(size, PIL.Image.Resampling.BICUBIC)
  small.save(data, "JPEG", quality=JPEG_QUALITY, optimize=True)
  return data.getvalue()


def _look(image: PIL.Image.Image) -> str:
  """Returns the signs of the brightness gradients on a coarse grid; '' for a nearly blank image."""
  grid = np.asarray(image.convert("L").resize((12, 12), PIL.Image.Resampling.BOX), np.int32)
  across, down = np.diff(grid, axis=1) > 2, np.diff(grid, axis=0) > 2
  bits = np.concatenate([across.ravel(), down.ravel()])
  return np.packbits(bits).tobytes().hex() if bits.sum() >= 24 else ""


# --- candidates


def _captions(raw: pathlib.Path, images: Images) -> Iterator[Candidate]:
  folder = raw / "captions"
  for row in raw_rows(folder / "openstax_alt.jsonl"):
    text = shorten(row["captions"][0])
    image, links = images.read(folder / row["image"])
    links = (*links, f"module/{row['module']}", f"text/{_plain(row['captions'][0])}")
    record = _document(
      row,
      [{"image": image}, {"text": text}],
      id=f"caption/{row['id']}",
      image_credit=images.credit([row["image"]]),
    )
    part = "captions" if images.may_ship([row["image"]]) else "unused"
    yield Candidate(part, "openstax", record, links)
  for row in raw_rows(folder / "clipart.jsonl"):
    text = _clipart_caption(row)
    image, links = images.read(folder / row["image"])
    title = re.sub(r"[^a-z]", "", row["captions"][0].lower())
    links = (*links, f"clipart/{title}/{'/'.join(sorted(row['keywords']))}")
    record = _document(row, [{"image": image}, {"text": text}], id=f"caption/{row['id']}")
    yield Candidate("captions", "openclipart", record, links)


def _interleaved(raw: pathlib.Path, images: Images) -> Iterator[Candidate]:
  for row in raw_rows(raw / "interleaved" / "openstax.jsonl.gz"):
    num_chars = sum(len(item.get("text", "")) for item in row["content"])
    paths = [item["image"] for item in row["content"] if item["type"] == "image"]
    read = {path: images.read(raw / "interleaved" / path) for path in paths}
    content = page_items(row, {path: image for path, (image, _) in read.items()})
    links = [f"module/{row['id'].split('/')[-1]}"]
    links += [link for _, image_links in read.values() for link in image_links]
    fits = len(paths) <= 10 and num_chars <= MAX_MODULE and images.may_ship(paths)
    record = _document(row, content, image_credit=images.credit(paths))
    yield Candidate("interleaved" if fits else "unused", "openstax", record, tuple(links))


def page_items(row: Row, images: Mapping[str, bytes]) -> list[dict[str, Any]]:
  """Returns the items of a textbook module, its pictures from `images` by path."""
  items: list[dict[str, Any]] = []
  for item in row["content"]:
    if item["type"] == "image":
      items.append({"image": images[item["image"]]})
    elif item["text"].strip():
      # The dump's items have no space around them; a picture is on a line of its own.
      items.append({"text": ("\n" if items else "") + item["text"].strip() + "\n"})
  return items


def _text(raw: pathlib.Path) -> Iterator[Candidate]:
  for row in raw_rows(raw / "text" / "text.jsonl.gz"):
    if ("text", row["source"]) not in QUOTAS:
      continue
    if row["source"] == "openstax":
      links = (f"module/{row['id'].split('/')[-1]}",)
    elif "shakespeare" in row["id"]:
      # Chunks of one file, and other plays by the same hand: blocks keep neighbours together.
      block = int(row["id"].rsplit("/", 1)[1]) // 9
      links = (f"book/{row['id'].rsplit('/', 1)[0]}/{block}",)
    else:
      links = (f"book/{row['id'].split('/')[1]}",)
    part = "unused" if row["source"] == "openstax" and len(row["text"]) > MAX_MODULE else "text"
    text = row["text"][:MAX_CHAPTER]  # some novels are one row
    yield Candidate(part, row["source"], _document(row, [{"text": text}]), links)


def _sft(raw: pathlib.Path, images: Images) -> Iterator[Candidate]:
  folder = raw / "sft"
  for row in raw_rows(folder / "sft.jsonl"):
    if ("sft", row["source"]) not in QUOTAS:
      continue
    pictures, links = [], [f"text/{_plain(row['question'] + row['answer'])}"]
    for path in row["images"]:
      image, image_links = images.read(folder / path)
      pictures.append({"image": image})
      links += image_links if row["source"] != "nlvr" else image_links[:2]
    if row["source"] == "nlvr":
      # nlvr/test/2591-3/0: sentence 2591 about its picture 3, whose boxes are permuted.
      links = [link for link in links if not link.startswith("text/")]
      links.append(f"nlvr/{row['id'].split('/')[1]}/{row['id'].split('/')[2].split('-')[0]}")
    if row["source"] == "openstax-exercise":
      links.append(f"module/{row['id'].split('/')[2]}")
    # A very long description teaches a tiny model little.
    answer = shorten(row["answer"]) if row["source"] == "openstax-alt" else row["answer"]
    question = [*pictures, {"text": row["question"]}]
    record = _conversation(row, question, answer, image_credit=images.credit(row["images"]))
    part = "sft" if images.may_ship(row["images"]) else "unused"
    yield Candidate(part, row["source"], record, tuple(links))
  for row in raw_rows(folder / "text_only.jsonl.gz"):
    question, answer = (turn["value"] for turn in row["conversations"])
    links = (f"module/{row['id'].split('/')[2]}", f"text/{_plain(question + answer)}")
    record = _conversation(row, [{"text": question}], answer)
    yield Candidate("sft", "openstax-exercise-text", record, links)


def _document(
  row: Row, content: list[dict[str, Any]], *, id: str | None = None, image_credit: str = ""
) -> sources.Record:
  return {**_header(row, image_credit), "id": id or row["id"], "content": content}


def _conversation(
  row: Row, question: list[dict[str, Any]], answer: str, *, image_credit: str = ""
) -> sources.Record:
  turns = [
    {"role": "user", "content": question},
    {"role": "assistant", "content": [{"text": answer}]},
  ]
  return {**_header(row, image_credit), "turns": turns}


def _header(row: Row, image_credit: str) -> dict[str, str]:
  credit = [row.get("book", ""), row.get("title", ""), image_credit, row.get("url", "")]
  if row["source"].startswith("openstax"):
    credit.append("Access for free at openstax.org.")
  return {
    "id": row["id"],
    "source": row["source"],
    "license": row["license"],
    "credit": " | ".join(part for part in credit if part),
  }


def shorten(text: str) -> str:
  """Cuts a text at the end of a sentence, else of a word, within `MAX_CAPTION` characters."""
  text = " ".join(text.split())
  if len(text) <= MAX_CAPTION:
    return text
  head = text[: MAX_CAPTION + 1]
  sentences = list(re.finditer(r"[.!?][\"\u201d')]?(?=\s)", head))
  if sentences and sentences[-1].end() >= MAX_CAPTION // 4:
    return head[: sentences[-1].end()]
  return head.rsplit(" ", 1)[0]


def _clipart_caption(row: Row) -> str:
  """Joins title, description and keywords; leaves out what says nothing about the picture."""
  said: list[str] = []
  for text in row["captions"]:
    text = re.sub(r"^Clipart by .* - |^Part of the .*|\S+@\S+", "", text)
    text = text.replace("_", " ").strip(" .")
    if text and text.lower() not in " ".join(said).lower():
      said.append(text)
  keywords = [k.replace("_", " ") for k in row["keywords"] if k != "unsorted"]
  if keywords:
    said.append(f"Keywords: {', '.join(keywords)}")
  return shorten(". ".join(said) + ".")


# --- the split, and the choice


def split_sides(links: list[tuple[str, ...]]) -> list[str]:
  """Returns the side of each record, the same for all that are linked, however far."""
  parent: dict[str, str] = {}

  def root(link: str) -> str:
    parent.setdefault(link, link)
    while parent[link] != link:
      parent[link] = parent[parent[link]]
      link = parent[link]
    return link

  for first, *rest in links:
    for link in rest:
      a, b = sorted((root(first), root(link)))
      parent[b] = a  # the smallest name identifies the component
  roots = [root(first) for first, *_ in links]
  sizes = collections.Counter(roots)
  logging.info("components: %d, largest %s", len(sizes), sizes.most_common(3))

  def side(name: str) -> str:
    small = sizes[name] <= MAX_HELDOUT_COMPONENT * len(links)
    chance = int(_digest(f"side/{name}")[:8], 16) / 2**32
    return "heldout" if small and chance < HELDOUT_FRACTION else "train"

  return [side(name) for name in roots]


def choose(candidates: list[Candidate], sides: list[str]) -> dict[tuple[str, str], list[Candidate]]:
  """Fills each origin's quota in the order of a hash; returns records by part and side."""
  groups: dict[tuple[str, str, str], list[Candidate]] = collections.defaultdict(list)
  for candidate, side in zip(candidates, sides, strict=True):
    groups[candidate.part, candidate.origin, side].append(candidate)
  chosen = {(part, side): [] for part in PARTS for side in SIDES}
  for (part, origin), quota in QUOTAS.items():
    heldout = sorted(groups[part, origin, "heldout"], key=lambda c: c.order)
    chosen[part, "heldout"] += heldout[: quota.num_heldout]
    spent = 0.0
    for candidate in sorted(groups[part, origin, "train"], key=lambda c: c.order):
      if spent + candidate.cost > quota.train_bytes:
        break
      spent += candidate.cost
      chosen[part, "train"].append(candidate)
  return {key: sorted(group, key=lambda c: c.order) for key, group in chosen.items()}


# --- what goes with the shards


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains the SentencePiece model that `tokenizer.Tokenizer` reads."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    model_type="bpe",
    vocab_size=vocab_size,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    pad_piece="<pad>",
    control_symbols=[tokenizer.IMAGE, tokenizer.IMAGE_START, tokenizer.IMAGE_END],
    user_defined_symbols=["\n"],  # else a line's last and the next line's first word make one piece
    # No character is unknown, and none is changed.
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    split_digits=True,
    max_sentence_length=1 << 20,
    num_threads=1,
    minloglevel=1,
  )
  return model.getvalue()


def _texts(records: Iterable[sources.Record]) -> Iterator[str]:
  for record in records:
    for turn in record.get("turns", ()):
      yield f"{turn['role'].upper()}: "
    for item in _items(record):
      if "text" in item:
        yield item["text"]


def _statistics(records: list[sources.Record], paths: list[str]) -> dict[str, Any]:
  items = [item for record in records for item in _items(record)]
  return {
    "records": len(records),
    "images": sum("image" in item for item in items),
    "characters": sum(len(item.get("text", "")) for item in items),
    "bytes": sum(pathlib.Path(p).stat().st_size for p in paths),
    "by_source": dict(sorted(collections.Counter(r["source"] for r in records).items())),
  }


def _credits(raw: pathlib.Path, records: list[sources.Record]) -> str:
  books = collections.defaultdict(set)
  for row in raw_rows(raw / "interleaved" / "openstax.jsonl.gz"):
    repository, _, path = row["url"].partition("/blob/")
    books[row["book"]].add(f"{repository} at {path[:9]}")
  listing = "\n".join(
    f"- {book}: {', '.join(sorted(repos))}" for book, repos in sorted(books.items())
  )
  licenses = collections.Counter(
    (r["source"], r["license"]) for r in records if r["source"] != world.SOURCE
  )
  table = "\n".join(f"| {s} | {n} | {license} |" for (s, license), n in sorted(licenses.items()))
  return f"""# Credits of the sample

Every record has its own `source`, `license` and `credit`; an image's credit line, where its book
prints one, is in `credit`. Changes we made: images are scaled down and encoded again as JPEG,
descriptions are cut to about {MAX_CAPTION} characters, mathematics is flattened to plain text.

| source | records | licence |
|---|---|---|
{table}

- **openstax, openstax-alt, openstax-exercise**: OpenStax textbooks, Creative Commons Attribution
  4.0 (https://creativecommons.org/licenses/by/4.0/). Access for free at openstax.org.
- **nlvr**: Cornell Natural Language Visual Reasoning (Suhr, Lewis, Yeh, Artzi, ACL 2017),
  https://github.com/lil-lab/nlvr, Creative Commons Attribution 4.0.
- **openclipart**: Open Clip Art Library 0.18 as packaged by Debian, dedicated to the public domain.
- **gutenberg**: books in the public domain in the USA, by way of Project Gutenberg.
- **tinyshakespeare**: Shakespeare's plays, public domain, as collected for karpathy/char-rnn.

The wording of the exercise prompt "Describe the image." and its variants is ours.

## The small world
Records of the source `{world.SOURCE}` have pictures drawn from the digits and icons below: their
`pictures` names them, `license` and `credit` are those of all of them. Changes we made: they are
scaled, placed on white, encoded as WebP; digits are inked. The questions, answers and sentences
are ours, under the licence of the code; names of things are Unicode CLDR's, by way of
emojibase-data 17.0.0 (MIT).

{world.credits(records)}

## OpenStax books, and the commit each was taken from
{listing}
"""


# --- small helpers


def _items(record: sources.Record) -> list[dict[str, Any]]:
  if "content" in record:
    return record["content"]
  return [item for turn in record["turns"] for item in turn["content"]]


def raw_rows(path: pathlib.Path) -> Iterator[Row]:
  """Yields the rows of a .jsonl or .jsonl.gz file of the dump."""
  opener = gzip.open if path.suffix == ".gz" else open
  with opener(path, "rt", encoding="utf-8") as lines:
    yield from map(json.loads, lines)


def _plain(text: str) -> str:
  return _digest(re.sub(r"\W", "", text.lower()))


def _digest(data: str | bytes) -> str:
  return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:24]


if __name__ == "__main__":
  cli.run(main)
