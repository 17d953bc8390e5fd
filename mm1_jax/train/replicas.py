# SPDX-License-Identifier: Apache-2.0
"""Whether devices that should have equal params do: a chip that computes wrongly is else not seen.

Each device sums the bits of its own shards (see `checksum`), and 8 bytes of each are compared. Only
arrays of which there are copies can differ: with a mesh that splits all over all devices, those are
the small ones that every device keeps whole.
"""

from typing import Any

from mm1_jax.checkpoint import to_names
from mm1_jax.checksum import disagreements
from mm1_jax.config import UserError

SHOWN = 5  # names and devices listed in a message


class ReplicaError(UserError):
  """Copies of a param differ between devices."""


def check(step: int, params: Any) -> None:
  """Compares the copies of all params; all processes have to call it alike, and raise alike.

  Raises:
    ReplicaError: some differ; the message names params, devices and their hosts.
  """
  found = disagreements(to_names(params))
  if not found:
    return
  names = _list([disagreement.name for disagreement in found])
  devices = {device.id: device for disagreement in found for device in disagreement.devices}
  where = _list([f"{d} of process {d.process_index}" for _, d in sorted(devices.items())])
  raise ReplicaError(
    f"after step {step}, copies of {names} differ between devices that should have equal ones; the "
    f"odd ones are {where}. A chip or its memory has computed wrongly: take the host out, and "
    "start again from the newest checkpoint. It is sound if train.replica_check_every divides "
    "checkpoint.every."
  )


def _list(names: list[str]) -> str:
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more
