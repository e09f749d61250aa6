# shellcheck shell=bash
# Functions of the batch scripts in this folder, which source this file: sbatch runs a copy of a script elsewhere.
set -euo pipefail

MEGAFT_HOME=${MEGAFT_HOME:-$SLURM_SUBMIT_DIR}
PYTHON=${PYTHON:-$MEGAFT_HOME/.venv/bin/python} # made by `make demo`, or any with megaft's requirements
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # less fragmentation of GPU memory
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes are often offline: download on the login node

# run_tasks ARGUMENTS...: run `python ARGUMENTS...` in every task of the job; counts `signals`.
# Ranks come from SLURM's variables. A failing task ends the others, and SIGUSR1 to this script is forwarded to all.
# Since SLURM 22.05 srun gives a task one core by default, whatever the job's --cpus-per-task is. --wait=0: the first
# task exports the model after the others have ended, and some sites limit how long srun waits for the last one.
run_tasks() {
    local code=0 seen=-1 step=''
    signals=0
    # Set first: without a trap, SIGUSR1 kills this script and leaves the step running.
    trap 'signals=$((signals + 1)); [ -z "${step:-}" ] || kill -USR1 "$step" || true' USR1
    srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --wait=0 "$PYTHON" "$@" &
    step=$!
    if [ "$signals" -gt 0 ]; then kill -USR1 "$step" || true; fi
    while [ "$seen" -lt "$signals" ]; do # a signal interrupts `wait` while the step still runs
        seen=$signals code=0
        wait "$step" || code=$?
    done
    return "$code"
}

# requeue: requeue this job under its own number, which ends this attempt.
requeue() {
    echo "$SLURM_JOB_NAME: back into the queue" >&2
    if scontrol requeue "$SLURM_JOB_ID"; then sleep 60; fi
}

# value_of FLAG ARGUMENTS...: print the value of the last such flag, or nothing.
value_of() {
    local flag=$1 word previous='' value=''
    shift
    for word in "$@"; do
        if [ "$previous" = "$flag" ]; then value=$word; fi
        case $word in "$flag"=*) value=${word#*=} ;; esac
        previous=$word
    done
    echo "$value"
}

# run_dir_of FLAGS...: print the value of the last --run.dir.
run_dir_of() {
    local run_dir
    run_dir=$(value_of --run.dir "$@")
    if [ -z "$run_dir" ]; then
        echo "error: --run.dir is not among the flags; give the run a folder, such as --run.dir runs/first." >&2
        return 2
    fi
    echo "$run_dir"
}

# starts_of RUN: print how often training started, from RUN/events.jsonl.
starts_of() {
    if [ ! -f "$1/events.jsonl" ]; then echo 0; return; fi
    grep -c '"event": "start"' "$1/events.jsonl" || true
}

# turns_without_progress EVENTS: print the number of attempts of this job since the last checkpoint, from a file of
# events. An attempt that lost its ranks before training started has an end and no start; one whose ranks were all
# killed has only a start.
turns_without_progress() {
    if [ ! -f "$1" ]; then echo 0; return; fi
    awk -v most=$((${SLURM_RESTART_COUNT:-0} + 1)) '
        /"event": "checkpoint"/ { turns = 0 }
        /"event": "start"/ { turns++; started = 1 }
        /"event": "end"/ { turns += !started; started = 0 }
        END { print (turns < most ? turns : most) + 0 }' "$1"
}

NO_PROGRESS='for the third time in a row without progress; not requeued'

# requeue_if_progressing EVENTS CODE: requeue, but not after three consecutive attempts without a checkpoint or window.
requeue_if_progressing() {
    if [ "$(turns_without_progress "$1")" -lt 3 ]; then
        requeue
    else
        echo "$SLURM_JOB_NAME: ended with $2 $NO_PROGRESS" >&2
        return 93
    fi
}

# give_up RUN CODE: record in RUN/ended.json and RUN/events.jsonl that the job, which ended with CODE, is not requeued.
# The new reason includes that of the last attempt, which is JSON-escaped already.
give_up() {
    local ended=$1/ended.json reason=''
    if [ -f "$ended" ]; then reason=$(sed -n 's/.*"reason": *"\(.*\)".*/\1/p' "$ended"); fi
    reason="the job ended with $2 $NO_PROGRESS. Its last turn: ${reason:-ended without a reason.}"
    printf '{\n  "exit_code": 93,\n  "reason": "%s"\n}\n' "$reason" >"$ended.tmp"
    mv "$ended.tmp" "$ended"
    printf '{"time": "%s", "event": "gave up", "step": null, "exit_code": 93, "reason": "%s"}\n' \
        "$(date -u +%Y-%m-%dT%H:%M:%S+00:00)" "$reason" >>"$1/events.jsonl"
}

# finetune FLAGS...: train; if training asks for it (RUN/ended.json says 75), requeue the job to resume.
# srun's exit code cannot tell. When the first task ends, srun ends the others and reports the highest code of all: 143
# if all should have ended with 75, or 75 from tasks that were still starting if one reported an error. If training had
# started and left no reason, all ranks were killed or aborted (NCCL's watchdog, out of memory): the job is requeued
# too. In both cases a job without progress is not requeued forever.
finetune() {
    local run_dir ended started code=0
    run_dir=$(run_dir_of "$@")
    ended=$run_dir/ended.json
    rm -f "$ended" # from the previous attempt
    started=$(starts_of "$run_dir")
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then set -- "$@" --run.no-fresh; fi # only the first attempt starts over
    run_tasks "$MEGAFT_HOME/megaft/train.py" "$@" || code=$?
    if [ -f "$ended" ]; then
        code=$(sed -n 's/.*"exit_code": *\([0-9]*\).*/\1/p' "$ended")
        if [ "$code" -ne 75 ]; then exit "$code"; fi
    elif [ "$code" -ne 0 ] && [ "$(starts_of "$run_dir")" -gt "$started" ]; then
        echo "$SLURM_JOB_NAME: ended with $code after its start and left no reason" >&2
    else
        exit "$code"
    fi
    if ! requeue_if_progressing "$run_dir/events.jsonl" "$code"; then
        give_up "$run_dir" "$code"
        code=93
    fi
    exit "$code"
}

# evaluate FLAGS...: score; at its time limit the job is requeued, and continues after the windows it has finished.
# OUTPUT/turns.jsonl lists its attempts: one without a new window made no progress.
evaluate() {
    local output turns code=0
    output=$(value_of --output "$@")
    output=${output:-evaluation} turns=$output/turns.jsonl
    mkdir -p "$output"
    note_windows "$output" # from an attempt whose node was lost
    echo '{"event": "start"}' >>"$turns"
    run_tasks -m evaluate_zero_shot "$@" || code=$?
    note_windows "$output"
    if [ "$code" -ne 0 ] && [ "$signals" -gt 0 ]; then requeue_if_progressing "$turns" "$code" || code=$?; fi
    exit "$code"
}

# note_windows OUTPUT: record in OUTPUT/turns.jsonl if windows were finished since the last record.
note_windows() {
    local turns=$1/turns.jsonl bytes last=0
    if [ ! -d "$1/windows" ]; then return; fi
    bytes=$(find "$1/windows" -type f -name '*.nats' -printf '%s\n' | awk '{ sum += $1 } END { printf "%.0f", sum }')
    if [ -f "$turns" ]; then last=$(sed -n 's/.*"bytes": \([0-9]*\).*/\1/p' "$turns" | tail -n 1); fi
    if [ "$bytes" -ne "${last:-0}" ]; then echo "{\"event\": \"checkpoint\", \"bytes\": $bytes}" >>"$turns"; fi
}
