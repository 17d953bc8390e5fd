#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on GPU hosts under Slurm: one process on each, which sees all of its GPUs.

  launch/slurm.sh --nodes=4 --gpus=8 [SBATCH OPTION ...] -- --config=configs/mm1_3b.py --workdir=/shared/mm1_3b

Options other than --nodes and --gpus (per node) go to sbatch: --partition=P --time=24:00:00 ...
Five minutes before the time limit the run saves and the job goes back into the queue, as it does
after preemption or when a node fails; it goes on from the newest checkpoint, and ends with its last
step. Run it in the checkout, with .venv set up by `pip install -e '.[cuda,convert,draw]'`; the
checkout and the workdir must be on a file system that all nodes share. --dry-run prints the command
and the script.
EOF
}

fail() {
  echo "error: $* See launch/slurm.sh --help." >&2
  exit 1
}

nodes='' gpus='' dry_run='' options=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --) shift && break ;;
    --*) options+=("$1") ;;
    *) fail "unexpected '$1'." ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ ]] || fail "--nodes and --gpus must be positive numbers."
(($#)) || fail "the flags of mm1_jax.main are needed after '--'."

# 75: stopped by a signal before the last step.
script="#!/usr/bin/env bash
srun --kill-on-bad-exit=1 .venv/bin/python -u -m mm1_jax.main --stopped-code=75$(printf ' %q' "$@")
code=\$?
((code == 75)) && exec scontrol requeue \"\$SLURM_JOB_ID\"
exit \$code"
command=(sbatch --job-name=mm1_jax "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus"
  --exclusive --requeue --open-mode=append --signal=TERM@300 ${options[@]+"${options[@]}"})
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}" && printf "<<'EOF'\n%s\nEOF\n" "$script"
else
  command -v sbatch >/dev/null || fail "sbatch is not installed (or use --dry-run)."
  "${command[@]}" <<<"$script"
fi
