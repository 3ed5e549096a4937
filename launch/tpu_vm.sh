#!/usr/bin/env bash
# Run one training on a Cloud TPU slice, from your own machine.
#
#   launch/tpu_vm.sh queue --name=my-pod --zone=us-central2-b --type=v4-32
#   launch/tpu_vm.sh run --name=my-pod --zone=us-central2-b -- --config=configs/sd15.py \
#     --workdir=runs/sd15 --config.log.checkpoints=gs://BUCKET/sd15
#
# usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS OF THE RUN]
#
#   create    make the TPU VM now
#   queue     request one: a queued resource, which arrives when there is room
#   install   put the repository at one commit, and its packages, on all workers
#   run       start the run on all workers, detached: it survives a lost connection
#   follow    show worker 0's log as it grows
#   status    show the request, the TPU, and the run on each worker
#   stop      let the run save and end
#   resume    bring back a preempted TPU, install, and start the run again
#   delete    delete the TPU and its request, then list what is left
#
#   --project=PROJECT  default: gcloud's own (`gcloud config get project`)
#   --type=TYPE        create, queue, resume: v4-32, v5litepod-16, v5p-32, v6e-16, ...
#   --version=VERSION  runtime version (default: the one for the type)
#   --spot             create, queue, resume: cheaper, but may be preempted
#   --gcloud=FLAG      one more flag of gcloud's create, as --gcloud=--network=NAME; repeatable
#   --commit=COMMIT    install, resume: default: this checkout's, which must be clean and pushed
#   --repo=URL         a URL that the workers can read (default: the one of the remote "origin")
#   --setup=COMMAND    run by each worker in the checkout after installing, as to copy a teacher
#   --shared-disk      run, resume: the workdir is on a disk that survives the workers
#   --worker=N         follow: this worker's log (default: 0)
#   --wait=SECONDS     stop: how long a save may take (default: 900)
#   --watch            resume: check again and again until the run has ended
#   --every=SECONDS    resume: between two checks (default: 60)
#   --dry-run          print the commands, run nothing (resume: as for a preempted queued resource)
#
# Environment variables that work too: POD_NAME, POD_ZONE, POD_PROJECT, POD_TYPE, POD_VERSION,
# POD_SPOT=yes, POD_COMMIT, POD_REPO, POD_SETUP.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"
exec 3>&1 # where a dry run prints, also from inside $(...)

# ------------------------------------------------------------------------------------------------ options

name=${POD_NAME:-} zone=${POD_ZONE:-} project=${POD_PROJECT:-} type=${POD_TYPE:-} version=${POD_VERSION:-} spot=${POD_SPOT:-}
commit=${POD_COMMIT:-} repo=${POD_REPO:-} setup=${POD_SETUP:-}
extra=() shared='' worker=0 wait=900 watch='' every=60 dry=''

help="launch/tpu_vm.sh --help lists them"
[ $# -gt 0 ] || fail "the command is missing; choose one of create, queue, install, run, follow, status, stop, resume, delete; $help"
command=$1
shift
case $command in
  create | queue | install | run | follow | status | stop | resume | delete) ;;
  -h | --help | help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
  *) fail "unknown command $command; choose one of create, queue, install, run, follow, status, stop, resume, delete" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=yes ;;
    --gcloud=*) extra+=("${1#*=}") ;;
    --commit=*) commit=${1#*=} ;;
    --repo=*) repo=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --shared-disk) shared=yes ;;
    --worker=*) worker=${1#*=} ;;
    --wait=*) wait=${1#*=} ;;
    --watch) watch=yes ;;
    --every=*) every=${1#*=} ;;
    --dry-run) dry=yes ;;
    --) break ;;
    --name | --zone | --project | --type | --version | --gcloud | --commit | --repo | --setup | --worker | --wait | --every)
      fail "$1 needs a value: $1=VALUE"
      ;;
    *) fail "unknown option $1; $help, the run's own flags come after --" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift # the --
flags=("$@")

[ -n "$name" ] || fail "--name is missing; give the TPU a name: --name=my-pod (or POD_NAME)"
[[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] || fail "--name=$name must be lower-case letters, digits and -, from a letter on"
[ -n "$zone" ] || fail "--zone is missing; give the zone of your quota: --zone=us-central2-b (or POD_ZONE)"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone is not a zone; zones look like us-central2-b"
[[ $worker =~ ^[0-9]+$ ]] || fail "--worker=$worker must be a worker's number, from 0 on"
need_number --wait "$wait"
need_number --every "$every"

check_type() { # also sets `version`
  [ -n "$type" ] || fail "--type is missing; give the slice: --type=v4-32 (or POD_TYPE); \`gcloud compute tpus accelerator-types list --zone=$zone\` lists them"
  [[ $type != v5e-* ]] || fail "--type=$type is called v5litepod-${type#v5e-}; give --type=v5litepod-${type#v5e-}"
  [[ $type =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] || fail "--type=$type is not a slice; slices look like v4-32, v5litepod-16, v5p-32, v6e-16"
  if [ -z "$version" ]; then
    case $type in
      v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) fail "no runtime version is known for --type=$type; give --version; \`gcloud compute tpus tpu-vm versions list --zone=$zone\` lists them" ;;
    esac
  fi
}

check_commit() { # sets `commit` to all its digits, and `repo`
  local changed
  if [ -n "$commit" ]; then
    local found
    if found=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}" 2> /dev/null); then commit=$found; fi
    [[ $commit =~ ^[0-9a-f]{40}$ ]] || fail "--commit=$commit is not a commit of this checkout; give all 40 digits"
  else
    commit=$(git -C "$root" rev-parse --verify --quiet HEAD 2> /dev/null) || fail "$root is not a git checkout; give --commit and --repo"
    changed=$(git -C "$root" status --porcelain | sed -n '1s/^...//p')
    [ -z "$changed" ] || fail "this checkout has changes that the workers would not get ($changed ...); commit and push them, or give --commit"
    [ -n "$(git -C "$root" branch --remotes --contains "$commit")" ] ||
      fail "commit ${commit:0:12} is not pushed, so the workers cannot get it; push it, or give --commit"
  fi
  if [ -z "$repo" ]; then
    repo=$(git -C "$root" remote get-url origin 2> /dev/null) || fail "this checkout has no remote \"origin\"; give --repo=https://..."
    [[ $repo == https://* ]] || fail "the workers have no key for $repo; give --repo=https://..."
  fi
}

check_run() {
  check_flags "${flags[@]}"
  local flag kept=$shared
  case $workdir in
    *://*) fail "--workdir=$workdir must be a folder of the workers; checkpoints may go to a bucket: --config.log.checkpoints=gs://BUCKET/FOLDER" ;;
  esac
  for flag in "${flags[@]}"; do
    case $flag in --config.*checkpoints=gs://*) kept=yes ;; esac
  done
  [ -n "$kept" ] || fail "--workdir=$workdir is lost when the workers go, and so are the checkpoints; add --config.log.checkpoints=gs://BUCKET/FOLDER, or give --shared-disk"
}

# ------------------------------------------------------------------------------------------------ gcloud

where=() nodes=(gcloud compute tpus tpu-vm) requests=(gcloud compute tpus queued-resources)
[ -z "$project" ] || where+=("--project=$project")
where+=("--zone=$zone")
dry_request=ACTIVE dry_node=READY # what a dry run is told

state_of() { # request|node: its state, or nothing where there is none
  local kind=$1 query
  if [ "$kind" = request ]; then
    query=("${requests[@]}" list "${where[@]}" "--filter=name~/$name\$" "--format=value(state.state)")
  else
    query=("${nodes[@]}" list "${where[@]}" "--filter=name~/$name\$" "--format=value(state)")
  fi
  if [ -n "$dry" ]; then
    show "${query[@]}" >&3
    if [ "$kind" = request ]; then echo "$dry_request"; else echo "$dry_node"; fi
  else
    "${query[@]}"
  fi
}

on_workers() { # all|N COMMAND
  call "${nodes[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

create_node() { call "${nodes[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot} "${extra[@]}"; }

create_request() {
  call "${requests[@]}" create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$version" \
    ${spot:+--spot} "${extra[@]}"
}

delete_node() { call "${nodes[@]}" delete "$name" "${where[@]}" --quiet; }

delete_request() { call "${requests[@]}" delete "$name" "${where[@]}" --force --quiet; }

# ------------------------------------------------------------------------------------------------ on the workers

install() {
  # The images come with Python 3.10; uv takes a newer one from the machine or fetches it.
  local steps=(
    "{ [ ! -e jaxdistill/launch/tpu_worker.sh ] || bash jaxdistill/launch/tpu_worker.sh idle; }"
    "export PATH=\"\$HOME/.local/bin:\$PATH\" GIT_TERMINAL_PROMPT=0 PIP_BREAK_SYSTEM_PACKAGES=1"
    "mkdir -p jaxdistill"
    "cd jaxdistill"
    "git init --quiet"
    "git fetch --quiet --force $(quoted "$repo" '+refs/heads/*:refs/remotes/origin/*' '+refs/tags/*:refs/tags/*')"
    "git checkout --quiet --force --detach $commit"
    "{ command -v uv > /dev/null || python3 -m pip install --quiet --user uv; }"
    "uv venv --quiet --allow-existing --python '>=3.11' .venv"
    "uv pip install --quiet --python .venv/bin/python '.[tpu,text-to-image]'"
  )
  [ -z "$setup" ] || steps+=("{ $setup; }")
  steps+=("echo \"worker \$(hostname): ${commit:0:12} is installed\"")
  local line
  printf -v line '%s && ' "${steps[@]}"
  on_workers all "${line% && }"
}

start() { on_workers all "$(quoted bash jaxdistill/launch/tpu_worker.sh start "${flags[@]}")"; }

worker_states() { # one line a worker
  on_workers all "if [ -e jaxdistill/launch/tpu_worker.sh ]; then bash jaxdistill/launch/tpu_worker.sh status; else echo \"worker \$(hostname): none\"; fi"
}

# ------------------------------------------------------------------------------------------------ resume

say() { [ -n "$dry" ] || printf '%s\n' "$1" >&2; }

pause() { [ -n "$dry" ] || sleep "$every"; }

trouble() { [ -n "$watch" ] || fail "gcloud failed; see its message above" 1; }

bring_up() { # wait for the TPU, and make it anew where it was taken away
  local request node said='' again=''
  while :; do
    if ! request=$(state_of request) || ! node=$(state_of node); then
      trouble
      pause
      continue
    fi
    if [ "$said" != "$request/$node" ]; then
      said=$request/$node
      say "queued resource: ${request:-none}, TPU: ${node:-none}"
    fi
    case $request/$node in
      /READY | ACTIVE/READY) return ;;
      FAILED/*) fail "the queued resource $name has failed; see \`$(quoted "${requests[@]}" describe "$name" "${where[@]}")\`, then delete and queue" 1 ;;
      */STOPPED) fail "the TPU $name is stopped; start it: \`$(quoted "${nodes[@]}" start "$name" "${where[@]}")\`" 1 ;;
      SUSPENDED/* | ACTIVE/PREEMPTED | ACTIVE/TERMINATED | ACTIVE/UNKNOWN)
        say "preempted: asking for it again"
        again=create_request
        { delete_request && create_request; } || trouble
        dry_request=ACTIVE dry_node=READY
        ;;
      /PREEMPTED | /TERMINATED | /UNKNOWN)
        say "preempted: making it again"
        again=create_node
        { delete_node && create_node; } || trouble
        ;;
      /)
        [ -n "$again" ] || fail "there is no TPU $name in $zone; make one: launch/tpu_vm.sh queue" 1
        "$again" || trouble
        ;;
    esac
    pause
  done
}

resume() {
  local first=yes states
  dry_request=SUSPENDED dry_node=PREEMPTED
  while :; do
    bring_up
    if ! states=$(worker_states); then
      trouble
      pause
      continue
    fi
    if [ -n "$dry" ]; then
      printf '%s\n' "$states"
      states='worker x: none'
    fi
    case $states in
      *": running"*)
        [ -z "$first" ] || say "the run is going on"
        ;;
      *": none"* | *": lost"* | *": interrupted"*)
        { install && start; } || trouble
        ;;
      *": stopped"* | *": failed"*)
        if [ -n "$first" ]; then
          { install && start; } || trouble
        else
          printf '%s\n' "$states"
          [[ $states != *": failed"* ]] || fail "the run has failed; its log: launch/tpu_vm.sh follow --name=$name --zone=$zone --worker=N" 1
          return
        fi
        ;;
      *": finished"*)
        printf '%s\n' "$states"
        return
        ;;
      *) fail "the workers gave an unknown answer: $states" 1 ;;
    esac
    first=''
    if [ -z "$watch" ] || [ -n "$dry" ]; then return; fi
    pause
  done
}

# ------------------------------------------------------------------------------------------------ commands

case $command in create | queue | resume) check_type ;; esac
case $command in install | resume) check_commit ;; esac
case $command in
  run | resume) check_run ;;
  *) [ ${#flags[@]} -eq 0 ] || fail "$command takes no flags of the run; leave out -- ${flags[0]} ..." ;;
esac
[ -n "$dry" ] || command -v gcloud > /dev/null || fail "gcloud is not on the PATH; install it: https://cloud.google.com/sdk/docs/install"

case $command in
  create) create_node ;;
  queue) create_request ;;
  install) install ;;
  run) start ;;
  follow) on_workers "$worker" "tail -n 100 -F jaxdistill-run/log" ;;
  status)
    request=$(state_of request)
    node=$(state_of node)
    [ -n "$dry" ] || echo "queued resource: ${request:-none}, TPU: ${node:-none}"
    if [ "$node" = READY ]; then worker_states; fi
    ;;
  stop) on_workers all "bash jaxdistill/launch/tpu_worker.sh stop $wait" ;;
  resume) resume ;;
  delete)
    request=$(state_of request)
    if [ -n "$request" ]; then delete_request; fi
    node=$(state_of node)
    if [ -n "$node" ]; then delete_node; fi
    say "left in $zone:"
    call "${requests[@]}" list "${where[@]}"
    call "${nodes[@]}" list "${where[@]}"
    ;;
esac
