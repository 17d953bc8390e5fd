# SPDX-License-Identifier: Apache-2.0
"""MM1 in PyTorch: a CLIP ViT, a connector, and a dense or mixture-of-experts decoder.

It computes what the JAX model does that its weights come from, layer by layer. Norms, softmaxes and
the router compute in float32 whatever the weights are.

Letters: B rows, S new positions, C cached ones, N pictures, P patches, T tokens of a picture, D
width, H heads, K key-value heads, h head dim, E experts.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mm1 import MM1Config, MM1TextConfig, MM1VisionConfig

ACTIVATIONS = {
  "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
  "gelu": F.gelu,
  "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
  "silu": F.silu,
}


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last dim."""

  def __init__(self, dim: int, eps: float):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(dim))
    self.eps = eps

  def forward(self, x):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    return (y * self.weight.float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
  """Layer norm over the last dim, in float32."""

  def forward(self, x):
    weight, bias = self.weight.float(), self.bias.float()
    return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def resize_grid(grid, shape):
  """Resizes learned positions [h, w, D] to another patch grid: bicubic, with antialiasing."""
  if tuple(grid.shape[:2]) == tuple(shape):
    return grid
  x = grid.float().permute(2, 0, 1)[None]
  x = F.interpolate(x, size=tuple(shape), mode="bicubic", antialias=True, align_corners=False)
  return x[0].permute(1, 2, 0)


class VisionAttention(nn.Module):
  """All patches attend to each other."""

  def __init__(self, config: MM1VisionConfig):
    super().__init__()
    self.num_heads = config.num_attention_heads
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

  def forward(self, x):
    num, length, width = x.shape

    def heads(y):
      return y.view(num, length, self.num_heads, -1).transpose(1, 2)

    y = F.scaled_dot_product_attention(
      heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
    )
    return self.out_proj(y.transpose(1, 2).reshape(num, length, width))


class VisionMLP(nn.Module):
  def __init__(self, config: MM1VisionConfig):
    super().__init__()
    self.activation = ACTIVATIONS[config.hidden_act]
    self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
    self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

  def forward(self, x):
    return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
  """Pre-norm attention and MLP."""

  def __init__(self, config: MM1VisionConfig):
    super().__init__()
    self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
    self.self_attn = VisionAttention(config)
    self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
    self.mlp = VisionMLP(config)

  def forward(self, x):
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
  """Patches with their positions, after a class token if there is one."""

  def __init__(self, config: MM1VisionConfig):
    super().__init__()
    width, side = config.hidden_size, config.patch_size
    self.patch_embedding = nn.Conv2d(3, width, side, stride=side, bias=False)
    self.position_embedding = nn.Parameter(torch.zeros(*config.position_grid, width))
    self.class_embedding = self.class_position = None
    if config.class_token:
      self.class_embedding = nn.Parameter(torch.zeros(width))
      self.class_position = nn.Parameter(torch.zeros(width))

  def forward(self, pixel_values):
    x = self.patch_embedding(pixel_values).permute(0, 2, 3, 1)  # [N, h, w, D]
    grid = x.shape[1:3]
    x = (x + resize_grid(self.position_embedding, grid).to(x.dtype)).flatten(1, 2)
    if self.class_embedding is not None:
      first = (self.class_embedding.float() + self.class_position.float()).to(x.dtype)
      x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
    return x, grid


class VisionTower(nn.Module):
  """Pixels to features on the patch grid: one layer's output, no last norm, no class token."""

  def __init__(self, config: MM1VisionConfig):
    super().__init__()
    self.embeddings = VisionEmbeddings(config)
    self.pre_layrnorm = (
      LayerNorm(config.hidden_size, config.layer_norm_eps) if config.pre_norm else nn.Identity()
    )
    self.encoder = nn.Module()
    self.encoder.layers = nn.ModuleList(
      VisionLayer(config) for _ in range(config.num_hidden_layers)
    )

  def forward(self, pixel_values):
    x, grid = self.embeddings(pixel_values)
    x = self.pre_layrnorm(x)
    for layer in self.encoder.layers:
      x = layer(x)
    return x[:, x.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)


class SqueezeExcite(nn.Module):
  """Scales channels by a gate computed from their mean over a picture."""

  def __init__(self, channels: int, reduced: int):
    super().__init__()
    self.down = nn.Linear(channels, reduced)
    self.up = nn.Linear(reduced, channels)

  def forward(self, x):
    mean = x.mean(dim=(1, 2), keepdim=True)
    return x * torch.sigmoid(self.up(F.silu(self.down(mean))))


class RegNetBlock(nn.Module):
  """A bottleneck with a depth-wise convolution; channels last."""

  def __init__(self, in_dim: int, out_dim: int):
    super().__init__()
    self.conv1 = nn.Linear(in_dim, out_dim, bias=False)
    self.norm1 = LayerNorm(out_dim)
    self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, bias=False)
    self.norm2 = LayerNorm(out_dim)
    self.squeeze_excite = SqueezeExcite(out_dim, round(0.25 * in_dim))
    self.conv3 = nn.Linear(out_dim, out_dim, bias=False)
    self.norm3 = LayerNorm(out_dim)
    self.shortcut = self.shortcut_norm = None
    if in_dim != out_dim:
      self.shortcut = nn.Linear(in_dim, out_dim, bias=False)
      self.shortcut_norm = LayerNorm(out_dim)

  def forward(self, x):
    y = F.silu(self.norm1(self.conv1(x)))
    y = self.conv2(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = self.squeeze_excite(F.silu(self.norm2(y)))
    y = self.norm3(self.conv3(y))
    if self.shortcut is not None:
      x = self.shortcut_norm(self.shortcut(x))
    return F.silu(x + y)


class AveragePool(nn.Module):
  """Averages over the bins of the token grid, which overlap where they do not divide."""

  def __init__(self, token_grid):
    super().__init__()
    self.token_grid = tuple(token_grid)

  def forward(self, x):
    if tuple(x.shape[1:3]) == self.token_grid:
      return x
    pooled = F.adaptive_avg_pool2d(x.float().permute(0, 3, 1, 2), self.token_grid)
    return pooled.permute(0, 2, 3, 1).to(x.dtype)


class CAbstractor(nn.Module):
  """RegNet blocks, pooling to the token grid, RegNet blocks."""

  def __init__(self, config: MM1Config, in_dim: int):
    super().__init__()
    depth = config.connector_depth
    dims = [in_dim] + [config.connector_hidden] * (2 * depth)
    blocks = [RegNetBlock(dims[i], dims[i + 1]) for i in range(2 * depth)]
    self.stage1 = nn.ModuleList(blocks[:depth])
    self.pool = AveragePool(config.token_grid)
    self.stage2 = nn.ModuleList(blocks[depth:])

  def forward(self, x):
    for block in self.stage1:
      x = block(x)
    x = self.pool(x)
    for block in self.stage2:
      x = block(x)
    return x


class AttentionPool(nn.Module):
  """Learned queries attend to the patches."""

  def __init__(self, config: MM1Config, in_dim: int):
    super().__init__()
    hidden = config.connector_hidden
    self.token_grid, self.num_heads = tuple(config.token_grid), config.connector_num_heads
    self.norm = LayerNorm(in_dim)
    self.queries = nn.Parameter(torch.zeros(math.prod(config.token_grid), hidden))
    self.key = nn.Linear(in_dim, hidden)
    self.value = nn.Linear(in_dim, hidden)
    self.out = nn.Linear(hidden, hidden)

  def forward(self, x):
    x = self.norm(x.flatten(1, 2))

    def heads(y):
      return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    queries = self.queries.to(x.dtype).expand(len(x), -1, -1)
    y = F.scaled_dot_product_attention(heads(queries), heads(self.key(x)), heads(self.value(x)))
    return self.out(y.transpose(1, 2).flatten(2)).unflatten(1, self.token_grid)


class Connector(nn.Module):
  """Patch features to the tokens of a picture."""

  def __init__(self, config: MM1Config):
    super().__init__()
    kind, width = config.connector_kind, config.vision_config.hidden_size
    pooled = kind in ("c_abstractor", "attention_pool")
    self.positions = None
    if pooled:
      self.positions = nn.Parameter(torch.zeros(*config.vision_config.position_grid, width))
    if kind == "c_abstractor":
      self.body = CAbstractor(config, width)
    elif kind == "attention_pool":
      self.body = AttentionPool(config, width)
    else:
      self.body = AveragePool(config.token_grid)
    depth = config.connector_mlp_depth if kind in ("c_abstractor", "mlp") else 1
    dims = [config.connector_hidden if pooled else width]
    dims += [config.text_config.hidden_size] * depth
    self.readout = nn.ModuleList(nn.Linear(dims[i], dims[i + 1]) for i in range(depth))
    self.activation = ACTIVATIONS["silu" if kind == "c_abstractor" else "gelu_tanh"]

  def forward(self, x):  # [N, h, w, D] -> [N, T, D]
    if self.positions is not None:
      x = x + resize_grid(self.positions, x.shape[1:3]).to(x.dtype)
    x = self.body(x)
    for i, layer in enumerate(self.readout):
      x = layer(x if i == 0 else self.activation(x))
    return x.flatten(1, 2)


def rotary(config: MM1TextConfig, positions):
  """Returns cos and sin [B, 1, S, h / 2] of the angles at positions [B, S]."""
  half = config.head_dim // 2
  steps = torch.arange(half, dtype=torch.float32, device=positions.device) / half
  frequency = config.rope_theta**-steps
  scaling = config.rope_stretch
  if scaling:
    turns = scaling["original_positions"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (kept + (1 - kept) / scaling["factor"])
  angle = positions[:, None, :, None].float() * frequency
  return angle.cos(), angle.sin()


def rotate(x, cos, sin):
  """Rotates the pairs (i, i + h / 2) of [B, H, S, h]."""
  first, second = x.float().chunk(2, dim=-1)
  rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
  return rotated.to(x.dtype)


class Attention(nn.Module):
  """Causal attention with grouped queries."""

  def __init__(self, config: MM1TextConfig, layer: int):
    super().__init__()
    self.layer, self.head_dim = layer, config.head_dim
    self.num_groups = config.num_attention_heads // config.num_key_value_heads
    width, bias = config.hidden_size, config.qkv_bias
    self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
    self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
    self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
    self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)
    self.q_norm = self.k_norm = None
    if config.qk_norm:
      self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
      self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

  def forward(self, x, cos, sin, seen, cache: Cache | None):
    queries, keys, values = (
      project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if self.q_norm is not None:
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
    if cache is not None:
      keys, values = cache.update(keys, values, self.layer)
    keys, values = (y.repeat_interleave(self.num_groups, dim=1) for y in (keys, values))
    mask = seen(keys.shape[2]).to(x.device)  # layers may be spread over devices
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
  """SwiGLU; `weights`, of a router, count before the last product."""

  def __init__(self, config: MM1TextConfig):
    super().__init__()
    self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

  def forward(self, x, weights=None):
    h = F.silu(self.gate_proj(x)) * self.up_proj(x)
    if weights is not None:
      h = (h.float() * weights).to(x.dtype)
    return self.down_proj(h)


class MoE(nn.Module):
  """The k likeliest experts of each position; none is left out.

  Their weights sum to 1, but for k = 1: a single expert's is its probability.
  """

  def __init__(self, config: MM1TextConfig):
    super().__init__()
    self.top_k = config.num_experts_per_tok
    self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
    self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))

  def forward(self, x):
    rows = x.flatten(0, 1)
    probs = F.linear(rows.float(), self.router.weight.float()).softmax(-1)
    weights, chosen = probs.topk(self.top_k, dim=-1)
    if self.top_k > 1:
      weights = weights / (weights.sum(-1, keepdim=True) + 1e-9)
    out = torch.zeros_like(rows)
    for number in chosen.unique().tolist():
      row, choice = torch.where(chosen == number)
      out.index_add_(0, row, self.experts[number](rows[row], weights[row, choice, None]))
    return out.view_as(x)


class DecoderLayer(nn.Module):
  """Pre-norm attention and a dense or sparse network."""

  def __init__(self, config: MM1TextConfig, layer: int):
    super().__init__()
    self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.self_attn = Attention(config, layer)
    self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    sparse = config.num_experts and (layer + 1) % config.moe_every == 0
    self.mlp = MoE(config) if sparse else MLP(config)

  def forward(self, x, cos, sin, seen, cache):
    x = x + self.self_attn(self.input_layernorm(x), cos, sin, seen, cache)
    return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
  """Embedded positions to hidden states, after the last norm."""

  def __init__(self, config: MM1TextConfig):
    super().__init__()
    self.config = config
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
    self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

  def forward(self, x, attention_mask, position_ids, cache: Cache | None):
    past = cache.get_seq_length() if cache is not None else 0
    slots = torch.arange(x.shape[1], device=x.device) + past
    if attention_mask is None:
      attention_mask = torch.ones(len(x), int(past) + x.shape[1], device=x.device)
    if position_ids is None:
      # A prompt may be padded at the left; its first real token is at 0.
      position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, slots]
    cos, sin = rotary(self.config, position_ids)
    seen = Seen(attention_mask, slots)
    for layer in self.layers:
      x = layer(x, cos, sin, seen, cache)
    return self.norm(x)


class Seen:
  """The attention mask, bool [B, 1, S, C], for the keys of a cache: the same for all layers."""

  def __init__(self, attention_mask, slots):
    self.attention_mask, self.slots = attention_mask, slots
    self.mask = attention_mask if attention_mask.ndim == 4 else None

  def __call__(self, length: int):
    if self.mask is None:
      real = self.attention_mask.bool()
      real = F.pad(real, (0, length - real.shape[1]))
      keys = torch.arange(length, device=self.slots.device)
      causal = keys <= self.slots[:, None]
      # A padding position attends to itself, as a softmax needs a key; no other attends to it.
      self.mask = ((causal & real[:, None]) | (keys == self.slots[:, None]))[:, None]
    return self.mask


class MM1PreTrainedModel(PreTrainedModel):
  config_class = MM1Config
  base_model_prefix = "model"
  supports_gradient_checkpointing = False
  _no_split_modules = ["VisionLayer", "DecoderLayer"]  # noqa: RUF012, transformers' interface
  _supports_sdpa = True
  # Computed with in float32, so not rounded to less.
  _keep_in_fp32_modules_strict = ["norm", "router", "class_", "position"]  # noqa: RUF012

  def _init_weights(self, module):
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
      module.weight.data.normal_(std=0.02)
      if getattr(module, "bias", None) is not None:
        module.bias.data.zero_()
    elif isinstance(module, RMSNorm | LayerNorm):
      module.weight.data.fill_(1.0)
      if getattr(module, "bias", None) is not None:
        module.bias.data.zero_()
    else:
      for parameter in module.parameters(recurse=False):
        parameter.data.normal_(std=0.02)


class MM1Model(MM1PreTrainedModel):
  """Pictures take the places of their placeholders, and one decoder reads the row."""

  def __init__(self, config: MM1Config):
    super().__init__(config)
    self.vision_tower = VisionTower(config.vision_config)
    self.connector = Connector(config)
    self.language_model = Decoder(config.text_config)
    self.post_init()

  def get_input_embeddings(self):
    return self.language_model.embed_tokens

  def set_input_embeddings(self, value):
    self.language_model.embed_tokens = value

  def get_image_features(self, pixel_values):
    """Returns [N, T, D] of normalised pixels [N, 3, H, W]."""
    weight = self.vision_tower.embeddings.patch_embedding.weight
    return self.connector(self.vision_tower(pixel_values.to(weight.dtype)))

  def embed(self, input_ids, pixel_values):
    x = self.get_input_embeddings()(input_ids)
    if pixel_values is None:
      return x
    placeholder = input_ids == self.config.image_token_id
    features = self.get_image_features(pixel_values).flatten(0, 1).to(x)
    if int(placeholder.sum()) != len(features):
      raise ValueError(
        f"{len(pixel_values)} pictures make {len(features)} tokens, but input_ids have "
        f"{int(placeholder.sum())} placeholders; use the processor for both."
      )
    return x.masked_scatter(placeholder[..., None], features)

  def forward(
    self,
    input_ids=None,
    pixel_values=None,
    attention_mask=None,
    position_ids=None,
    cache=None,
    inputs_embeds=None,
  ):
    x = self.embed(input_ids, pixel_values) if inputs_embeds is None else inputs_embeds
    return self.language_model(x, attention_mask, position_ids, cache)


class MM1ForConditionalGeneration(MM1PreTrainedModel, GenerationMixin):
  """MM1 with its head.

  `pixel_values` are the pictures of all rows one after another, or parts of pictures, as many as
  there are runs of placeholders.
  """

  # A Trainer has to divide by accumulation steps: the loss is a mean over one batch.
  accepts_loss_kwargs = False
  _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

  def __init__(self, config: MM1Config):
    super().__init__(config)
    self.model = MM1Model(config)
    text = config.text_config
    self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    self.post_init()

  def get_input_embeddings(self):
    return self.model.get_input_embeddings()

  def set_input_embeddings(self, value):
    self.model.set_input_embeddings(value)

  def get_output_embeddings(self):
    return self.lm_head

  def set_output_embeddings(self, value):
    self.lm_head = value

  def forward(
    self,
    input_ids=None,
    pixel_values=None,
    attention_mask=None,
    position_ids=None,
    cache=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    logits_to_keep=0,
    past_key_values=None,
    **kwargs,
  ):
    """Returns float32 logits, the cache, and with `labels` the loss on those that are not -100.

    The cache has two names, an older and a newer one of transformers.
    """
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
      cache = DynamicCache(config=self.config.text_config)
    hidden = self.model(input_ids, pixel_values, attention_mask, position_ids, cache, inputs_embeds)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(hidden[:, kept]).float()
    loss = None
    if labels is not None:
      targets = labels[:, 1:].flatten().to(logits.device)
      loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
    return CausalLMOutputWithPast(loss, logits, cache)

  def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
    inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
    cache = inputs.get("cache", inputs.get("past_key_values"))
    pixel_values = inputs.get("pixel_values")
    if pixel_values is not None and cache is not None and cache.get_seq_length() > 0:
      # Pictures read before are in the cache: of each row, the last ones are new.
      new = [
        row[len(row) - num :]
        for row, num in zip(
          pixel_values.split(self._num_pictures(input_ids)),
          self._num_pictures(inputs["input_ids"]),
          strict=True,
        )
      ]
      inputs["pixel_values"] = torch.cat(new) if any(map(len, new)) else None
    return inputs

  @staticmethod
  def create_masks_for_generate(attention_mask=None, **kwargs):
    """Returns the padding mask: the decoder makes its own mask of it, for a static cache, too."""
    return attention_mask

  def _expand_inputs_for_generation(
    self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
  ):
    """Repeats each row, with its pictures, for beams or several answers."""
    pixel_values = kwargs.pop("pixel_values", None)
    if pixel_values is not None and expand_size > 1:
      rows = pixel_values.split(self._num_pictures(input_ids))
      pixel_values = torch.cat([row for row in rows for _ in range(expand_size)])
    input_ids, kwargs = super()._expand_inputs_for_generation(
      expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
    )
    if pixel_values is not None:
      kwargs["pixel_values"] = pixel_values
    return input_ids, kwargs

  def _num_pictures(self, input_ids):
    """Returns how many pictures each row has placeholders for."""
    tokens = (input_ids == self.config.image_token_id).sum(1)
    return (tokens // math.prod(self.config.token_grid)).tolist()
