# shellcheck shell=bash
# What the launch scripts share: they source it, it runs nothing.

fail() { # MESSAGE [EXIT CODE]: one line on stderr, and out
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

quoted() { # WORD ...: the words as a shell reads them back
  local word line='' plain='^[A-Za-z0-9_@%+=:,./-]+$'
  for word in "$@"; do
    if [[ $word =~ $plain ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s' "${line# }"
}

show() { # COMMAND ...: what a dry run prints
  printf '+ %s\n' "$(quoted "$@")"
}

call() { # COMMAND ...: show it in a dry run, else run it
  if [ -n "${dry:-}" ]; then show "$@"; else "$@"; fi
}

need_number() { # OPTION VALUE: a whole number of at least 1, or an error
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 must be a whole number of at least 1"
}

check_flags() { # FLAGS OF THE RUN ...: sets `workdir`
  local flag previous='' config=''
  workdir=''
  for flag in "$@"; do
    case $previous in
      --config) config=$flag ;;
      --workdir) workdir=$flag ;;
    esac
    case $flag in
      --config=*) config=${flag#*=} ;;
      --workdir=*) workdir=${flag#*=} ;;
      --distributed | --distributed=* | --coordinator* | --num_processes* | --process_id*)
        fail "${flag%%=*} is given by this script; leave it out"
        ;;
    esac
    previous=$flag
  done
  [ -n "$config" ] || fail "the run's --config is missing; give it after --: ... -- --config=configs/sd15.py --workdir=DIR"
  [ -n "$workdir" ] || fail "the run's --workdir is missing; give it after --: ... -- --config=$config --workdir=DIR"
}
