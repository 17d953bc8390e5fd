# SPDX-License-Identifier: Apache-2.0
"""What a model's step costs: FLOPs by formula, from the shapes in its config alone."""

from mm1_jax.config import ConnectorConfig, RunConfig


def image_slots(run: RunConfig) -> int:
  """Returns the pictures that a global batch has room for."""
  return run.data.batch_size * run.data.images_per_row


def model_flops(run: RunConfig, num_images: float) -> dict[str, float]:
  """Returns the FLOPs of one training step on the global batch, by part, and their `total`.

  Counted is what the model asks for, not what a program happens to execute: matrix products and
  convolutions at 2*M*N*K; causal attention at half its square; of the experts, the `top_k` that a
  position is sent to; no recomputation, norms, softmax or optimizer. Every position of a row
  counts, filled or not. Of image slots only those with a picture do: `num_images` of the batch,
  which a running step has counted; a plan takes all `image_slots`.

  With P patches (and the class token), D width, F mlp_dim, H heads of h, K key-value heads, E
  experts, k of them active, V vocabulary, forward, per picture or row:
    vit                2*P*3*p*p*D + num_blocks * (8*P*D*D + 4*P*P*D + 4*P*D*F)
    connector          see `_connector_flops`
    decoder/dense      S * (depth * 4*D*h*(H + K) + dense layers * 6*D*F)
    decoder/attention  depth * 2*S*S*H*h           (4*S*S*H*h, halved)
    decoder/experts    S * MoE layers * (2*D*E + k * 6*D*F)
    head               S * 2*D*V

  Training takes 3x the forward pass: activations' and weights' gradients cost one more each. A
  frozen part (`optimizer.frozen`) has no weights' gradients, and no activations' gradients either
  unless a trained part lies before it in the order vit, connector, decoder.
  """
  vision, decoder, data = run.model.vision, run.model.decoder, run.data
  rows, seq = data.batch_size, data.seq_len
  patches = vision.num_patches + vision.class_token
  vit = 2 * vision.num_patches * 3 * vision.patch_size**2 * vision.width
  vit += vision.num_blocks * (
    8 * patches * vision.width**2
    + 4 * patches**2 * vision.width
    + 4 * patches * vision.width * vision.mlp_dim
  )
  sparse = decoder.depth // decoder.moe.every if decoder.moe else 0
  heads = decoder.num_heads + decoder.num_kv_heads
  mlp = 6 * decoder.width * decoder.mlp_dim
  dense = decoder.depth * 4 * decoder.width * decoder.head_dim * heads
  dense += (decoder.depth - sparse) * mlp
  attention = decoder.depth * 2 * seq * decoder.num_heads * decoder.head_dim
  experts = 0
  if decoder.moe:
    experts = sparse * (2 * decoder.width * decoder.moe.num_experts + decoder.moe.top_k * mlp)
  forward = {
    "vit": num_images * vit,
    "connector": num_images * _connector_flops(run),
    "decoder/dense": rows * seq * dense,
    "decoder/attention": rows * seq * attention,
    "decoder/experts": rows * seq * experts,
    "head": rows * seq * 2 * decoder.width * decoder.vocab_size,
  }
  factor, trained_before = {}, False
  for part in ("vit", "connector", "decoder"):
    trained = part not in run.optimizer.frozen
    factor[part] = 1 + trained + (trained or trained_before)
    trained_before |= trained
  factor["head"] = factor["decoder"]
  flops = {name: count * factor[name.split("/")[0]] for name, count in forward.items()}
  return {**flops, "total": sum(flops.values())}


def _connector_flops(run: RunConfig) -> int:
  """Returns the connector's forward FLOPs for one image.

  With P patches of width E, T tokens, hidden width C, decoder width D:
    c_abstractor    `depth` RegNet blocks on P positions, as many on T, and the read-out:
                    T * 2*(C*D + (mlp_depth - 1)*D*D). A block from c to C channels on n positions:
                    n * 2*(c*C + 9*C + C*C) + 4*C*round(c/4), and n * 2*c*C more where c != C
    average_pool    T * 2*E*D
    attention_pool  P * 4*E*C + T * (4*P*C + 2*C*C + 2*C*D)
    linear, mlp     P * 2*E*D, P * 2*(E*D + (mlp_depth - 1)*D*D)
  """
  connector: ConnectorConfig = run.model.connector
  patches, tokens = run.model.vision.num_patches, connector.num_tokens
  enc, hidden, dec = run.model.vision.width, connector.hidden, run.model.decoder.width

  def block(channels: int, positions: int) -> int:
    count = positions * 2 * (channels * hidden + 9 * hidden + hidden**2)
    count += 4 * hidden * round(channels / 4)
    return count + (positions * 2 * channels * hidden if channels != hidden else 0)

  more_layers = (connector.mlp_depth - 1) * dec**2
  match connector.kind:
    case "c_abstractor":
      first = block(enc, patches) + (connector.depth - 1) * block(hidden, patches)
      return (
        first + connector.depth * block(hidden, tokens) + tokens * 2 * (hidden * dec + more_layers)
      )
    case "average_pool":
      return tokens * 2 * enc * dec
    case "attention_pool":
      attend = tokens * (4 * patches * hidden + 2 * hidden**2 + 2 * hidden * dec)
      return patches * 4 * enc * hidden + attend
    case "linear":
      return patches * 2 * enc * dec
    case "mlp":
      return patches * 2 * (enc * dec + more_layers)
