#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on Cloud TPU VMs, through queued resources: one host, a slice, or several slices.

  launch/tpu_vm.sh create  NAME --zone=ZONE --type=v5p-128 [--slices=2] [--spot] [--runtime=VERSION]
  launch/tpu_vm.sh status  NAME --zone=ZONE
  launch/tpu_vm.sh install NAME --zone=ZONE              # this commit, on every host
  launch/tpu_vm.sh run     NAME --zone=ZONE -- --config=configs/mm1_3b.py --workdir=gs://BUCKET/mm1_3b
  launch/tpu_vm.sh logs    NAME --zone=ZONE              # of host 0, as it comes
  launch/tpu_vm.sh stop    NAME --zone=ZONE              # SIGTERM: all save the step, and end
  launch/tpu_vm.sh delete  NAME --zone=ZONE              # until then it is paid for

--dry-run prints the commands instead of running them; --project=P is gcloud's. TPU types are
Google's: v4-16, v5litepod-16, v5p-128, v6e-256. The processes find each other.
EOF
}

fail() {
  echo "error: $* See launch/tpu_vm.sh --help." >&2
  exit 1
}

do_it() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

on_hosts() { # NODE WORKER COMMAND
  do_it "${gcloud[@]}" ssh "$name" "${where[@]}" "--node=$1" "--worker=$2" "--command=$3"
}

runtime_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "no runtime is known for --type='$1'; give --runtime, or use launch/gke.py." ;;
  esac
}

create() {
  [[ $type ]] || fail "create needs --type."
  local nodes=("--node-id=$name") version
  version=${runtime:-$(runtime_of "$type")}
  ((slices > 1)) && nodes=("--node-count=$slices" "--node-prefix=$name")
  do_it "${gcloud[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" \
    "--runtime-version=$version" "${nodes[@]}" ${spot:+--spot}
}

install() {
  local archive="${TMPDIR:-/tmp}/mm1_jax.tar.gz"
  do_it git archive --format=tar.gz --prefix=mm1_jax/ "--output=$archive" HEAD
  do_it "${gcloud[@]}" scp "$archive" "$name:" "${where[@]}" --node=all --worker=all
  # The images have Python 3.10; uv brings 3.11.
  on_hosts all all "set -e; tar xzf mm1_jax.tar.gz; cd mm1_jax; \
curl -LsSf https://astral.sh/uv/install.sh | sh; ~/.local/bin/uv venv --python 3.11 --allow-existing; \
~/.local/bin/uv pip install -q -c constraints.txt -e '.[tpu,convert,draw]'"
}

run() {
  (($#)) || fail "run needs the flags of mm1_jax.main after '--'."
  local quoted
  quoted=$(printf ' %q' "$@")
  on_hosts all all "cd mm1_jax; nohup .venv/bin/python -u -m mm1_jax.main$quoted \
> ~/mm1_jax.log 2>&1 < /dev/null & echo \$! > ~/mm1_jax.pid"
}

[[ ${1:-} && ${1:-} != --help && ${1:-} != -h ]] || { usage && exit 0; }
action=$1 name=${2:-}
[[ $name && $name != --* ]] || fail "'$action' needs a NAME."
shift 2
type='' slices=1 spot='' runtime='' dry_run='' zone='' where=()
while (($#)); do
  case $1 in
    --zone=*) zone=${1#*=} where+=("$1") ;;
    --project=*) where+=("$1") ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    --) shift && break ;;
    *) fail "unknown option '$1'." ;;
  esac
  shift
done
[[ $zone ]] || fail "--zone is needed."
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices='$slices' must be a positive number."
gcloud=(gcloud alpha compute tpus queued-resources)
[[ $dry_run ]] || command -v gcloud >/dev/null || fail "gcloud is not installed (or use --dry-run)."

case $action in
  create) create ;;
  status) do_it "${gcloud[@]}" describe "$name" "${where[@]}" ;;
  install) install ;;
  run) run "$@" ;;
  logs) on_hosts 0 0 'tail -n 100 -F mm1_jax.log' ;;
  stop) on_hosts all all "kill -TERM \$(cat mm1_jax.pid)" ;;
  delete) do_it "${gcloud[@]}" delete "$name" "${where[@]}" --force ;;
  *) fail "unknown action '$action'." ;;
esac
