#!/usr/bin/env bash
# N processes of jxfer on this machine: one run over all of them, or N workers that share one --out. What the other
# launchers do over many machines, rehearsed on one.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [OPTIONS] -- ARGUMENTS OF JXFER...

  -n, --processes N  one run over N processes (2)
  -w, --workers N    instead: N workers, each on its own, that share the grid of one --out
  -d, --devices D    give each process D virtual CPU devices
  -g, --gpus G       give each process G GPUs of its own
  -p, --port P       where the processes of a run meet (a free port)
      --grace SECS   how long a process may take to save before it is killed (60)
      --dry-run      print what would be started

  launch/local.sh -n 2 -d 4 -- ablate experiments/glyphs_to_digits.py --out out/rehearsal --shots 5

SIGTERM, SIGINT (ctrl-c) and SIGHUP go to every process once, which then saves and ends. If a process of a run fails,
the others end by themselves, and after half of --grace they are told to; workers go on. The exit status is the worst
of all: 0 done, 75 stopped after saving, 3 a run failed, 2 bad input, any other a crash.
END
}

die() {
  printf 'local.sh: error: %s\n' "$1" >&2
  exit 2
}

note() { printf 'local.sh: %s\n' "$1" >&2; }

processes=2 workers='' devices='' gpus='' port='' grace=60 dry_run=false
while (($#)); do
  case $1 in
    --) break ;;
    -h | --help) usage && exit ;;
    --dry-run) dry_run=true && shift && continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  case $1 in
    -n | --processes | -w | --workers | -d | --devices | -g | --gpus | -p | --port | --grace) ;;
    *) die "unknown option \`$1\`; the arguments of jxfer come after \`--\`" ;;
  esac
  [[ ${2-} =~ ^[1-9][0-9]{0,8}$ ]] || die "$1 takes a whole number from 1, not \`${2-}\`"
  case $1 in
    -n | --processes) processes=$2 ;;
    -w | --workers) workers=$2 ;;
    -d | --devices) devices=$2 ;;
    -g | --gpus) gpus=$2 ;;
    -p | --port) port=$2 ;;
    --grace) grace=$2 ;;
  esac
  shift 2
done
[[ ${1-} == -- ]] || die "no \`--\` before the arguments of jxfer, as in \`launch/local.sh -n 2 -- ablate EXPERIMENT\`"
shift
(($#)) || die "no arguments of jxfer after \`--\`"
[[ -z $devices || -z $gpus ]] || die '--devices are virtual ones of the CPU; give either them or --gpus'
$dry_run || command -v jxfer >/dev/null || die 'no jxfer on the PATH; activate the environment that it is installed in'

count=${workers:-$processes}
if [[ -z $workers && -z $port ]]; then
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
if [[ $gpus ]]; then
  all=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)}
  IFS=, read -ra visible <<<"$all"
  ((${#visible[@]} >= count * gpus)) || die "$count × $gpus GPUs are more than the ${#visible[@]} there are"
fi

variables=()
set_variables() { # of process $1
  if [[ $workers ]]; then
    variables=(JXFER_NUM_PROCESSES=1) # on its own, whatever cluster this is
  else
    variables=("JXFER_COORDINATOR=127.0.0.1:$port" "JXFER_NUM_PROCESSES=$count" "JXFER_PROCESS_ID=$1")
  fi
  if [[ $devices ]]; then
    variables+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  elif [[ $gpus ]]; then
    local own=("${visible[@]:$1*gpus:gpus}")
    variables+=("CUDA_VISIBLE_DEVICES=$(IFS=, && printf %s "${own[*]}")")
  fi
}

if $dry_run; then
  for ((id = 0; id < count; id++)); do
    set_variables "$id"
    printf '%q ' env "${variables[@]}" jxfer "$@"
    printf '&\n'
  done
  exit
fi

label() { # writes its input with a prefix; a loop of the shell, as sed and awk hold lines back, each in its own way
  trap '' INT TERM HUP
  local line
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=() labels=() statuses=()
stopping=false ending=false told_at='' deadline='' result=0

signal_all() { # sends $1 to each process that still runs, with $2 a minus to all of its group
  local each
  for each in "${!pids[@]}"; do
    [[ ${statuses[each]-} ]] || kill -s "$1" -- "${2-}${pids[each]}" 2>/dev/null || true
  done
}

# shellcheck disable=SC2317,SC2329 # called by traps
stop() {
  stopping=true deadline=$((SECONDS + grace))
  signal_all "$1"
}

rank() { # how bad a status is
  case $1 in 0) echo 0 ;; 75) echo 1 ;; 3) echo 2 ;; 2) echo 3 ;; *) echo 4 ;; esac
}

take() { # the status $2 with which process $1 ended
  local status=$2
  if $stopping && ((status == 143)); then status=75; fi # ended by the signal before there was anything to save
  statuses[$1]=$status
  ((status == 0)) || note "process $1 ended with status $status"
  if $ending && [[ $status =~ ^(75|137|143)$ ]]; then return; fi # we did that
  if (($(rank "$status") > $(rank "$result"))); then result=$status; fi
  if [[ $status != 0 && -z $workers ]] && ! $stopping && ! $ending; then
    ending=true told_at=$((SECONDS + (grace + 1) / 2))
  fi
}

scratch=$(mktemp -d)
early=''
trap 'rm -rf "$scratch"' EXIT
trap 'early=TERM' TERM HUP # until there is somebody to tell
trap 'early=INT' INT
set -m # a process group for each, so that ctrl-c reaches this script alone, which passes it on once
for ((id = 0; id < count; id++)); do
  set_variables "$id"
  mkfifo "$scratch/$id.out" "$scratch/$id.err"
  label "$id" <"$scratch/$id.out" &
  labels+=("$!")
  label "$id" <"$scratch/$id.err" >&2 &
  labels+=("$!")
  env "${variables[@]}" jxfer "$@" </dev/null >"$scratch/$id.out" 2>"$scratch/$id.err" &
  pids+=("$!")
done
trap 'stop TERM' TERM HUP
trap 'stop INT' INT
[[ -z $early ]] || stop "$early"

while ((${#statuses[@]} < count)); do
  sleep 0.1
  for ((each = 0; each < count; each++)); do
    if [[ -z ${statuses[each]-} ]] && ! kill -0 "${pids[each]}" 2>/dev/null; then
      status=0
      wait "${pids[each]}" || status=$?
      kill -s KILL -- "-${pids[each]}" 2>/dev/null || true # what it may have left behind
      take "$each" "$status"
    fi
  done
  if [[ $told_at ]] && ((SECONDS >= told_at)); then # jxfer itself needs about 25 s to find that a process is lost
    told_at='' deadline=$((SECONDS + grace))
    signal_all TERM
  fi
  if [[ $deadline ]] && ((SECONDS >= deadline)); then
    deadline=''
    note "killing what did not end within $grace s"
    signal_all KILL -
  fi
done
wait "${labels[@]}" || true # for the last lines
exit "$result"
