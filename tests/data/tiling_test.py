# SPDX-License-Identifier: Apache-2.0
"""Grids and token counts by hand, and the contents of each place of a cut picture."""

import dataclasses
import io

import numpy as np
import PIL.Image
import pytest

from mm1_jax.config import ConfigError, DataConfig, InputSpec, RunConfig, TilingConfig
from mm1_jax.data.examples import Encoder, make_encoder
from mm1_jax.data.image import PAD_COLOR
from mm1_jax.data.tiling import Tile, Tiler, candidate_grids, choose_grid, decode_pictures
from tests.helpers.records import conversation, document, items

R = 672  # side of MM1.5's encoder
MM1_5 = TilingConfig()
MM1 = TilingConfig(grid=(2, 2), overview="first")
T = 144


def picture(height: int, width: int) -> bytes:
  """A PNG in which every pixel encodes its place: red the row, green the column."""
  rows, columns = np.mgrid[:height, :width]
  pixels = np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 7], axis=-1)
  data = io.BytesIO()
  PIL.Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
  return data.getvalue()


def grey(height: int, width: int) -> bytes:
  data = io.BytesIO()
  PIL.Image.new("1", (width, height)).save(data, "PNG")
  return data.getvalue()


def test_candidate_grids_of_mm1_5():
  assert candidate_grids(MM1_5) == [
    *((1, n) for n in (4, 5, 6, 7, 8, 9)),
    *((2, 2), (2, 3), (2, 4)),
    *((3, 2), (3, 3)),
    *((4, 1), (4, 2)),
    *((n, 1) for n in (5, 6, 7, 8, 9)),
  ]


# By hand, for sub-images of 672. `held` grids need no smaller picture; of a grid a x b the picture
# covers what its aspect allows, and the rest is padding:
#   672 x 672    (1:1)  held by all; 2x2 and 3x3 have no padding, and 2x2 has fewer sub-images
#   1344 x 1344  (1:1)  held by 2x2 (and 3x3), without padding
#   2016 x 2016  (1:1)  held by 3x3 alone
#   3000 x 3000  (1:1)  held by none; 3x3 keeps most: 2016 x 2016
#   600 x 800    (3:4)  2x3: scale 2016/800 would make 1512 rows, so 1344/600 = 2.24: 1344 x 1792 of
#                       1344 x 2016, 301,056 of padding; 2x2: 1008 x 1344 of 1344 x 1344, 451,584
#   800 x 600    (4:3)  the same, turned: 3x2
#   448 x 672    (2:3)  2x3 is 1344 x 2016: 2:3 exactly, no padding
#   480 x 640    (3:4)  as 600 x 800
#   720 x 1280   (9:16) 2x3: 1134 x 2016 of 1344 x 2016, 423,360; 2x2: 756 x 1344 holds it, 790,272;
#                       2x4: 1344 x 2389.3 of 1344 x 2688, 401,408: the least
#   1080 x 1920  (9:16) 2x2 does not hold it; 2x3 does (1134 >= 1080), 423,360; 2x4 401,408: 2x4
#   300 x 3000   (1:10) 1x5 holds it (336 >= 300): 672 x 3360 - 336 x 3360 = 1,128,960; 1x6:
#                       403.2 x 4032, 1,083,801; 1x7: 470.4 x 4704, 948,326; 1x8: 537.6 x 5376,
#                       722,534; 1x9: 604.8 x 6048, 406,426: the least
#   6000 x 660   (100:11) 9x1 alone holds it: 6048 x 665.3
#   100 x 400    (1:4)  1x4 is 672 x 2688: 1:4 exactly, no padding; 2x8 would be 16
@pytest.mark.parametrize(
  ("size", "grid", "tokens"),
  [
    ((672, 672), (2, 2), 5 * T),
    ((1344, 1344), (2, 2), 720),
    ((2016, 2016), (3, 3), 1440),
    ((3000, 3000), (3, 3), 1440),
    ((600, 800), (2, 3), 7 * T),
    ((800, 600), (3, 2), 7 * T),
    ((448, 672), (2, 3), 7 * T),
    ((480, 640), (2, 3), 7 * T),
    ((720, 1280), (2, 4), 9 * T),
    ((1080, 1920), (2, 4), 9 * T),
    ((300, 3000), (1, 9), 10 * T),
    ((6000, 660), (9, 1), 10 * T),
    ((100, 400), (1, 4), 5 * T),
  ],
)
def test_grids_and_token_counts_by_hand(tokenizer, size, grid, tokens):
  assert choose_grid(size, (R, R), MM1_5) == grid
  encoder = Encoder(tokenizer, T, tiler=Tiler(MM1_5, (R, R)))
  example = encoder.encode_record(document("x", grey(*size), "a"))
  assert int((example.tokens == tokenizer.image_id).sum()) == tokens
  assert len(example.images) == tokens // T


def test_mm1_takes_720_tokens_for_every_picture(tokenizer):
  encoder = Encoder(tokenizer, T, image_delimiters=False, tiler=Tiler(MM1, (R, R)))
  for size in ((1344, 1344), (100, 3000), (5, 5)):
    example = encoder.encode_record(document("x", grey(*size)))
    assert len(example.tokens) == 1 + 720  # <s>
    assert [tile.grid for tile in example.images] == [(1, 1), *[(2, 2)] * 4]


def test_sub_images_are_the_pictures_parts_in_order():
  """A picture of the grid's very size is cut without a change of a pixel."""
  data = picture(16, 24)
  tiler = Tiler(dataclasses.replace(MM1_5, min_tiles=6, max_tiles=6), (8, 8))
  (content,) = tiler.cut([[{"image": data}]])
  tiles = [item["image"] for item in content]
  assert [(tile.grid, tile.number) for tile in tiles] == [
    *(((2, 3), i) for i in range(6)),
    ((1, 1), 0),
  ]
  pixels = list(decode_pictures(tiles, (8, 8), fit="squash", max_pixels=10**6))
  whole = np.asarray(PIL.Image.open(io.BytesIO(data)))
  for i in range(6):
    top, left = 8 * (i // 3), 8 * (i % 3)
    np.testing.assert_array_equal(pixels[i], whole[top : top + 8, left : left + 8])
  # The overview keeps the aspect: 16 x 24 in 8 x 8 leaves a border above and below.
  assert (pixels[6][0] == PAD_COLOR).all()
  assert (pixels[6][-1] == PAD_COLOR).all()
  assert not (pixels[6][4] == PAD_COLOR).all(axis=-1).any()


def test_padding_surrounds_what_a_grid_does_not_need():
  """9:16 in a grid of 1:2: the parts of the border's columns hold padding, the middle ones none."""
  tiler = Tiler(MM1_5, (8, 8))
  (content,) = tiler.cut([[{"image": picture(90, 160)}]])
  tiles = [item["image"] for item in content]
  assert {tile.grid for tile in tiles} == {(2, 4), (1, 1)}
  pixels = list(decode_pictures(tiles, (8, 8), fit="squash", max_pixels=10**6))
  border = [(p == PAD_COLOR).all(axis=-1) for p in pixels]
  # 16 rows take 28 columns of 32: two of padding at each side.
  assert border[0][:, :2].all()
  assert not border[0][:, 2:].any()
  assert not border[1].any()
  assert border[7][:, -2:].all()
  assert not border[7][:, :-2].any()


@pytest.mark.parametrize(
  ("changes", "places"),
  [
    ({}, "0 1 2 3 all"),
    ({"overview": "first"}, "all 0 1 2 3"),
    ({"overview": "none"}, "0 1 2 3"),
    ({"marks": "index"}, "(0,1,1) 0 (0,1,2) 1 (0,2,1) 2 (0,2,2) 3 (0,0,0) all"),
    ({"marks": "separators"}, "0 , 1 \n 2 , 3 : all"),
    ({"marks": "separators", "overview": "first"}, "all : 0 , 1 \n 2 , 3"),
  ],
)
def test_overview_and_marks(changes, places):
  tiler = Tiler(dataclasses.replace(MM1_5, **changes), (8, 8))
  (content,) = tiler.cut([items("a", grey(16, 16), "b")])
  assert content[0] == {"text": "a"}
  assert content[-1] == {"text": "b"}
  shown = [
    item["text"]
    if "text" in item
    else ("all" if item["image"].grid == (1, 1) else str(item["image"].number))
    for item in content[1:-1]
  ]
  assert shown == places.split(" ")


def test_a_picture_that_needs_no_cut_has_no_overview():
  tiler = Tiler(dataclasses.replace(MM1_5, min_tiles=1, max_tiles=4), (8, 8))
  (content,) = tiler.cut([items(grey(8, 8))])
  assert [item["image"][1:] for item in content] == [((1, 1), 0, "pad")]


def test_only_when_few_pictures_are_there():
  data = grey(16, 16)
  tiler = Tiler(dataclasses.replace(MM1_5, marks="index"), (8, 8))
  first, second = tiler.cut([items(data, "a"), items("b", data)])  # of one example
  assert len(first) == 2 * 5 + 1
  assert second[1] == {"text": "(1,1,1)"}
  three = [items(data, data), items(data)]
  assert tiler.cut(three) == three


def test_mixed_resolution_cuts_the_last_pictures_alone(tokenizer):
  """MM1's few-shot prompts: examples small, the question's picture large."""
  tiler = Tiler(dataclasses.replace(MM1, last=1), (R, R))
  encoder = Encoder(tokenizer, T, tiler=tiler)
  prompt = encoder.encode_prefix(items(*([grey(9, 9), "A cat."] * 8), grey(9, 9)))
  assert sum(i == tokenizer.image_id for i in prompt.ids) == 8 * T + 720
  assert [isinstance(image, Tile) for image in prompt.images] == [False] * 8 + [True] * 5


def test_conversations_and_measures_count_sub_images(tokenizer):
  encoder = Encoder(tokenizer, 2, tiler=Tiler(dataclasses.replace(MM1_5, marks="index"), (8, 8)))
  record = conversation("x", ["a"], ["b"], ["c", grey(16, 24)], ["d"])
  example = encoder.encode_record(record)
  assert len(example.images) == len(example.spans) == 7
  measure = encoder.measure_record(record)
  assert measure.num_positions == len(example)
  assert measure.image_starts == [span.start for span in example.spans]
  assert not example.loss_mask[np.isin(example.targets, [4, 5, 6])].any()
  marks = tokenizer.decode(example.tokens)
  assert "(0,1,1)(0,1,2)(0,1,3)(0,2,1)" in marks
  encoder = Encoder(tokenizer, 2, tiler=Tiler(MM1_5, (8, 8)))
  record = document("x", "a", grey(16, 24), "b")
  assert encoder.measure_record(record).image_starts == [
    span.start for span in encoder.encode_record(record).spans
  ]


def test_a_damaged_picture_is_one_place(tokenizer):
  """It is dropped with its reason where pictures are decoded, as ever."""
  encoder = Encoder(tokenizer, 2, tiler=Tiler(MM1_5, (8, 8)))
  example = encoder.encode_record(document("x", b"no picture", "b"))
  assert len(example.images) == 5  # 1 x 1 pixel, as far as its header goes


def test_config_rules():
  data = dataclasses.replace(RunConfig().data, tiling=MM1_5)
  with pytest.raises(ConfigError, match=r"min_tiles 5 is above max_tiles 4"):
    TilingConfig(min_tiles=5, max_tiles=4)
  with pytest.raises(ConfigError, match=r"data\.tiling\.grid\[0\] 0 must lie in"):
    TilingConfig(grid=(0, 2))
  with pytest.raises(ConfigError, match=r"marks needs data.chat"):
    DataConfig(tiling=TilingConfig(marks="index"))
  with pytest.raises(ConfigError, match=r"up to 10 sub-images of 146 positions .* has 9 slots"):
    RunConfig(data=dataclasses.replace(data, images_per_row=9))
  run = RunConfig(data=data)
  tokenizer = None
  encoder = make_encoder(run.data, tokenizer, InputSpec((R, R), T, 4))
  assert encoder.tiler == Tiler(MM1_5, (R, R), "squash")
  assert RunConfig.from_dict(run.to_dict()) == run
