# SPDX-License-Identifier: Apache-2.0
"""From records on disk to batches on the host, in six steps.

  1. record   dict           `sources.Source[i]`: a document or a conversation, pictures as bytes
  2. example  `Example`      `examples.Encoder`: ids, targets and loss mask; pictures still as bytes
  3. index    `Index`        `index.load_index`: the length of every example, kept on disk
  4. mix      rows of pieces `mixing.Mixer`: lengths -> what is in row r of batch n; reads no record
  5. batch    `Batch`        `packing.assemble`: examples and decoded pictures -> numpy arrays
  6. run      `(Batch, BatchStats)`   `pipeline.make_pipeline`: this process's rows, resumable

Steps 1, 2 and 5 run in worker processes. Nothing here imports a model; workers need no accelerator.
"""
