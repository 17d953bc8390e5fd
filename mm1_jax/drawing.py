# SPDX-License-Identifier: Apache-2.0
"""What all pictures and pages for people share: colours, PNGs, and text made safe to show.

Texts come from data and from models, and are untrusted: figures draw them without mathtext, pages
escape them, and a page's policy forbids scripts and anything from outside.
"""

import base64
import html
import io
import unicodedata
import warnings
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

if TYPE_CHECKING:  # pages need no matplotlib, which is of an extra
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind; its red is left to what is wrong.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31", "#7a68a6", "#b8a800")
INK, MUTED, PADDING, PAPER, WRONG = "#1f2430", "#5f6570", "#d9dbe0", "#ffffff", "#c0260b"
DPI = 110
# Of a text that is longer, so many characters at its beginning and its end are shown.
BEGINNING, END = 1500, 300
JOINERS = "\u200c\u200d"  # control characters that some scripts and emojis are written with

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; background: #f5f6f8; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 28px; margin: 12px 0; } h2 { font-size: 20px; margin: 40px 0 12px; }
table { border-collapse: collapse; background: #fff; border-radius: 8px; }
th, td { padding: 6px 16px; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { color: #5f6570; font-weight: 500; }
tr + tr td { border-top: 1px solid #eceef1; }
"""


def color(number: int) -> str:
  return COLORS[number % len(COLORS)]


def to_png(figure: "Figure") -> bytes:
  out = io.BytesIO()
  _paint(figure).print_png(out)
  return out.getvalue()


def to_pixels(figure: "Figure") -> np.ndarray:
  """Returns uint8[H, W, 3]."""
  return np.asarray(_paint(figure).buffer_rgba())[..., :3].copy()


def _paint(figure: "Figure") -> "FigureCanvasAgg":
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    canvas.draw()
  return canvas


def printable(text: str) -> str:
  """Returns text without control characters, white space collapsed."""
  return " ".join(_without_controls(text).split())


def printable_lines(text: str) -> str:
  return "\n".join(printable(line) for line in text.strip().splitlines())


def as_html(text: str) -> str:
  """Returns text escaped, its lines and spaces kept, control characters as spaces."""
  return html.escape("\n".join(_without_controls(line) for line in text.split("\n")))


def elided(text: str) -> str:
  """Returns a text as HTML; of a long one its beginning and its end, and how much is left out."""
  left_out = len(text) - BEGINNING - END
  if left_out <= 0:
    return as_html(text)
  gap = f" <span class=cut>… {left_out:,} characters not shown …</span> "
  return as_html(text[:BEGINNING]) + gap + as_html(text[-END:])


def shorten(text: str, length: int) -> str:
  """Returns a text as HTML, cut to `length` characters."""
  return as_html(text if len(text) <= length else f"{text[: length - 1]}…")


def _without_controls(text: str) -> str:
  return "".join(" " if unicodedata.category(c)[0] == "C" and c not in JOINERS else c for c in text)


def counted(number: int, noun: str) -> str:
  """Returns "1 picture", "2 pictures"."""
  return f"{number:,} {noun}{'s' * (number != 1)}"


def img(png: bytes, alt: str) -> str:
  return f'<img alt="{html.escape(alt)}" src="{data_url(png, "png")}">'


def data_url(image: bytes, kind: str) -> str:
  return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def thumbnail(image: PIL.Image.Image, longest: int) -> bytes:
  """Returns a JPEG of an RGB image, shrunk to at most `longest` pixels on its longer side."""
  image = image.copy()
  image.thumbnail((longest, longest))
  out = io.BytesIO()
  image.save(out, "JPEG", quality=80)
  return out.getvalue()


def page(title: str, body: str, style: str = "") -> str:
  """Returns a whole HTML page around `body`: no scripts, nothing from outside."""
  title = html.escape(title)
  policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width">\n'
    f"<title>{title}</title><style>{STYLE}{style}</style></head>\n"
    f"<body><main><h1>{title}</h1>\n{body}</main></body></html>\n"
  )
