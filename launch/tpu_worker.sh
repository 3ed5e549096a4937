#!/usr/bin/env bash
# Look after the run on one TPU worker. launch/tpu_vm.sh calls this script on all workers.
#
#   launch/tpu_worker.sh status
#
# usage: launch/tpu_worker.sh COMMAND
#
#   start FLAGS ...  start the run, detached from this shell
#   status           print one line: worker HOST: STATE
#   stop [SECONDS]   send SIGTERM and wait for the save (default: 900)
#   idle             fail if a run is going on
#
# STATE is one of
#   none         no run was started here
#   running
#   finished     it came to its end
#   stopped      it saved and ended because of `stop`
#   interrupted  it saved and ended because the machine was shut down
#   lost         the machine went down before it could save
#   failed CODE
#
# Files are in ~/jaxdistill-run: log, pid, exit, and what the state is worked out from.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$checkout/launch/common.sh"
folder=$HOME/jaxdistill-run
python=$checkout/.venv/bin/python

boot() { cat /proc/sys/kernel/random/boot_id 2> /dev/null || echo unknown; }

state() {
  local code told
  if [ ! -e "$folder/boot" ]; then
    echo none
  elif [ "$(cat "$folder/boot")" != "$(boot)" ]; then
    echo lost
  elif [ -e "$folder/exit" ]; then
    read -r code told < "$folder/exit"
    if [ "$code" -ne 0 ]; then
      echo "failed $code"
    elif [ -e "$folder/asked" ]; then
      echo stopped
    elif [ "$told" = yes ]; then
      echo interrupted
    else
      echo finished
    fi
  elif [ -e "$folder/pid" ] && kill -0 "$(cat "$folder/pid")" 2> /dev/null; then
    echo running
  else
    echo lost
  fi
}

idle() {
  [ "$(state)" != running ] || fail "worker $(hostname): a run is going on (process $(cat "$folder/pid")); stop it first: launch/tpu_vm.sh stop"
}

start() {
  idle
  [ -x "$python" ] || fail "worker $(hostname): $python is missing; install it first: launch/tpu_vm.sh install"
  mkdir -p "$folder"
  rm -f "$folder"/{pid,exit,asked}
  boot > "$folder/boot"
  nohup setsid bash "$checkout/launch/tpu_worker.sh" supervise "$@" >> "$folder/log" 2>&1 < /dev/null &
  # A mistake in the flags shows within seconds.
  local second found
  for ((second = 0; second < ${JAXDISTILL_START_SECONDS:-15}; second++)); do
    sleep 1
    [ ! -e "$folder/exit" ] || break
  done
  found=$(state)
  case $found in
    running | finished) printf 'worker %s: %s, log %s\n' "$(hostname)" "$found" "$folder/log" ;;
    *) fail "worker $(hostname): $found at once: $(tail -n 1 "$folder/log")" 1 ;;
  esac
}

supervise() { # FLAGS ...: the run, and a note of how it ended
  local told='' code=0
  cd "$checkout"
  # Where the machine is shut down every process gets SIGTERM, the run its own: here it is only noted, once the run has ended.
  trap 'told=yes' TERM
  printf '+ %s\n' "$(quoted "$python" -m jaxdistill.main "$@" --distributed)"
  # shellcheck disable=SC2016
  PYTHONUNBUFFERED=1 bash -c 'echo $$ > "$0.new" && mv "$0.new" "$0" && exec "$@"' \
    "$folder/pid" "$python" -m jaxdistill.main "$@" --distributed || code=$?
  echo "$code ${told:-no}" > "$folder/exit.new"
  mv "$folder/exit.new" "$folder/exit"
}

stop() { # [SECONDS]
  local second
  if [ "$(state)" = running ]; then
    touch "$folder/asked"
    kill -TERM "$(cat "$folder/pid")"
    for ((second = 0; second < ${1:-900}; second++)); do
      [ ! -e "$folder/exit" ] || break
      sleep 1
    done
    [ -e "$folder/exit" ] || fail "worker $(hostname): still running ${1:-900} s after SIGTERM; look at its log, or wait longer: --wait=SECONDS" 1
  fi
  status
}

status() { printf 'worker %s: %s\n' "$(hostname)" "$(state)"; }

case ${1:-} in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" ;;
  start | status | stop | idle | supervise) "$@" ;;
  *) fail "${1:-nothing} is not a command; choose one of start, status, stop, idle" ;;
esac
