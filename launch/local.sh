#!/usr/bin/env bash
# A training job on this machine: one rank a GPU, or RANKS gloo ranks where there is none.
#   launch/local.sh experiment=quickstart data.context=8192
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
cores=$(nproc)
# more threads than cores make ranks that share a machine ten times slower
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
# until the launcher listens, which gives it to its ranks: they save and leave
trap '' USR1
exec python -m longspan.launch.node --standalone --nproc-per-node "$ranks" -m longspan.train "$@"
