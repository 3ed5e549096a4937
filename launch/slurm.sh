#!/usr/bin/env bash
#SBATCH --job-name=jaxdistill
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@120
# Run one training on the nodes of a SLURM cluster, one process per node. Start it on a login node,
# in the environment that holds jaxdistill.
#
#   launch/slurm.sh --nodes=2 -- --config=configs/sd15.py --workdir=runs/sd15
#
# With NVIDIA GPUs give --gpus-per-node=8, and --ntasks-per-node=8 for one process a GPU; without the
# latter one process has all of a node's. The processes of a node divide its GPUs among them, and
# --cpus-per-task are the cores of each.
#
# usage: launch/slurm.sh --nodes=N [OPTIONS OF SBATCH] [--dry-run] --
#        --config=FILE --workdir=FOLDER [--config.KEY=VALUE ...]
#
# From the repository's root this does the same:
# `sbatch --nodes=N launch/slurm.sh --config=FILE --workdir=FOLDER ...`
#
# The workdir must be on a disk that all nodes share. The run saves and ends 120 seconds before the
# time limit, and when the job is preempted. The job is then queued again and resumes the run.
# `scancel --signal=TERM JOB` lets it save and end for good.
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
else
  root=$PWD # SLURM runs a copy of this file from a folder of its own
  [ -e launch/common.sh ] || { echo "error: $PWD is not the repository's root; start the job from there, or with --chdir" >&2 && exit 2; }
fi
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

dry='' options=() nodes=''
while [ $# -gt 0 ] && { [ -z "${SLURM_JOB_ID:-}" ] || [[ $1 == -- || $1 == --dry-run ]]; }; do
  case $1 in
    -h | --help) sed -n '/^# Run one/,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    --dry-run) dry=yes ;;
    --)
      shift
      break
      ;;
    --config=* | --workdir=*) fail "$1 is the run's; give it after --: launch/slurm.sh --nodes=2 -- --config=CONFIG --workdir=DIR" ;;
    --nodes=*) nodes=${1#*=} && options+=("$1") ;;
    *) options+=("$1") ;;
  esac
  shift
done

if [ -z "${SLURM_JOB_ID:-}" ]; then
  [ -n "$nodes" ] || fail "--nodes is missing; give the number of nodes: launch/slurm.sh --nodes=2 -- --config=CONFIG --workdir=DIR"
  need_number --nodes "$nodes"
  check_flags "$@"
  [ -n "$dry" ] || command -v sbatch > /dev/null || fail "sbatch is not on the PATH; start this on a login node of the SLURM cluster"
  call sbatch "--chdir=$root" "${options[@]}" "$root/launch/slurm.sh" "$@"
  exit
fi

# In the job.
check_flags "$@"
# srun does not ask for the cores that sbatch got for a task.
step=(srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} python -m jaxdistill.main "$@" --distributed)
if [ -n "$dry" ]; then
  show "${step[@]}"
  exit
fi

again=''
# The processes get their SIGTERM from SLURM: srun itself answers one by killing them.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
"${step[@]}" &
srun=$!
code=0
while kill -0 "$srun" 2> /dev/null; do wait "$srun" || true; done
wait "$srun" || code=$?
# A preemption with a grace time sends SIGTERM to the processes alone, and a job that ends in that time counts as done.
if [ -z "$again" ] && scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; then again=yes; fi
if [ -n "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
