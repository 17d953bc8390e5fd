# SPDX-License-Identifier: Apache-2.0
"""Sizes of an MM1 model: encoder, connector, decoder. Exporting writes all of them."""

import sys

import transformers
from transformers import PretrainedConfig

# All files here import this one, and what they need of transformers came with version 5.
if int(transformers.__version__.split(".")[0]) < 5:
  sys.modules.pop(__name__, None)  # transformers leaves it there, and the next import would pass
  raise ImportError(
    f"this model needs transformers 5 or later, but {transformers.__version__} is installed: "
    "pip install 'transformers>=5'"
  )


class MM1VisionConfig(PretrainedConfig):
  """CLIP's ViT, up to the layer that gives the features."""

  model_type = "mm1_vision"
  base_config_key = "vision_config"

  def __init__(
    self,
    image_size=(378, 378),
    patch_size=14,
    hidden_size=1280,
    num_hidden_layers=32,
    num_attention_heads=16,
    intermediate_size=5120,
    hidden_act="quick_gelu",
    class_token=True,
    pre_norm=True,
    layer_norm_eps=1e-5,
    position_grid=(27, 27),
    **kwargs,
  ):
    self.image_size = tuple(image_size)  # height, width
    self.patch_size = patch_size
    self.hidden_size = hidden_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.intermediate_size = intermediate_size
    self.hidden_act = hidden_act
    self.class_token = class_token
    self.pre_norm = pre_norm
    self.layer_norm_eps = layer_norm_eps
    self.position_grid = tuple(position_grid)  # rows and columns that the positions are learned on
    super().__init__(**kwargs)


class MM1TextConfig(PretrainedConfig):
  """A decoder of Llama's kind; every `moe_every`-th layer is sparse if there are experts."""

  model_type = "mm1_text"
  base_config_key = "text_config"

  def __init__(
    self,
    vocab_size=49152,
    hidden_size=3072,
    num_hidden_layers=26,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8064,
    rope_theta=1e4,
    rope_stretch=None,
    rms_norm_eps=1e-5,
    qk_norm=False,
    qkv_bias=False,
    num_experts=0,
    num_experts_per_tok=2,
    moe_every=1,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    **kwargs,
  ):
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.num_key_value_heads = num_key_value_heads
    self.head_dim = head_dim
    self.intermediate_size = intermediate_size
    self.rope_theta = rope_theta
    self.rope_stretch = rope_stretch  # Llama 3.1's, under our names of its numbers
    self.rms_norm_eps = rms_norm_eps
    self.qk_norm = qk_norm
    self.qkv_bias = qkv_bias
    self.num_experts = num_experts
    self.num_experts_per_tok = num_experts_per_tok
    self.moe_every = moe_every
    self.max_position_embeddings = max_position_embeddings
    super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class MM1Config(PretrainedConfig):
  """The three parts; the connector's sizes are here."""

  model_type = "mm1"
  sub_configs = {"vision_config": MM1VisionConfig, "text_config": MM1TextConfig}  # noqa: RUF012

  def __init__(
    self,
    vision_config=None,
    text_config=None,
    connector_kind="c_abstractor",
    token_grid=(12, 12),
    connector_hidden=1024,
    connector_depth=3,
    connector_mlp_depth=2,
    connector_num_heads=16,
    image_token_id=4,
    tie_word_embeddings=True,
    **kwargs,
  ):
    if not isinstance(vision_config, MM1VisionConfig):
      vision_config = MM1VisionConfig(**(vision_config or {}))
    if not isinstance(text_config, MM1TextConfig):
      text_config = MM1TextConfig(**(text_config or {}))
    self.vision_config, self.text_config = vision_config, text_config
    self.connector_kind = connector_kind
    self.token_grid = tuple(token_grid)  # tokens of a picture, down and across
    self.connector_hidden = connector_hidden
    self.connector_depth = connector_depth
    self.connector_mlp_depth = connector_mlp_depth
    self.connector_num_heads = connector_num_heads
    self.image_token_id = image_token_id
    super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
