# SPDX-License-Identifier: Apache-2.0
"""Results as one HTML page: figures with their errors, then each job's items, the worst first.

Without scripts, and nothing is fetched: a picture is shown wherever it occurs, and kept once.
"""

import collections
import concurrent.futures
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from mm1_jax.data.image import ImageError, decode_image, read_header
from mm1_jax.drawing import as_html, counted, data_url, elided, page, shorten, thumbnail
from mm1_jax.eval import few_shot, report, results
from mm1_jax.eval.evaluate import CONTROLS, Result
from mm1_jax.eval.replies import Answered
from mm1_jax.eval.task import Form, Item, Likelihood, Picture

MOST_ITEMS = 200  # shown of a job
MOST_DROPPED = 50  # reasons shown of a job
MOST_PICTURES = 8  # shown of an item
MOST_ANSWERS = 12  # different ones shown of an item
SIDE, SMALL_SIDE = 224, 96  # pixels of an item's picture, and of a demonstration's
# Different pictures on a page, items' first: about 20 MB in all.
MOST_THUMBNAILS, MOST_SMALL = 1000, 2000
NUM_THREADS = 4
BAR = 140, 16  # pixels

STYLE = """
main { max-width: 1240px; } section { margin: 0 0 28px; }
.note, small { color: #5f6570; } small { font-size: 13px; } .scroll { overflow-x: auto; }
td { vertical-align: top; white-space: nowrap; } td.wide { white-space: normal; }
th.left, td.left { text-align: left; } td, .text, dd { overflow-wrap: anywhere; }
.card { background: #fff; border-radius: 8px; padding: 12px 18px; margin: 0 0 12px;
  border-left: 6px solid #d9dbe0; display: flex; gap: 18px; flex-wrap: wrap; }
.card.right { border-left-color: #009e73; } .card.wrong { border-left-color: #c0260b; }
.pictures { display: flex; flex-wrap: wrap; gap: 8px; flex: 0 1 auto; align-content: flex-start; }
.words { flex: 1 1 460px; min-width: 0; } .words p { margin: 0 0 6px; }
.picture { display: inline-block; max-width: 100%; border-radius: 4px;
  background: #eceef1 center / contain no-repeat; }
.small .picture { vertical-align: middle; margin: 2px 6px 2px 0; }
.bad { color: #c0260b; font-weight: 600; } .good { color: #2f7a3f; font-weight: 600; }
.problem { max-width: 224px; font-size: 13px; overflow-wrap: anywhere; }
dl { margin: 0; display: grid; grid-template-columns: 84px 1fr; gap: 4px 8px; }
dt { color: #5f6570; font-size: 13px; line-height: 24px; }
dd { margin: 0; white-space: pre-wrap; unicode-bidi: plaintext; } dd.said { font-weight: 600; }
.words table { margin-top: 6px; font-size: 14px; } .words td, .words th { padding: 2px 12px; }
.words td.left { white-space: pre-wrap; unicode-bidi: plaintext; }
.cut { color: #5f6570; font-style: italic; } details { margin-top: 6px; }
summary { cursor: pointer; color: #5f6570; }
.shown { padding: 6px 0; border-top: 1px solid #eceef1; }
"""


def write_page(path: epath.Path, of: Sequence[Result], values: Mapping[str, Any]) -> None:
  """Writes the page of an evaluation.

  Args:
    path: the file, in the folder of `results.json`; links to other files there are relative.
    of: all results.
    values: what `results.json` holds.
  """
  of = [result for trials in results.by_trial(of) for result in trials]  # as in `values`
  shown = [_worst_first(result)[:MOST_ITEMS] for result in of]
  pictures = _Pictures(shown)
  jobs = [
    _job(f"j{number}", result, items, path.parent, pictures)
    for number, (result, items) in enumerate(zip(of, shown, strict=True))
  ]
  body = _summary(values) + "".join(jobs)
  html = page(f"{report.title(values)}: evaluation", body, STYLE + pictures.css)
  results.write_whole(path, html)


class _Pictures:
  """Thumbnails by picture; each is in the page's style, once."""

  def __init__(self, shown: Iterable[list["_Shown"]]):
    items = [one.answered for of_job in shown for one in of_job]
    large = _distinct(p for one in items for p in one.item.pictures[:MOST_PICTURES])
    small = _distinct(
      p for one in items for item in one.demonstrations for p in item.pictures[:MOST_PICTURES]
    )
    asked = {key: (p, SIDE) for key, p in list(large.items())[:MOST_THUMBNAILS]}
    rest = [(key, (p, SMALL_SIDE)) for key, p in small.items() if key not in asked]
    asked |= dict(rest[:MOST_SMALL])
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
      found = [*pool.map(lambda one: _thumbnail(*one), asked.values())]
    self._names, self._problems, rules = {}, {}, []
    for number, (key, (size, jpeg, problem)) in enumerate(zip(asked, found, strict=True)):
      self._names[key], self._problems[key] = f"p{number}", problem
      if not problem:
        rules.append(_rules(f"p{number}", size, data_url(jpeg, "jpeg")))
    self.css = "".join(rules)

  def html(self, item: Item) -> str:
    more = len(item.pictures) - MOST_PICTURES
    shown = "".join(map(self._one, item.pictures[:MOST_PICTURES]))
    return shown + (f"<p class=cut>and {counted(more, 'picture')} more</p>" if more > 0 else "")

  def _one(self, picture: Picture) -> str:
    key = few_shot.identity(picture)
    name = "bytes" if isinstance(picture, bytes) else picture.name
    if key not in self._names:
      return f"<span class=cut>{shorten(name, 80)}: not shown, the page is full</span>"
    if problem := self._problems[key]:
      wrong = f"<span class=bad>✗ {as_html(problem)}</span>"
      return f"<span class=problem>{wrong}<br>{shorten(name, 200)}</span>"
    label = shorten(name, 80)
    return (
      f'<span class="picture {self._names[key]}" role=img title="{label}" aria-label="{label}">'
      "</span>"
    )


def _rules(name: str, size: tuple[int, int], url: str) -> str:
  """Returns the style of one picture: at its thumbnail's width, smaller among demonstrations."""
  width, height = size
  small = max(1, round(width * min(1.0, SMALL_SIDE / max(size))))
  return (
    f".{name} {{ width: {width}px; aspect-ratio: {width} / {height};"
    f" background-image: url({url}); }}\n.small .{name} {{ width: {small}px; }}\n"
  )


def _distinct(pictures: Iterable[Picture]) -> dict[str, Picture]:
  return {few_shot.identity(picture): picture for picture in pictures}


def _thumbnail(picture: Picture, side: int) -> tuple[tuple[int, int], bytes, str]:
  """Returns width and height, a JPEG, and what is wrong with the picture; "" if nothing."""
  try:
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
  except OSError as e:
    return (1, 1), b"", f"cannot be read ({type(e).__name__})"
  (height, width), _ = read_header(data)
  scale = min(1.0, side / max(height, width))
  height, width = (max(1, round(scale * s)) for s in (height, width))
  try:
    pixels = decode_image(data, (height, width))
  except (ImageError, MemoryError) as e:
    return (1, 1), b"", str(e) or "too large"
  return (width, height), thumbnail(PIL.Image.fromarray(pixels), side), ""


# --- Figures ---


def _summary(values: Mapping[str, Any]) -> str:
  facts = "".join(
    f"<tr><td>{as_html(key)}<td class='wide left'>{shorten(text, 400)}"
    for key, text in report.facts(values)
  )
  top = _tops(values["results"])
  lines, number = [], 0
  for entry in values["results"]:
    rows = _entry_rows(entry, number, top)
    lines += [f"<tr>{row}" for row in rows]
    number += len(entry["files"])
  head = (
    "<tr><th>task<th class=left>split<th class=left>form<th>shots<th class=left>control<th>items"
    "<th class=left>metric<th>value<th class=left>"
  )
  return (
    f"<section><div class=scroll><table>{head}{''.join(lines)}</table></div>"
    "<p class=note>Errors are standard errors. Shares are in %; a bar begins at 0 and ends at "
    "100 %, or at the largest value of its metric. In the last line of a control is the paired "
    "difference of items with their own pictures and this control.</p>"
    f"<details><summary>Run, versions and settings</summary><table>{facts}</table></details>"
    "</section>\n"
  )


def _tops(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the largest value of each metric that is no share."""
  top: dict[str, float] = {}
  for entry in entries:
    for metric, value in entry["values"].items():
      if value["mean"] is not None:
        top[metric] = max(top.get(metric, 0.0), value["mean"] + (value["standard_error"] or 0.0))
  return top


def _entry_rows(entry: Mapping[str, Any], number: int, top: Mapping[str, float]) -> Iterator[str]:
  """Yields the cells of each line of a result, whose first job is section `number`."""
  trials = len(entry["files"])
  dropped = len(entry["dropped"])
  cells = (
    f"<td><a href='#j{number}'>{shorten(entry['task'], 60)}</a><td class=left>"
    f"{shorten(entry['split'], 40)}<td class=left>{shorten(entry['form'], 40)}"
    f"<td>{entry['shots']}{f' x{trials} draws' if trials > 1 else ''}"
    f"<td class=left>{as_html(entry['control'])}<td>{entry['items'] - dropped:,}"
    f"{f' <span class=bad>({dropped:,} dropped)</span>' if dropped else ''}"
  )
  if not entry["values"]:
    yield f"{cells}<td class=left>not scored here<td><td>"
  for metric, value in entry["values"].items():
    yield (
      f"{cells}<td class=left>{shorten(metric, 60)}<td>{report.value_of(metric, value)}"
      f"<td class=left>{_bar(metric, value, top)}"
    )
    cells = "<td><td><td><td><td><td>"
  if minus := entry["own_minus_this"]:
    text = report.value_of(minus["metric"], minus, sign=True)
    yield f"{cells}<td class=left>own - {as_html(entry['control'])}<td>{text}<td>"


def _bar(metric: str, value: Mapping[str, Any], top: Mapping[str, float]) -> str:
  """Returns a bar of a value, and a line from one standard error below it to one above."""
  mean, error = value["mean"], value["standard_error"] or 0.0
  if mean is None or mean < 0:
    return ""
  width, height = BAR
  full = 1.0 if report.is_share(metric, mean) else top[metric] or 1.0
  at, low, high = (
    round(width * min(1.0, max(0.0, x / full)), 1) for x in (mean, mean - error, mean + error)
  )
  middle = height / 2
  whisker = "".join(f"M{x} {middle - 4}v8" for x in (low, high)) + f"M{low} {middle}H{high}"
  return (
    f'<svg width="{width}" height="{height}" role="img" aria-label="bar">'
    f'<rect width="{width}" height="{height}" fill="#eceef1"/>'
    f'<rect width="{at}" height="{height}" fill="#56b4e9"/>'
    + (f'<path d="{whisker}" stroke="#1f2430" fill="none" stroke-width="1.5"/>' if error else "")
    + "</svg>"
  )


# --- Items ---


class _Shown(NamedTuple):
  """An item on the page."""

  answered: Answered
  score: float  # NaN where it has none
  right: bool | None


def _worst_first(result: Result) -> list[_Shown]:
  """Returns the scored items: wrong ones before right ones, then by score; none of them last."""
  scores, found = result.scores, []
  for i, answered in enumerate(result.scored):
    right = None if scores is None or scores.right is None else bool(scores.right[i])
    found.append(_Shown(answered, math.nan if scores is None else float(scores.per_item[i]), right))
  return sorted(found, key=lambda one: (one.right is True, math.isnan(one.score), one.score))


def _job(
  name: str, result: Result, shown: list[_Shown], folder: epath.Path, pictures: _Pictures
) -> str:
  job = result.job
  file = f"{results.ITEMS}/{job.name}.jsonl"
  lines = [f"<p class=note>{as_html(job.task.title)}: {shorten(job.task.metric, 400)}</p>"]
  if job.control != "own":
    lines.append(f"<p>Control: the model was shown {as_html(CONTROLS[job.control])}.</p>")
  lines += [_counts(result), _dropped(result), _submissions(folder, job.name)]
  if len(shown) < len(result.scored):
    told = f"The worst {len(shown)} of {len(result.scored):,} items"
  else:
    told = f"{counted(len(shown), 'item')}, the worst first"
  lines.append(
    f"<p class=note>{told}; all of them: <a href='{_href(file)}'>{as_html(file)}</a></p>"
  )
  form = job.task.forms[job.form]
  cards = "".join(_card(one, form, pictures) for one in shown)
  return f'<section id="{name}"><h2>{as_html(job.name)}</h2>{"".join(lines)}</section>\n{cards}'


def _href(path: str) -> str:
  return urllib.parse.quote(path)


def _counts(result: Result) -> str:
  found = []
  scores = result.scores
  if scores is not None and scores.right is not None:
    right = int(np.sum(scores.right))
    found = [f"{right:,} right", f"{len(scores.right) - right:,} wrong"]
  counts = {} if scores is None else scores.counts
  found += [f"{as_html(what)}: {number:,}" for what, number in counts.items() if number]
  return f"<p>{' · '.join(found)}</p>" if found else ""


def _dropped(result: Result) -> str:
  if not result.dropped:
    return ""
  lines = "".join(
    f"<tr><td>{shorten(one.item.id, 100)}<td class='wide left'>{shorten(one.problem, 500)}"
    for one in result.dropped[:MOST_DROPPED]
  )
  more = len(result.dropped) - MOST_DROPPED
  lines += f"<tr><td class=cut>and {more:,} more<td>" if more > 0 else ""
  count = counted(len(result.dropped), "item")
  return (
    f"<p class=bad>{count} could not be asked, and no score counts them:</p>"
    f"<table><tr><th>item<th class=left>why{lines}</table>"
  )


def _submissions(folder: epath.Path, job: str) -> str:
  """Returns links to the official answer files that were written."""
  place = folder / results.SUBMISSIONS / job
  if not place.exists():
    return ""
  links = [
    f"<a href='{_href(f'{results.SUBMISSIONS}/{job}/{file.name}')}'>{as_html(file.name)}</a>"
    for file in sorted(place.iterdir())
  ]
  return f"<p>Official answer file: {', '.join(links)}</p>" if links else ""


def _card(shown: _Shown, form: Form, pictures: _Pictures) -> str:
  item, demonstrations, reply, _ = shown.answered
  kind = {True: "right", False: "wrong", None: ""}[shown.right]
  verdict = {
    True: " <span class=good>✓ right</span>",
    False: " <span class=bad>✗ wrong</span>",
    None: "",
  }[shown.right]
  score = "" if math.isnan(shown.score) else f" · score {shown.score:.3g}"
  details = "".join(
    f" · {shorten(str(key), 40)}: {shorten(str(value), 80)}"
    for key, value in item.details.items()
    if isinstance(value, str | int | float)
  )
  said = (
    f"<dt>answer<dd class=said>{elided(reply) or '(nothing)'}" if isinstance(reply, str) else ""
  )
  words = (
    f"<p>{shorten(item.id, 100)}{verdict}<small>{score}{details}</small></p>"
    f"<dl>{f'<dt>question<dd>{elided(item.question)}' if item.question else ''}{said}"
    f"<dt>truth<dd>{_answers(item)}</dl>{_choices(item, reply, form)}"
    f"{_demonstrations(demonstrations, form, pictures)}"
  )
  left = f"<div class=pictures>{pictures.html(item)}</div>" if item.pictures else ""
  return f'<div class="card {kind}">{left}<div class=words>{words}</div></div>\n'


def _answers(item: Item) -> str:
  """Returns all that is accepted or that people gave, the most frequent first."""
  if not item.answers:
    return "<span class=cut>not published</span>"
  said = collections.Counter(item.answers).most_common()
  shown = [
    f"{elided(text)}{f' <small>&times; {n}</small>' if n > 1 else ''}"
    for text, n in said[:MOST_ANSWERS]
  ]
  more = len(said) - MOST_ANSWERS
  return "\n".join(shown) + (f"\n<span class=cut>and {more} more</span>" if more > 0 else "")


def _choices(item: Item, reply: Any, form: Form) -> str:
  """Returns the choices, or what continuations were compared, with their likelihoods."""
  likelihoods = () if isinstance(reply, str) else reply
  texts = list(item.choices)
  if likelihoods and len(likelihoods) != len(texts):
    assert form.options is not None
    texts = [text for _, text in form.options(item)]
  if not texts:
    return ""
  best = max((one.log_prob for one in likelihoods), default=math.nan)
  head = "<th class=left>log-likelihood<th>tokens" if likelihoods else ""
  lines = "".join(
    f"<tr><td>{'<span class=good>✓</span>' if i == item.right else ''}<td class=left>{elided(text)}"
    f"{_likelihood(likelihoods[i], best) if likelihoods else ''}"
    for i, text in enumerate(texts)
  )
  return f"<table><tr><th><th class=left>option{head}{lines}</table>"


def _likelihood(one: Likelihood, best: float) -> str:
  text = f"{one.log_prob:.3f}"
  return f"<td>{f'<b>{text}</b>' if one.log_prob == best else text}<td>{one.num_tokens:,}"


def _demonstrations(items: Sequence[Item], form: Form, pictures: _Pictures) -> str:
  if not items:
    return ""
  lines = "".join(
    f"<div class='shown small'>{pictures.html(item)}{elided(item.question)} "
    f"<b>{elided(form.demonstration(item).strip() if form.demonstration else '')}</b> "
    f"<small>{shorten(item.id, 60)}</small></div>"
    for item in items
  )
  return f"<details><summary>{counted(len(items), 'demonstration')}</summary>{lines}</details>"
