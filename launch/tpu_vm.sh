#!/usr/bin/env bash
# jxfer on a Cloud TPU VM, of one host or a slice of many: create it, install, run on all workers, come back to the
# logs, resume after preemption, delete it.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh COMMAND [OPTIONS] [-- ARGUMENTS]

  create              ask for the TPU VM and wait until it is there
  install             put this checkout (or --git URL) on every worker and install it there
  run -- ARGS         start `jxfer ARGS` on all workers, then follow the log; ctrl-c leaves it running
  logs                come back to the log, to the end of the run and with its exit status
  status              the state of the TPU VM and of the run on each worker
  stop                SIGTERM to the run, which saves; wait for it
  resume -- ARGS      whatever is missing of create, install and run, in this order, after deleting what was preempted
  exec -- COMMAND...  a command on all workers
  delete              give the TPU VM back

  --name NAME         ($JXFER_TPU_NAME, or jxfer)
  --zone ZONE         ($JXFER_TPU_ZONE)
  --project PROJECT   ($JXFER_TPU_PROJECT, or what gcloud is set to)
  --type TYPE         such as v5litepod-16 or v6e-8 ($JXFER_TPU_TYPE)
  --version VERSION   software of the VM, such as v2-alpha-tpuv6e ($JXFER_TPU_VERSION)
  --spot              cheaper, and may be preempted
  --no-queue          ask for it at once or not at all, instead of as a queued resource
  --create-flag=FLAG  one more flag for gcloud's create, such as --network=NAME or --internal-ips; may be repeated
  --ssh-flag=FLAG     one more flag for gcloud's ssh and scp, such as --internal-ip; may be repeated
  --git URL           install from this repository instead of this checkout
  --ref REF           branch, tag or commit of it (HEAD)
  --env NAME=VALUE    a variable for the run, such as JXFER_CACHE=/shared/cache; may be repeated
  --worker W          whose log to follow (0)
  --detach            start the run and return
  --until-done        resume: start again after every further preemption until the run has ended
  --poll SECS         how often to ask for the state (30)
  --quiet             delete without asking
  --dry-run           print what would be done

The exit status of run, logs and resume is that of the run: 0 done, 75 stopped after saving, 3 a run failed, 2 bad
input.
END
}

die() {
  printf 'tpu_vm.sh: error: %s\n' "$1" >&2
  exit 2
}

note() { printf 'tpu_vm.sh: %s\n' "$1" >&2; }

name=${JXFER_TPU_NAME:-jxfer} zone=${JXFER_TPU_ZONE-} project=${JXFER_TPU_PROJECT-}
type=${JXFER_TPU_TYPE-} version=${JXFER_TPU_VERSION-}
queued=true detach=false until_done=false dry_run=false git='' ref=HEAD worker=0 poll=30
spot=() create_flags=() ssh_flags=() variables=() quiet=()

case ${1-} in
  create | install | run | logs | status | stop | resume | exec | delete) command=$1 ;;
  -h | --help) usage && exit ;;
  *) die "unknown command \`${1-}\`; see \`launch/tpu_vm.sh --help\`" ;;
esac
shift
while (($#)); do
  case $1 in
    --) break ;;
    -h | --help) usage && exit ;;
    --spot) spot=(--spot) && shift && continue ;;
    --quiet) quiet=(--quiet) && shift && continue ;;
    --no-queue) queued=false && shift && continue ;;
    --detach) detach=true && shift && continue ;;
    --until-done) until_done=true && shift && continue ;;
    --dry-run) dry_run=true && shift && continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  case $1 in
    --name | --zone | --project | --type | --version | --git | --ref | --env | --worker | --poll) ;;
    --create-flag | --ssh-flag) ;;
    *) die "unknown option \`$1\`; what follows is given after \`--\`" ;;
  esac
  (($# > 1)) || die "$1 needs a value"
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --type) type=$2 ;;
    --version) version=$2 ;;
    --git) git=$2 ;;
    --ref) ref=$2 ;;
    --env) variables+=("$2") ;;
    --worker) worker=$2 ;;
    --poll) poll=$2 ;;
    --create-flag) create_flags+=("$2") ;;
    --ssh-flag) ssh_flags+=("$2") ;;
  esac
  shift 2
done
[[ ${1-} != -- ]] || shift

[[ $zone ]] || die "no zone; give --zone ZONE, or set JXFER_TPU_ZONE"
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || die "--name takes lower-case letters, digits and hyphens, not \`$name\`"
[[ $poll =~ ^[0-9]+$ ]] || die "--poll takes a number of seconds, not \`$poll\`"
for variable in ${variables[@]+"${variables[@]}"}; do
  [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env takes NAME=VALUE, not \`$variable\`"
done
case $command in
  create | resume) [[ $type && $version ]] || die "no type or version of the TPU VM; give --type and --version" ;;
esac
case $command in
  run | resume | exec) (($#)) || die "nothing to run; what follows \`--\` runs on the workers" ;;
  *) (($# == 0)) || die "\`$command\` takes nothing after \`--\`" ;;
esac
$dry_run || command -v gcloud >/dev/null || die "no gcloud on the PATH; install the Google Cloud CLI"

root=$(cd "$(dirname "$0")/.." && pwd)
tpu_worker=jxfer/launch/tpu_worker.sh # on the workers, from the home directory
location=("--zone=$zone")
[[ -z $project ]] || location+=("--project=$project")

quote() { # prints words so that any POSIX shell reads exactly them back: plain ones bare, others in single quotes
  local word text separator=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*)
        text=''
        while [[ $word == *\'* ]]; do
          text+="'${word%%\'*}'\\'"
          word=${word#*\'}
        done
        text+="'$word'"
        ;;
      *) text=$word ;;
    esac
    printf '%s%s' "$separator" "$text"
    separator=' '
  done
}

call() {
  if $dry_run; then
    quote "$@"
    printf '\n'
  else
    "$@"
  fi
}

remote() { # runs words on the workers $1; a remote shell is unavoidable there, so each word is quoted for it
  local where=$1
  shift
  call gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" "--worker=$where" \
    ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$(quote "$@")"
}

describe() { # prints one field of the queued-resources or the tpu-vm of this name; ABSENT where there is none
  local words=(gcloud compute tpus "$1" describe "$name" "${location[@]}" "--format=value($2)")
  if $dry_run; then
    call "${words[@]}"
  elif ! "${words[@]}" 2>"$scratch/errors"; then
    grep -qiE 'not_found|not found' "$scratch/errors" || die "$(<"$scratch/errors")"
    printf 'ABSENT\n'
  fi
}

create() {
  if $queued; then
    call gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${location[@]}" \
      "--accelerator-type=$type" "--runtime-version=$version" \
      ${spot[@]+"${spot[@]}"} ${create_flags[@]+"${create_flags[@]}"}
    wait_for_queue
  else
    call gcloud compute tpus tpu-vm create "$name" "${location[@]}" "--accelerator-type=$type" "--version=$version" \
      ${spot[@]+"${spot[@]}"} ${create_flags[@]+"${create_flags[@]}"}
  fi
}

wait_for_queue() { # may be interrupted: the request stays in the queue, and resume waits on
  local now before=''
  if $dry_run; then
    printf '# every %s s, until it is ACTIVE:\n' "$poll"
    describe queued-resources state.state
    return
  fi
  while true; do
    now=$(describe queued-resources state.state)
    [[ $now == "$before" ]] || note "the request for $name is $now"
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPEND* | DELETING | ABSENT) die "there will be no $name; \`delete\` what is left, or \`resume\`" ;;
    esac
    before=$now
    sleep "$poll"
  done
}

delete() {
  if $queued; then # --force: also the node
    call gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force ${quiet[@]+"${quiet[@]}"}
  else
    call gcloud compute tpus tpu-vm delete "$name" "${location[@]}" ${quiet[@]+"${quiet[@]}"}
  fi
}

install() {
  if [[ $git ]]; then
    # shellcheck disable=SC2016 # for the shell there
    remote all bash -c 'set -e
[ -d jxfer/.git ] || git clone --quiet -- "$1" jxfer
git -C jxfer fetch --quiet -- "$1" "$2"
git -C jxfer checkout --quiet --detach FETCH_HEAD' install "$git" "$ref"
  else
    pack
    call gcloud compute tpus tpu-vm scp "$scratch/jxfer.tar.gz" "$name:jxfer.tar.gz" "${location[@]}" --worker=all \
      ${ssh_flags[@]+"${ssh_flags[@]}"}
    remote all sh -c 'mkdir -p jxfer && tar -xzf jxfer.tar.gz -C jxfer'
  fi
  remote all "$tpu_worker" install
}

pack() { # what git knows of this checkout, as it is now
  git -C "$root" rev-parse --verify --quiet HEAD >/dev/null || die "$root is no git checkout; give --git URL"
  if $dry_run; then
    printf '# after packing the files that git lists in %s:\n' "$root"
    return
  fi
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      [[ ! -e $root/$file ]] || printf '%s\0' "$file" # git still lists what was only just deleted
    done | tar -czf "$scratch/jxfer.tar.gz" -C "$root" --null -T -
}

start() { remote all "$tpu_worker" start ${variables[@]+"${variables[@]}"} -- "$@"; }

run() {
  start "$@"
  $detach || logs
}

logs() { remote "$worker" "$tpu_worker" follow; }

stop() { remote all "$tpu_worker" stop; }

status() {
  local state
  if $dry_run; then
    ! $queued || describe queued-resources state.state
    describe tpu-vm state
  else
    if $queued; then
      state=$(describe queued-resources state.state)
      printf 'queued resource %s: %s\n' "$name" "$state"
    fi
    state=$(describe tpu-vm state)
    printf 'TPU VM %s: %s\n' "$name" "$state"
    [[ $state == READY ]] || return 0
  fi
  remote all "$tpu_worker" status
}

bring_up() { # makes of whatever there is a TPU VM that is READY
  local state
  quiet=(--quiet)
  if $queued; then
    state=$(describe queued-resources state.state)
    note "the request for $name is $state"
    case $state in
      ABSENT) create ;;
      FAILED | SUSPEND*)
        delete
        create
        ;;
      *) wait_for_queue ;;
    esac
  fi
  while true; do
    state=$(describe tpu-vm state)
    note "$name is $state"
    case $state in
      READY) return ;;
      ABSENT | PREEMPTED | TERMINATED)
        if $queued || [[ $state != ABSENT ]]; then delete; fi
        create
        ;;
      STOPPED | STOPPING) die "$name is $state, not preempted; \`delete\` it, or start it with gcloud" ;;
      *) sleep "$poll" ;; # it is being made or repaired
    esac
  done
}

resume() {
  local result state
  while true; do
    bring_up
    remote all "$tpu_worker" installed || install
    remote all "$tpu_worker" running || start "$@"
    ! $detach || return 0
    result=0
    logs || result=$?
    if ! $until_done || [[ $result =~ ^[023]$ ]]; then return "$result"; fi
    sleep "$poll" # for the state to change, if this was a preemption
    state=$(describe tpu-vm state)
    if [[ $state == READY ]] && ! remote all "$tpu_worker" running; then return "$result"; fi
    note "left with status $result, and $name is $state: again"
  done
}

rehearse_resume() { # all of it, as only the states decide
  ! $queued || describe queued-resources state.state
  describe tpu-vm state
  printf '# what was preempted or has failed:\n'
  quiet=(--quiet)
  delete
  printf '# where there is none, or no longer:\n'
  create
  printf '# where it is not installed:\n'
  remote all "$tpu_worker" installed
  install
  printf '# where it does not run:\n'
  remote all "$tpu_worker" running
  run "$@"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case $command in
  exec) remote all "$@" ;;
  resume) if $dry_run; then rehearse_resume "$@"; else resume "$@"; fi ;;
  *) "$command" "$@" ;;
esac
