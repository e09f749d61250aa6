# shellcheck shell=bash
# What the batch scripts beside this file share. They source it: sbatch runs a copy of a script from another folder.
set -euo pipefail

MEGAFT_HOME=${MEGAFT_HOME:-$SLURM_SUBMIT_DIR}
PYTHON=${PYTHON:-$MEGAFT_HOME/.venv/bin/python} # the one `make demo` made, or any that has megaft's requirements
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # fewer fragments of GPU memory
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes are often offline: fetch on the login node first

# run_tasks WORDS...: `python WORDS...` once a task, as many as the job has; counts `signals`.
# Ranks come from SLURM's own variables. A task that fails ends the others, and SIGUSR1 to this script reaches all.
# Since SLURM 22.05 srun gives a task one core unless told; the job's --cpus-per-task is not enough. The first task
# exports the model after the others have ended, and sites may set how long srun waits for the last one.
run_tasks() {
    srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --wait=0 "$PYTHON" "$@" &
    local code=0 seen=-1 step=$!
    signals=0
    trap 'signals=$((signals + 1)); kill -USR1 "$step" || true' USR1
    while [ "$seen" -lt "$signals" ]; do # a signal ends `wait` early; the step then still runs
        seen=$signals code=0
        wait "$step" || code=$?
    done
    return "$code"
}

# requeue: put this job back into the queue, under its own number, which ends it here.
requeue() {
    echo "$SLURM_JOB_NAME: back into the queue" >&2
    if scontrol requeue "$SLURM_JOB_ID"; then sleep 60; fi
}

# value_of FLAG WORDS...: the value of the last such flag; nothing where there is none.
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

# run_dir_of FLAGS...: the value of the last --run.dir.
run_dir_of() {
    local run_dir
    run_dir=$(value_of --run.dir "$@")
    if [ -z "$run_dir" ]; then
        echo "error: --run.dir is not among the flags; give the run a folder, such as --run.dir runs/first." >&2
        return 2
    fi
    echo "$run_dir"
}

# starts_of RUN: how often training started, by RUN/events.jsonl.
starts_of() {
    if [ ! -f "$1/events.jsonl" ]; then echo 0; return; fi
    grep -c '"event": "start"' "$1/events.jsonl" || true
}

# turns_without_progress EVENTS: how many turns of this job there were since the last checkpoint, by a file of events. A
# turn that lost its ranks before training started has an end and no start; one whose ranks were all killed has only a
# start.
turns_without_progress() {
    if [ ! -f "$1" ]; then echo 0; return; fi
    awk -v most=$((${SLURM_RESTART_COUNT:-0} + 1)) '
        /"event": "checkpoint"/ { turns = 0 }
        /"event": "start"/ { turns++; started = 1 }
        /"event": "end"/ { turns += !started; started = 0 }
        END { print (turns < most ? turns : most) + 0 }' "$1"
}

NO_PROGRESS='for the third time in a row without progress; not requeued'

# requeue_if_progressing EVENTS CODE: requeue, but not after three turns in a row without a new checkpoint, or windows.
requeue_if_progressing() {
    if [ "$(turns_without_progress "$1")" -lt 3 ]; then
        requeue
    else
        echo "$SLURM_JOB_NAME: ended with $2 $NO_PROGRESS" >&2
        return 93
    fi
}

# give_up RUN CODE: write into RUN/ended.json and RUN/events.jsonl that the job which ended with CODE is not requeued.
# The reason of its last turn, which is JSON already, stays in the new one.
give_up() {
    local ended=$1/ended.json reason=''
    if [ -f "$ended" ]; then reason=$(sed -n 's/.*"reason": *"\(.*\)".*/\1/p' "$ended"); fi
    reason="the job ended with $2 $NO_PROGRESS. Its last turn: ${reason:-ended without a reason.}"
    printf '{\n  "exit_code": 93,\n  "reason": "%s"\n}\n' "$reason" >"$ended.tmp"
    mv "$ended.tmp" "$ended"
    printf '{"time": "%s", "event": "gave up", "step": null, "exit_code": 93, "reason": "%s"}\n' \
        "$(date -u +%Y-%m-%dT%H:%M:%S+00:00)" "$reason" >>"$1/events.jsonl"
}

# finetune FLAGS...: train; where training asks for it (RUN/ended.json says 75), requeue the job, which then goes on.
# srun's own code cannot tell. The first task to end makes srun end the others, and it shows the highest code of all:
# 143 where all were to end with 75; and 75, of tasks that were still starting, where one had a mistake to report.
# Where training had started and left no reason, all ranks were killed or aborted (NCCL's watchdog, a node's memory): the
# job goes on too. Whichever it is, a job that gets no further is not requeued for ever.
finetune() {
    local run_dir ended started code=0
    run_dir=$(run_dir_of "$@")
    ended=$run_dir/ended.json
    rm -f "$ended" # of the job's last turn
    started=$(starts_of "$run_dir")
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then set -- "$@" --run.no-fresh; fi # only the first turn starts over
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

# evaluate FLAGS...: score; a job whose time is over goes back into the queue, and continues behind the windows that it
# has kept. OUTPUT/turns.jsonl has its turns: one without a new window made no progress.
evaluate() {
    local output turns code=0
    output=$(value_of --output "$@")
    output=${output:-evaluation} turns=$output/turns.jsonl
    mkdir -p "$output"
    note_windows "$output" # of a turn whose node was lost
    echo '{"event": "start"}' >>"$turns"
    run_tasks -m evaluate_zero_shot "$@" || code=$?
    note_windows "$output"
    if [ "$code" -ne 0 ] && [ "$signals" -gt 0 ]; then requeue_if_progressing "$turns" "$code" || code=$?; fi
    exit "$code"
}

# note_windows OUTPUT: write into OUTPUT/turns.jsonl that windows were finished and kept since it was last written.
note_windows() {
    local turns=$1/turns.jsonl bytes last=0
    if [ ! -d "$1/windows" ]; then return; fi
    bytes=$(find "$1/windows" -type f -name '*.nats' -printf '%s\n' | awk '{ sum += $1 } END { printf "%.0f", sum }')
    if [ -f "$turns" ]; then last=$(sed -n 's/.*"bytes": \([0-9]*\).*/\1/p' "$turns" | tail -n 1); fi
    if [ "$bytes" -ne "${last:-0}" ]; then echo "{\"event\": \"checkpoint\", \"bytes\": $bytes}" >>"$turns"; fi
}
