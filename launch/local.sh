#!/usr/bin/env bash
# A run on this machine. One process drives all its GPUs or TPU chips:
#
#   launch/local.sh --config configs/superhf.py:pythia-1b
#
# PROCESSES=2 starts so many on the CPU, each with DEVICES=4 simulated devices,
# which find each other over loopback: a job on several hosts, without hosts.
# DRY_RUN=1 prints the commands instead.
set -euo pipefail

processes="${PROCESSES:-1}" devices="${DEVICES:-4}" port="${PORT:-8476}"
command=("${PYTHON:-python}" -m jaxalign.main "$@")
# JAX takes 0.75 of a GPU's memory unless told otherwise.
[[ -n "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]] ||
  export XLA_CLIENT_MEM_FRACTION=.9

call() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%s\n' "$(printf '%q ' "$@")"
  else
    exec "$@"
  fi
}

if ((processes == 1)); then
  call "${command[@]}"
  exit
fi

simulated="--xla_force_host_platform_device_count=$devices"
started=()
for ((id = 0; id < processes; id++)); do
  call env JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} $simulated" \
    "${command[@]}" --coordinator="localhost:$port" \
    --num_processes="$processes" --process_id="$id" &
  started+=("$!")
done
# Ctrl-C reaches all of them by itself, kill does not.
trap 'kill -TERM "${started[@]}"' TERM
status=0
for pid in "${started[@]}"; do
  # The trap ends a wait early, with the process still there.
  while true; do
    ended=0
    wait "$pid" || ended=$?
    kill -0 "$pid" 2> /dev/null || break
  done
  ((ended == 0)) || status="$ended"
done
exit "$status"
