#!/bin/bash
# Submit all stages of a run as one chain of jobs, full and LoRA side by side, and print the job ids.
#
#   slurm/pipeline.sh --recipe gpt2-medium --run study [--seeds 1,2,3] [--redo] [options of sbatch for every stage]
#   e.g. --account=lab --partition=gpu --nodes=2 --gres=gpu:4 --time=08:00:00
#
# A node gets 8 CPUs for each of its GPUs (RLHF_CPUS_PER_GPU), unless the options say --cpus-per-task. Jobs are told to
# stop RLHF_SIGNAL_SECONDS, default 180, before their time limit: long enough for a step and a checkpoint.
#
# Stages that are done are skipped. Settings that differ from those of a stage that has begun are refused; with --redo it
# runs again from its start. A stage that fails cancels those that wait for it; submit again to resume it.
# --seeds runs every stage as a job array, one task per seed, in runs RUN-seed1, RUN-seed2, ...
set -eu
export RLHF_HOME="${RLHF_HOME:-$(cd "$(dirname "$0")/.." && pwd)}" RUNS_DIR="${RUNS_DIR:-runs}"
cd "$RLHF_HOME"
seeds="" redo="" options=()
while [ $# -gt 0 ]; do
    case "$1" in
    --recipe) RECIPE="$2" && shift 2 ;;
    --run) RUN="$2" && shift 2 ;;
    --seeds) seeds="$2" && shift 2 ;;
    --redo) redo=1 && shift ;;
    *) options+=("$1") && shift ;;
    esac
done
signal="${RLHF_SIGNAL_SECONDS:-180}" cpus="${RLHF_CPUS_PER_GPU:-8}"
for name in signal cpus; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || {
        printf 'error: %s: expected a number of at least 1, found %q\n' \
            "$([ "$name" = signal ] && echo RLHF_SIGNAL_SECONDS || echo RLHF_CPUS_PER_GPU)" "${!name}" >&2
        exit 2
    }
done
# Options on the command line come after these and override them.
defaults=(--signal="B:USR1@$signal")
said=" ${options[*]-} ${SBATCH_GRES:+--gres=$SBATCH_GRES} ${SBATCH_GPUS_PER_NODE:+--gpus-per-node=$SBATCH_GPUS_PER_NODE} "
if [[ "$said" =~ \ --gpus-per-(node|task)[=\ ]([^\ ]+) || "$said" =~ \ --gres[=\ ]([^\ ]*,)?gpu:?([^,\ \(]*) ]]; then
    gpus="${BASH_REMATCH[2]##*:}" # after the type, if there is one
    gpus="${gpus:-1}"
    [[ ! "$gpus" =~ ^[0-9]+$ || "$said" =~ \ (-c|--cpus-per-task|--cpus-per-gpu) || -n "${SBATCH_CPUS_PER_GPU:-}" ]] ||
        defaults+=(--cpus-per-task="$((cpus * gpus))")
fi
: "${RECIPE:?expected --recipe NAME}" "${RUN:?expected --run NAME}"
# The name becomes a folder and part of sbatch's options, where % has a meaning.
[[ "$RUN" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] || {
    printf 'error: run: expected letters, digits, . _ and -, found %q\n' "$RUN" >&2
    exit 2
}
[[ "$seeds" =~ ^[0-9,:%-]*$ ]] || {
    printf 'error: seeds: expected numbers as sbatch --array takes them, found %q\n' "$seeds" >&2
    exit 2
}
export RECIPE RUN
venv="${RLHF_VENV:-.venv}/bin/activate"
# shellcheck disable=SC1090  # made by scripts/environment.sh
[ ! -f "$venv" ] || source "$venv"
# Which stages there are, what each one needs and whether it is done: one line per stage.
# It refuses stages that were run with other settings, unless they are to run again.
check=(--check)
[ -z "$redo" ] || check=() RLHF_FLAGS="${RLHF_FLAGS:-} --redo"
export RLHF_FLAGS="${RLHF_FLAGS:-}"
plan="$(python -m rlhf.cli.plan --recipe "$RECIPE" --run "$RUN" --runs_dir "$RUNS_DIR" ${check[@]+"${check[@]}"})" || exit 2
# sbatch silently fails a job whose log folder is missing.
logs="$RUNS_DIR/$RUN/logs"
mkdir -p "$logs"

# submit STAGE AFTER: prints the job id. AFTER: ids of the jobs that it waits for, each behind a colon.
submit() {
    local stage=$1 after=$2 log="$logs/%x-%j.log" kind=afterok more=() id
    # With seeds, each task waits for its own seed's task only.
    [ -z "$seeds" ] || { kind=aftercorr more=(--array="$seeds") log="$logs/%x-%A_%a.log"; }
    [ -z "$after" ] || more+=(--dependency="$kind$after" --kill-on-invalid-dep=yes)
    more=(${options[@]+"${options[@]}"} ${more[@]+"${more[@]}"})
    if [ "$stage" = report ]; then more+=(--nodes=1 --gres=none); else more=("${defaults[@]}" ${more[@]+"${more[@]}"}); fi
    id=$(sbatch --parsable --output="$log" "${more[@]}" "slurm/$stage.sbatch") || return 1
    echo "${id%%;*}"
}

declare -A jobs
submitted=""
while read -r stage state _ _ needs _; do
    # With seeds the runs are RUN-seed1, ...: each job checks whether its own stage is done.
    if [ "$state" = "done" ] && [ -z "$seeds" ]; then
        echo "$stage: already done" >&2
        submitted+=" -"
        continue
    fi
    after=""
    for other in ${needs//[,-]/ }; do after+="${jobs[$other]:+:${jobs[$other]}}"; done
    jobs[$stage]=$(submit "$stage" "$after") || exit 1
    echo "$stage: job ${jobs[$stage]}" >&2
    submitted+=" ${jobs[$stage]}"
done <<<"$plan"
[[ "$submitted" =~ [0-9] ]] || echo "nothing to submit: all stages are done; --redo runs them again" >&2
echo "submitted:$submitted"
