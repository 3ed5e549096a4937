#!/usr/bin/env bash
# Run one training as N processes on this machine, over the loopback: a pod's code path without a pod.
#
#   launch/local_pod.sh 2 -- --config=configs/smoke.py --workdir=runs/pod
#
# usage: launch/local_pod.sh N [OPTIONS] -- --config=FILE --workdir=FOLDER [--config.KEY=VALUE ...]
#
#   --devices=N      CPU devices of each process
#   --port=N         port of the coordinator (default: a free one)
#   --logs=FOLDER    a log file per process (default: WORKDIR-logs, or pod-logs)
#   --grace=SECONDS  how long the others may take to end after a process has died (default: 30)
#   --dry-run        print the commands, run nothing
#
# Process 0 also writes to the terminal. Ctrl-C or SIGTERM lets the run save and end; the same
# command resumes it. A second Ctrl-C ends it at once. JAX_PLATFORMS is cpu unless it is set. The
# exit code is the first one that is not 0.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

count='' devices='' port='' logs='' grace=30 dry=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    --devices=*) devices=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --dry-run) dry=yes ;;
    --) break ;;
    -*) fail "unknown option $1; launch/local_pod.sh --help lists them, the run's own flags come after --" ;;
    *) if [ -z "$count" ]; then count=$1; else fail "unexpected argument $1; the run's own flags come after --"; fi ;;
  esac
  shift
done
[ -n "$count" ] || fail "the number of processes is missing; give it: launch/local_pod.sh 2 -- --config=configs/smoke.py --workdir=runs/pod"
need_number "the number of processes" "$count"
[ -z "$devices" ] || need_number --devices "$devices"
need_number --grace "$grace"
[ $# -gt 0 ] || fail "the run's flags are missing; give them: launch/local_pod.sh $count -- --config=configs/smoke.py --workdir=runs/pod"
shift
check_flags "$@"
if [[ -z $logs && $workdir == *://* ]]; then logs=pod-logs; fi
logs=${logs:-${workdir%/}-logs}
[[ $logs != *://* ]] || fail "--logs=$logs must be a folder of this machine; give --logs=DIR"

if [ -n "$port" ]; then
  need_number --port "$port"
  [ "$port" -le 65535 ] || fail "--port=$port must be at most 65535"
else
  # Below the range from which outgoing connections take theirs.
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || break
  done
fi

environment=("JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" PYTHONUNBUFFERED=1)
[ -z "$devices" ] || environment+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")

command_of() { # PROCESS FLAGS ...: sets `command`
  command=(env "${environment[@]}" python -m jaxdistill.main "${@:2}")
  command+=("--coordinator=127.0.0.1:$port" "--num_processes=$count" "--process_id=$1")
}

if [ -n "$dry" ]; then
  for ((i = 0; i < count; i++)); do
    command_of "$i" "$@"
    show "${command[@]}"
  done
  exit 0
fi
command -v python > /dev/null || fail "python is not on the PATH; activate the environment that holds jaxdistill"
mkdir -p "$logs" 2> /dev/null || fail "--logs=$logs cannot be made; choose another folder"

pids=() first=0 dead='' asked=0 early='' deadline=0
log_of() { printf '%s/process_%s.log' "$logs" "$1"; }
running() { # the processes that have not ended
  local i
  for ((i = 0; i < count; i++)); do [ -z "${pids[i]}" ] || printf '%s ' "${pids[i]}"; done
}
signal_all() { # SIGNAL
  local pid
  for pid in $(running); do kill "-$1" "$pid" 2> /dev/null || true; done
}
stop() {
  asked=$((asked + 1))
  if [ "$asked" -eq 1 ]; then
    echo "stopping: the processes save and end; press Ctrl-C again to end them at once" >&2
    signal_all TERM
  else
    signal_all KILL
  fi
}

trap 'early=yes' TERM INT
exec 3> >(exec tee -i -a "$(log_of 0)")
tee=$!
# A group of its own for each process: Ctrl-C would reach it beside the signal that is passed on.
set -m
for ((i = 0; i < count; i++)); do
  command_of "$i" "$@"
  if [ "$i" -eq 0 ]; then
    "${command[@]}" < /dev/null >&3 2>&1 3>&- &
  else
    "${command[@]}" < /dev/null >> "$(log_of "$i")" 2>&1 3>&- &
  fi
  pids[i]=$!
done
set +m
exec 3>&-
# Of several processes only SIGTERM makes the run save: Ctrl-C is passed on as that.
trap stop TERM INT
[ -z "$early" ] || stop

while [ -n "$(running)" ]; do
  for ((i = 0; i < count; i++)); do
    if [ -z "${pids[i]}" ] || kill -0 "${pids[i]}" 2> /dev/null; then continue; fi
    code=0
    wait "${pids[i]}" 2> /dev/null || code=$?
    pids[i]=''
    if [ "$code" -eq 0 ] || [ -n "$dead" ]; then continue; fi
    dead=$i first=$code deadline=$((SECONDS + grace))
    printf 'error: process %s ended with exit code %s; its log is %s\n' "$i" "$code" "$(log_of "$i")" >&2
    if [ "$asked" -eq 0 ] && [ -n "$(running)" ]; then
      echo "ending the other processes" >&2
      signal_all TERM
    fi
  done
  if [ -n "$dead" ] && [ "$SECONDS" -ge "$deadline" ]; then signal_all KILL; fi
  sleep 0.2 || true # Ctrl-C ends it
done
wait "$tee" 2> /dev/null || true
exit "$first"
