#!/usr/bin/env bash
# What tpu_vm.sh runs on the workers of a TPU VM, from the checkout that it put there.
#
#   tpu_worker.sh install                         a virtual environment with this checkout and its [tpu] extra
#   tpu_worker.sh installed                       status 0 if there is one
#   tpu_worker.sh start [NAME=VALUE...] -- ARGS   jxfer ARGS, which goes on when the connection ends
#   tpu_worker.sh running                         status 0 if it runs
#   tpu_worker.sh follow                          its log until it ends, and its exit status
#   tpu_worker.sh stop                            SIGTERM, and wait until it has saved
#   tpu_worker.sh status
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
state=$HOME/.jxfer-vm
mkdir -p "$state"

die() {
  printf 'tpu_worker.sh: error: %s\n' "$1" >&2
  exit 1
}

find_python() { # prints a Python that jxfer can use, and fails where there is none
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

install() {
  local python
  if [[ ! -x $state/venv/bin/python ]]; then
    if python=$(find_python); then
      "$python" -m venv "$state/venv"
    else # the system's Python is too old: uv brings one
      python3 -m pip install --quiet --upgrade --target "$state/uv" uv
      "$state/uv/bin/uv" venv --quiet --seed --python 3.12 "$state/venv"
    fi
  fi
  cd "$checkout"
  "$state/venv/bin/python" -m pip install --quiet '.[tpu]'
}

is_running() { [[ -e $state/pid && ! -e $state/status ]] && kill -0 "$(cat "$state/pid")" 2>/dev/null; }

start() { # from the checkout, so that experiments/ is found
  ! is_running || die "a run is under way on $(hostname); follow it, or stop it first"
  [[ -x $state/venv/bin/jxfer ]] || die "jxfer is not installed on $(hostname)"
  cd "$checkout"
  rm -f "$state/pid" "$state/status"
  [[ ! -e $state/log ]] || mv "$state/log" "$state/log.before"
  setsid "$checkout/launch/tpu_worker.sh" supervise "$@" </dev/null >"$state/log" 2>&1 &
  local tries
  for tries in {1..100}; do
    [[ ! -e $state/pid ]] || return 0
    sleep 0.1
  done
  die "jxfer did not start on $(hostname), after $tries tries; see $state/log there"
}

supervise() { # outlives the connection; keeps the process id and then the exit status
  local variables=() status=0
  while [[ $1 != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  env ${variables[@]+"${variables[@]}"} "$state/venv/bin/jxfer" "$@" &
  printf '%s\n' "$!" >"$state/pid.new"
  mv "$state/pid.new" "$state/pid"
  wait "$!" || status=$?
  printf '%s\n' "$status" >"$state/status"
}

follow() {
  [[ -e $state/pid ]] || die "nothing was started on $(hostname)"
  tail --lines=1000 --follow --sleep-interval=0.2 --pid="$(cat "$state/pid")" "$state/log"
  finish
}

finish() { # says how the run ended, and ends like it
  local tries
  for tries in {1..50}; do
    if [[ -e $state/status ]]; then
      printf 'tpu_worker.sh: ended with status %s on %s\n' "$(cat "$state/status")" "$(hostname)" >&2
      exit "$(cat "$state/status")"
    fi
    sleep 0.1
  done
  die "the run on $(hostname) is gone without a status, after $tries tries: the machine was shut down under it"
}

stop() {
  is_running || die "nothing runs on $(hostname)"
  kill -TERM "$(cat "$state/pid")"
  while is_running; do sleep 0.5; done
  printf 'stopped on %s with status %s\n' "$(hostname)" "$(cat "$state/status" 2>/dev/null || echo '?')"
}

status() {
  if is_running; then
    printf '%s: running\n' "$(hostname)"
  elif [[ -e $state/status ]]; then
    printf '%s: ended with status %s\n' "$(hostname)" "$(cat "$state/status")"
  else
    printf '%s: nothing was started\n' "$(hostname)"
  fi
  [[ ! -e $state/log ]] || tail --lines=1 "$state/log"
}

case ${1-} in
  install | start | supervise | follow | stop | status) "$@" ;;
  installed) [[ -x $state/venv/bin/jxfer ]] ;;
  running) is_running ;;
  *) die "unknown command \`${1-}\`" ;;
esac
