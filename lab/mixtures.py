# SPDX-License-Identifier: Apache-2.0
"""Mixtures of captions, documents and text, from one start: what several findings compare.

Few-shot accuracy, as MM1's, is of answers whose form only the shots tell: a `Themed` document says
the same kind of thing of each of its pictures.
"""

import functools

from lab import measures, starts
from lab.documents import Loose, Prose, Stream, Themed
from lab.runs import Run
from lab.stream import Mixture

STEPS = 500
# Rows that three documents fill, and slots for as many captions as fill one: then shares of
# positions are what they say.
ROWS = {"data.seq_len": "256", "data.batch_size": "3", "data.images_per_row": "36"}
SHOTS = (0, 4, 8)
FEW_SHOT = {f"{n}-shot": functools.partial(measures.few_shot, shots=n) for n in SHOTS}
MEASURES = {"naming": measures.zero_shot, **FEW_SHOT, "text nats": measures.text}


def cell(captions: float, documents: float, text: float = 0.0, stream: Stream | None = None) -> Run:
  """Returns a run on shares of positions; `stream` is of other captions than `Loose()`."""
  parts = ((captions, stream or Loose()), (documents, Themed()), (text, Prose()))
  mixture: Mixture = tuple((share, of) for share, of in parts if share)
  return Run(mixture, STEPS, ROWS, starts.captions())
