#!/usr/bin/env bash
# A run on a Cloud TPU slice, which has one process on each of its hosts.
#
#   launch/tpu_vm.sh create       asks for the slice and waits until it is there
#   launch/tpu_vm.sh copy         this checkout to every host, and installs it
#   launch/tpu_vm.sh start --config ... --workdir ...   begins or goes on
#   launch/tpu_vm.sh logs         follows the first host's until the run ends
#   launch/tpu_vm.sh stop         saves after the current step
#   launch/tpu_vm.sh delete       gives the slice back
#   launch/tpu_vm.sh keep --config ... --workdir ...
#       create, copy, start and logs, and again each time a spot slice is taken
#       away or the run fails (at most RESTARTS=10 times), until it has ended
#       by itself or by `stop`; Ctrl-C ends only the watching
#
# The slice is named by variables: NAME=jaxalign, ZONE=us-west4-a,
# TYPE=v5litepod-16, RUNTIME=v2-alpha-tpuv5-lite (v5p: v2-alpha-tpuv5; v6e:
# v2-alpha-tpuv6e; v4: tpu-ubuntu2204-base), SPOT=1, PROJECT=... --workdir must
# outlive the slice and be seen by all hosts: SETUP='...' is a command that
# `copy` ends with on each of them, to mount it. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."

name="${NAME:-jaxalign}" poll="${POLL:-30}"
where=(--zone="${ZONE:-us-west4-a}" ${PROJECT:+--project="$PROJECT"})
tpus=(gcloud compute tpus)

call() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%s\n' "$(printf '%q ' "$@")"
  else
    "$@"
  fi
}

# on WORKER COMMAND: on the host of that number, or on all.
on() {
  call "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker="$1" \
    --command="$2"
}

state() {
  call "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)'
}

create() {
  call "${tpus[@]}" queued-resources create "$name" --node-id="$name" \
    "${where[@]}" --accelerator-type="${TYPE:-v5litepod-16}" \
    --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
  if [[ -n "${DRY_RUN:-}" ]]; then state && return; fi
  while true; do
    case "$(state || true)" in
      ACTIVE) return ;;
      FAILED | SUSPENDED) echo "$name was not given" >&2 && return 1 ;;
    esac
    sleep "$poll"
  done
}

copy() {
  local folder
  folder="$(mktemp -d)"
  git ls-files -z --cached --others --exclude-standard |
    tar --null --files-from=- -czf "$folder/jaxalign.tgz"
  call "${tpus[@]}" tpu-vm scp "$folder/jaxalign.tgz" "$name:" "${where[@]}" \
    --worker=all
  rm -r "$folder"
  # The hosts' own Python may be older than 3.11; uv brings one.
  on all 'mkdir -p jaxalign && tar -xzf jaxalign.tgz -C jaxalign &&
    cd jaxalign && curl -LsSf https://astral.sh/uv/install.sh | sh &&
    ~/.local/bin/uv venv --allow-existing --python 3.12 .venv &&
    ~/.local/bin/uv pip install -e ".[tpu]"'" && ${SETUP:-true}"
}

start() {
  local run
  run=".venv/bin/python -u -m jaxalign.main $(printf '%q ' "$@")"
  run+='> run.log 2>&1 & echo $! > run.pid; wait $!; echo $? > run.status'
  # In a session of its own, so that it outlives the connection.
  on all "cd jaxalign && touch run.pid
    if kill -0 \$(cat run.pid) 2> /dev/null; then
      echo it runs already
    else
      rm -f run.status run.pid run.stopped
      setsid bash -c $(printf '%q' "$run") < /dev/null > /dev/null 2>&1 &
      until [ -s run.pid ]; do sleep 0.1; done
    fi"
}

running() {
  on 0 "kill -0 \$(cat jaxalign/run.pid)" 2> /dev/null
}

logs() {
  on 0 "cd jaxalign && tail -n +1 -F --pid=\$(cat run.pid) run.log"
}

stop() {
  on all "cd jaxalign && touch run.stopped && kill -TERM \$(cat run.pid)"
}

delete() {
  call "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force \
    --quiet
}

keep() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    create && copy && start "$@" && logs && return
  fi
  local begun="" status="" failures=0
  while true; do
    # What fails here, such as a connection, is tried again.
    case "$(state 2> /dev/null || echo NONE)" in
      NONE) create || true ;;
      FAILED | SUSPENDED) begun="" && { delete || true; } ;;
      ACTIVE)
        if [[ -n "$begun" ]] || running || { copy && start "$@"; }; then
          begun=1
          logs || true
        fi
        ;;
    esac
    # The exit status, and a second line after `stop`. A host that has shut down
    # had no time to write one.
    if [[ -n "$begun" ]]; then
      status="$(on 0 "cd jaxalign && if [ -e run.status ]; then
          cat run.status && ls run.stopped
        elif ! kill -0 \$(cat run.pid); then
          echo 137 && ls run.stopped
        fi" 2> /dev/null || true)"
      case "$status" in
        "") ;;
        # Told to stop by the machine: it goes on, here or on the next slice.
        143) begun="" ;;
        0 | 2 | 130 | *$'\n'*) return "${status%%$'\n'*}" ;;
        *) begun="" && ((++failures <= ${RESTARTS:-10})) || return "$status" ;;
      esac
    fi
    sleep "$poll"
  done
}

case "${1:-}" in
  create | copy | start | logs | stop | delete | keep) "$@" ;;
  *) sed -n '2,21s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
