# SPDX-License-Identifier: Apache-2.0
"""What a build is asked to do: its options, and the flags that set them.

Each format has its own flags; `python -m mm1_jax.data.build FORMAT --help` lists them. Nothing here
needs Beam.
"""

import dataclasses
import json
from typing import Any

from mm1_jax import cli
from mm1_jax.config import ConfigError
from mm1_jax.data.build.bounds import BOUNDS, Bounds

URL_WORDS = ("logo", "button", "icon", "plugin", "widget")
# The filters of MM1's web documents (arXiv 2403.09611, appendix A.1).
MM1_FILTERS = {
  "min_images": 1,
  "max_images": 30,
  "max_aspect": 2.0,
  "min_side": 100,
  "max_side": 10_000,
  "url_words": URL_WORDS,
  "max_repeats": 10,
  "first_copy_only": True,
}
# Options that do not change what is in a shard.
_OUTSIDE_SHARDS = ("input", "output", "max_bad_fraction", "overwrite", "rows_per_shard", "limit")


@dataclasses.dataclass(frozen=True)
class BuildOptions:
  """All that a build depends on, its files aside."""

  format: str
  input: str  # glob; of TFDS the name
  output: str  # prefix of all that is written
  images: str = ""  # image store: a folder, or a glob of tars
  source: str = ""  # of records that name none
  license: str = ""
  text_field: str = "text"
  answer_prompt: str = ""  # put after each question, on a line of its own
  txt_split: str = ""  # text between the documents of a .txt file; '' for one document a file
  split: str = "train"  # of a TFDS set
  data_dir: str = ""
  image_feature: str = ""  # dotted path
  text_feature: str = ""
  lost_images: str = "image"  # what is dropped with a picture that is missing or filtered
  max_chars: int = 0  # of one record
  max_image_mb: float = 0.0  # of one encoded picture
  decode_images: bool = False
  min_images: int | None = None
  max_images: int | None = None
  max_aspect: float | None = None  # of the longer to the shorter side
  min_side: int | None = None  # pixels
  max_side: int | None = None
  url_words: tuple[str, ...] = ()
  max_repeats: int | None = None
  first_copy_only: bool = False
  tokenizer: str = ""
  rows_per_shard: int = 10_000
  limit: int | None = None
  max_bad_fraction: float = 0.1
  overwrite: bool = False
  max_row_mb: float = BOUNDS.row / 1e6
  max_header_kb: float = BOUNDS.header / 1e3
  max_page_mb: float = BOUNDS.page / 1e6
  max_file_gb: float = BOUNDS.file / 1e9
  max_window_mb: float = BOUNDS.window / (1 << 20)

  @property
  def bounds(self) -> Bounds:
    row, page = int(self.max_row_mb * 1e6), int(self.max_page_mb * 1e6)
    header, file = int(self.max_header_kb * 1e3), int(self.max_file_gb * 1e9)
    return Bounds(row, header, page, file, int(self.max_window_mb * (1 << 20)))

  def shard_key(self) -> str:
    """Returns what the bytes of a shard depend on, its input aside, as JSON."""
    values = dataclasses.asdict(self)
    return json.dumps({k: v for k, v in values.items() if k not in _OUTSIDE_SHARDS})


@dataclasses.dataclass(frozen=True)
class FormatFlags:
  """How a format is asked for on the command line."""

  about: str
  example: str
  max_chars: int
  store: bool = False  # whether pictures are in a store of their own
  required_store: bool = True
  interleaved: bool = False
  images: bool = True
  max_file_gb: float = BOUNDS.file / 1e9


FORMATS = {
  "webdataset": FormatFlags(
    "img2dataset's or WebDataset's tars: pictures with .txt or .json beside them, by key",
    "--input='laion/*.tar' --output=data/laion --source=laion --license=CC-BY-4.0",
    max_chars=10_000,
  ),
  "coco": FormatFlags(
    "COCO's captions JSON and a folder of pictures; one record for each caption",
    "--input=captions_train2017.json --images=train2017 --output=data/coco",
    max_chars=10_000,
    max_file_gb=1,  # it is parsed whole
    store=True,
  ),
  "llava": FormatFlags(
    "conversations, JSON or JSON lines: human and gpt, <image> slots, any number of pictures",
    "--input=llava_v1_5_mix665k.json --images=llava_images --output=data/llava",
    max_chars=100_000,
    store=True,
    required_store=False,
  ),
  "obelics": FormatFlags(
    "OBELICS' parquet: parallel lists of texts and image URLs; pictures from a store",
    "--input='obelics/*.parquet' --images='store/*.tar' --output=data/web --mm1-filters",
    max_chars=1_000_000,
    store=True,
    interleaved=True,
  ),
  "mmc4": FormatFlags(
    "MMC4's JSON lines: sentences, and pictures matched to them; pictures from a store",
    "--input='mmc4/*.jsonl' --images=mmc4_images --output=data/mmc4 --mm1-filters",
    max_chars=1_000_000,
    store=True,
    interleaved=True,
  ),
  "text": FormatFlags(
    "plain text: .jsonl, .json, .txt (one document a file), .parquet; also compressed",
    "--input='books/*.jsonl.zst' --output=data/books --license='public domain'",
    max_chars=10_000_000,
    images=False,
  ),
  "tfds": FormatFlags(
    "a set of TensorFlow Datasets by name, in ArrayRecord files",
    "--input=coco_captions --image-feature=image --text-feature=captions.text --output=data/coco",
    max_chars=1_000_000,
  ),
}


_ABOVE_0 = ("max_row_mb", "max_header_kb", "max_page_mb", "max_file_gb", "max_window_mb")


def parse(argv: list[str], doc: str) -> tuple[BuildOptions, list[str]]:
  """Returns the options, and the arguments that are not ours but Beam's.

  Raises:
    ConfigError: a value makes no sense.
  """
  args, others = _parser(doc).parse_known_args(argv)
  values = vars(args)
  if values.pop("mm1_filters", False):
    values = {**values, **{k: v for k, v in MM1_FILTERS.items() if values[k] is None}}
  values["url_words"] = tuple(values.get("url_words") or ())
  values["first_copy_only"] = bool(values.get("first_copy_only"))
  options = BuildOptions(**values)
  _check(options)
  return options, others


def _check(options: BuildOptions) -> None:
  for name in (*_ABOVE_0, "rows_per_shard", "limit", "max_chars", "max_image_mb", "max_repeats"):
    value = getattr(options, name)
    if value is not None and value <= 0 and (name != "max_image_mb" or options.format != "text"):
      raise ConfigError(f"--{name.replace('_', '-')}={value} must be above 0.")
  if not 0 <= options.max_bad_fraction <= 1:
    raise ConfigError(f"--max-bad-fraction={options.max_bad_fraction} must be from 0 to 1.")
  if options.max_aspect is not None and options.max_aspect < 1:
    raise ConfigError(
      f"--max-aspect={options.max_aspect} must be at least 1: it is the longer side to the shorter."
    )
  for low, high in (("min_images", "max_images"), ("min_side", "max_side")):
    bounds = getattr(options, low), getattr(options, high)
    if None not in bounds and bounds[0] > bounds[1]:
      raise ConfigError(
        f"--{low.replace('_', '-')}={bounds[0]} is above --{high.replace('_', '-')}={bounds[1]}: "
        "nothing is left."
      )
  if options.format == "tfds" and not (options.image_feature or options.text_feature):
    raise ConfigError("tfds needs --image-feature, --text-feature or both, such as image.")


def _parser(doc: str) -> cli.Parser:
  examples = "\n\n".join(
    f"  {name:<11}{flags.about}\n    python -m mm1_jax.data.build {name} {flags.example}"
    for name, flags in FORMATS.items()
  )
  doc = f"{doc}\nFormats, each with an example:\n\n{examples}"
  parser = cli.make_parser("mm1_jax.data.build", doc)
  parser.passes_on = True
  formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
  for name, flags in FORMATS.items():
    example = f"python -m mm1_jax.data.build {name} {flags.example}"
    one = formats.add_parser(name, description=cli.spelled(f"{flags.about}.\n\n  {example}"))
    one.passes_on = True
    _add_flags(one, name, flags)
  return parser


def _add_flags(parser: cli.Parser, name: str, flags: FormatFlags) -> None:
  add = parser.add_argument
  add("--input", required=True, metavar="GLOB", help="files to read; of tfds the name")
  add("--output", required=True, metavar="PREFIX", help="of all that is written")
  add("--source", default=name, help=f"of records that name none ({name})")
  add("--license", default="unknown", help="of records that name none (unknown)")
  if flags.store:
    add(
      "--images",
      required=flags.required_store,
      default="",
      metavar="STORE",
      help="where the pictures are: a folder, or a glob of .tar files",
    )
  _add_format_flags(add, name)
  if flags.images:
    _add_image_flags(add, flags)
  add(
    "--max-chars",
    type=int,
    default=flags.max_chars,
    help=f"drop records with more characters ({flags.max_chars:,})",
  )
  add("--tokenizer", default="", metavar="FILE", help="SentencePiece model: count tokens too")
  add("--rows-per-shard", type=int, default=10_000, metavar="N", help="about (10000); a tar is one")
  add("--limit", type=int, metavar="N", help="at most N records: a try")
  add(
    "--max-bad-fraction",
    type=float,
    default=0.1,
    metavar="F",
    help="exit with an error if more rows than this cannot be used (0.1)",
  )
  _add_bounds(add, flags)
  add("--overwrite", action="store_true", help="build again what other flags or inputs built")


def _add_bounds(add: Any, flags: FormatFlags) -> None:
  """Adds what is held in memory of a file from anywhere, at most."""
  held = "drop rows, texts of a tar and cells of Parquet that are longer (64)"
  add("--max-row-mb", type=float, default=BOUNDS.row / 1e6, metavar="MB", help=held)
  header = "read a tar no further than a longer header, such as a name (64)"
  add("--max-header-kb", type=float, default=BOUNDS.header / 1e3, metavar="KB", help=header)
  page = "drop row groups of Parquet with a larger page, decompressed (256)"
  add("--max-page-mb", type=float, default=BOUNDS.page / 1e6, metavar="MB", help=page)
  file = f"drop what is after so much of a file, decompressed ({flags.max_file_gb:g})"
  add("--max-file-gb", type=float, default=flags.max_file_gb, metavar="GB", help=file)
  window = "refuse zstd and xz with a larger window, which is kept in memory (2048)"
  megabytes = BOUNDS.window / (1 << 20)
  add("--max-window-mb", type=float, default=megabytes, metavar="MB", help=window)


def _add_format_flags(add: Any, name: str) -> None:
  if name == "llava":
    add(
      "--answer-prompt",
      default="",
      metavar="TEXT",
      help="after each question, for sets of short answers: 'Answer the question using a single "
      "word or phrase.'",
    )
  if name == "text":
    add("--text-field", default="text", metavar="NAME", help="key or column of the text (text)")
    add("--txt-split", default="", metavar="TEXT", help="what parts documents in a .txt file")
  if name == "tfds":
    add("--split", default="train", help="split to read (train)")
    add("--data-dir", default="", metavar="FOLDER", help="where TFDS keeps its sets")
    add("--image-feature", default="", metavar="PATH", help="such as image")
    add("--text-feature", default="", metavar="PATH", help="such as captions.text")


def _add_image_flags(add: Any, flags: FormatFlags) -> None:
  if flags.interleaved:
    add(
      "--lost-images",
      choices=("image", "document"),
      default="image",
      help="what is dropped when a picture is missing or unreadable (image)",
    )
    add("--mm1-filters", action="store_true", help="all filters below, at MM1's values")
    add("--min-images", type=int, metavar="N", help="drop documents with fewer left (MM1: 1)")
    add("--max-images", type=int, metavar="N", help="drop documents with more (MM1: 30)")
    add("--first-copy-only", action="store_true", default=None, help="of a picture on a page (MM1)")
  add("--max-aspect", type=float, metavar="R", help="longer side to the shorter at most (MM1: 2)")
  add("--min-side", type=int, metavar="PX", help="of the shorter side (MM1: 100)")
  add("--max-side", type=int, metavar="PX", help="of the longer side (MM1: 10000)")
  add(
    "--url-words",
    type=lambda words: [w for w in words.lower().split(",") if w],
    metavar="A,B",
    help=f"drop pictures with these in their URL (MM1: {','.join(URL_WORDS)})",
  )
  add(
    "--max-repeats",
    type=int,
    metavar="N",
    help="drop pictures whose URL or bytes more than N records have (MM1: 10); reads all twice",
  )
  add("--max-image-mb", type=float, default=64.0, metavar="MB", help="of an encoded picture (64)")
  add("--decode-images", action="store_true", help="decode every picture, not only its header")
