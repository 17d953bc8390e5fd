# SPDX-License-Identifier: Apache-2.0
"""Trains on TPU slices in a GKE cluster, as a JobSet: several slices, spot, restarted by itself.

  python -m launch.gke --name=mm1 --slice=v5p-128 --num-slices=2 --spot --image=IMAGE \\
      -- --config=configs/mm1_30b.py --workdir=gs://BUCKET/mm1_30b

The cluster needs the JobSet controller, one node pool for each slice, and `launch/Dockerfile`'s
image where it can pull it. A slice is a Job with a pod on each host. When any pod ends before the
last training step, as when a spot node is taken away, all of them are started again, and continue
from the newest checkpoint. `--dry-run` prints the manifest and the command instead of applying it.
"""

import math
import re
import subprocess
import sys
from typing import Any

import yaml

from mm1_jax import cli
from mm1_jax.config import ConfigError
from mm1_jax.plan.topology import Topology, find_topology

STOPPED_CODE = 75  # a job that fails is started again, one that succeeds is not
SPOT_SECONDS = 25  # that GKE gives a pod on a spot node between SIGTERM and the end


def manifest(
  name: str, topology: Topology, *, image: str, spot: bool, max_restarts: int, args: list[str]
) -> dict[str, Any]:
  """Returns the JobSet of a run, as plain values."""
  chips = math.prod(topology.shape)
  hosts = topology.num_hosts // topology.num_slices
  selector = {
    "cloud.google.com/gke-tpu-accelerator": topology.chip.gke_name,
    "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
  }
  pod: dict[str, Any] = {
    "restartPolicy": "Never",
    "nodeSelector": selector,
    "hostNetwork": True,  # slices talk over it, and faster so
    "dnsPolicy": "ClusterFirstWithHostNet",
    "terminationGracePeriodSeconds": 300,
    "containers": [
      {
        "name": "mm1-jax",
        "image": image,
        "command": ["python", "-u", "-m", "mm1_jax.main", f"--stopped-code={STOPPED_CODE}", *args],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}, {"containerPort": 8482}],
        "resources": {"limits": {"google.com/tpu": chips // hosts}},
      }
    ],
  }
  if spot:
    selector["cloud.google.com/gke-spot"] = "true"
    pod["terminationGracePeriodSeconds"] = SPOT_SECONDS
    pod["tolerations"] = [
      {
        "key": "cloud.google.com/gke-spot",
        "operator": "Equal",
        "value": "true",
        "effect": "NoSchedule",
      }
    ]
  job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": {"spec": pod}}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": name,
      # One Job to a node pool, which is one slice.
      "annotations": {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
      },
    },
    "spec": {
      "failurePolicy": {"maxRestarts": max_restarts},
      "replicatedJobs": [
        {"name": "slice", "replicas": topology.num_slices, "template": {"spec": job}}
      ],
    },
  }


def check_name(name: str, topology: Topology) -> None:
  """Raises ConfigError unless the pods' names, made of the JobSet's, are short enough."""
  longest = f"{name}-slice-{topology.num_slices - 1}-{topology.num_hosts}-xxxxx"
  if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(longest) > 63:
    raise ConfigError(
      f"--name '{name}' must be of a-z, 0-9 and '-', start with a letter, and be at most "
      f"{63 - len(longest) + len(name)} long."
    )


def main() -> None:
  parser = cli.make_parser("launch.gke", __doc__)
  parser.add_argument("--name", required=True, help="of the JobSet")
  parser.add_argument("--slice", required=True, help="such as v5p-128, v6e-256 or v5e-256")
  parser.add_argument("--num-slices", type=int, default=1)
  parser.add_argument("--image", required=True)
  parser.add_argument("--spot", action="store_true", help="cheaper; may be taken away at any time")
  parser.add_argument("--max-restarts", type=int, default=100)
  parser.add_argument("--dry-run", action="store_true")
  parser.add_argument("args", nargs="+", metavar="-- FLAGS", help="of mm1_jax.main")
  options = parser.parse_args()
  topology = find_topology(options.slice, options.num_slices)
  if topology.num_slices > 1 and topology.num_hosts == topology.num_slices:
    raise ConfigError(f"--slice {options.slice} has one host; GKE joins slices of several only.")
  check_name(options.name, topology)
  job_set = manifest(
    options.name,
    topology,
    image=options.image,
    spot=options.spot,
    max_restarts=options.max_restarts,
    args=options.args,
  )
  text = yaml.safe_dump(job_set, sort_keys=False)
  if options.dry_run:
    print(f"kubectl apply -f - <<'EOF'\n{text}EOF")
    return
  try:
    subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=True)
  except FileNotFoundError as e:
    raise ConfigError("kubectl is not installed; --dry-run prints what it would be given.") from e
  except subprocess.CalledProcessError as e:
    sys.exit(e.returncode)
  selector = f"jobset.sigs.k8s.io/jobset-name={options.name}"
  print(f"logs:   kubectl logs -f -l {selector},jobset.sigs.k8s.io/job-index=0 --prefix")
  print(f"delete: kubectl delete jobset {options.name}    # the nodes cost until their pools go")


if __name__ == "__main__":
  cli.run(main)
