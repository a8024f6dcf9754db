#!/usr/bin/env bash
# Tries penstock.sbatch on a real Slurm: munge, slurmctld and two slurmd of this machine alone, in a scratch folder, as
# whoever runs it. One sweep meets a time limit (it saves, stops, and is requeued), a scancel, and is submitted again.
#
#     cluster/slurm/try.sh [--quick] [FOLDER]    # FOLDER keeps the sweep and the logs; else they go with everything else
#
# --quick brings Slurm up and submits only what is refused: seconds, no Ray.
# Needs Debian's slurm-wlm and munge (apt-get install slurm-wlm), 2 CPUs and 6 GB. Nothing of the machine's own Slurm or
# munge is touched. Exit status 0: all of it went as it should.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(cd "$here/../.." && pwd)
export PENSTOCK_PYTHON=${PENSTOCK_PYTHON:-$project/.venv/bin/python}
export PYTHONPATH=$project:$project/platform:$project/dashboards OMP_NUM_THREADS=1
patience=${TRY_SECONDS:-1500} # for any one thing to happen

quick=
if [[ ${1:-} == --quick ]]; then
  quick=yes
  shift
fi

begun=$SECONDS
say() { printf '[%4d s] %s\n' $((SECONDS - begun)) "$*"; }

fail() {
  say "FAILED: $*"
  [[ -z ${output:-} || ! -e $output ]] || tail -n 40 "$output"
  exit 1
}

# Fails unless the rest of the arguments, as a command, succeeds.
expect() {
  local what=$1
  shift
  "$@" || fail "$what"
  say "ok: $what"
}

for program in munged slurmctld slurmd sbatch "$PENSTOCK_PYTHON"; do
  PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || fail "there is no $program; accepted: apt-get install slurm-wlm, and 'make setup' in $project"
done
PATH=$PATH:/usr/sbin

# ---- a Slurm of this machine ------------------------------------------------------------------------------------------

run=$(mktemp -d /tmp/slurm-try-XXXX)
chmod 755 "$run" # munge wants its socket where everybody could reach it
folder=${1:-$run/work folder} # with a space, as some have
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
output=

stop_slurm() {
  local status=$? file pids=()
  set +e
  trap - EXIT
  scancel --user="$(id -un)" 2>/dev/null && sleep 3
  for file in "$run"/slurmd-*.pid "$run/slurmctld.pid" "$run/munged.pid"; do
    [[ ! -s $file ]] || pids+=("$(cat "$file")")
  done
  if ((${#pids[@]})); then
    kill "${pids[@]}" 2>/dev/null
    for _ in {1..50}; do kill -0 "${pids[@]}" 2>/dev/null || break; sleep 0.2; done
    kill -KILL "${pids[@]}" 2>/dev/null
  fi
  cp "$run"/*.log "$folder" 2>/dev/null
  rm -rf "$run"
  say "Slurm is down; exit status $status"
  exit "$status"
}
trap stop_slurm EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

read -r -a ports < <("$PENSTOCK_PYTHON" -c '
import socket
held = [socket.socket() for _ in range(3)]
for probe in held: probe.bind(("127.0.0.1", 0))
print(*(probe.getsockname()[1] for probe in held))')
host=$(hostname -s)
cpus=$(getconf _NPROCESSORS_ONLN) # nproc would believe OMP_NUM_THREADS
memory=$(awk '$1 == "MemTotal:" {printf "%d", $2 / 2048}' /proc/meminfo)
export SLURM_CONF=$run/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=try
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort=${ports[0]}
SlurmctldPidFile=$run/slurmctld.pid
SlurmctldLogFile=$run/slurmctld.log
SlurmdPidFile=$run/slurmd-%n.pid
SlurmdSpoolDir=$run/spool-%n
SlurmdLogFile=$run/slurmd-%n.log
StateSaveLocation=$run/state
# No control groups, no accounting, no cpu binding: what a container allows.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
KillWait=30
OverTimeLimit=10
MailProg=/bin/true
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=$cpus RealMemory=$memory Gres=gpu:1
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=$cpus RealMemory=$memory Gres=gpu:1
PartitionName=try Nodes=n1,n2 Default=YES MaxTime=120 State=UP
CONF
echo 'NodeName=n1,n2 Name=gpu File=/dev/null' >"$run/gres.conf" # a device that is everywhere, in a GPU's place
mkdir -p "$run/state" "$run/spool-n1" "$run/spool-n2"
(umask 077 && head -c 1024 /dev/urandom >"$run/munge.key")
munged --key-file="$run/munge.key" --socket="$run/munge.sock" --pid-file="$run/munged.pid" \
  --log-file="$run/munged.log" --seed-file="$run/munge.seed"
slurmctld -f "$SLURM_CONF"
for node in n1 n2; do slurmd -f "$SLURM_CONF" -N "$node"; done
for _ in {1..60}; do
  [[ $(sinfo --noheader --format=%T --states=idle 2>/dev/null) == idle* ]] && [[ $(sinfo --noheader --states=idle --format=%D) == 2 ]] && break
  sleep 1
done
sinfo --Node --format='%N %T %c CPUs, %m MB, %G'
[[ $(sinfo --noheader --states=idle --format=%D) == 2 ]] || fail "the two nodes are not idle; $run has the logs"
say "Slurm $(sinfo --version | awk '{print $2}') is up, with two emulated nodes"

# ---- the sweep ----------------------------------------------------------------------------------------------------------

cd "$folder"
encoded=$("$PENSTOCK_PYTHON" -c 'import sys, urllib.parse as u; print(u.quote(sys.argv[1]))' "$folder/store")
cat >sweep.yaml <<SPEC
name: slurm-try
storage: "file://$encoded"
model: {name: demo}
data: {dataset: demo, context_size: 64, search_tokens: 1k, report_tokens: 2k, block_tokens: 4096}
hook_points: [blocks.1.hook_resid_post]
train: {tokens: ${TRY_TOKENS:-800k}, batch_tokens: 256, lr: 1.0e-3, checkpoints: 8}
saes: [{architecture: topk, d_sae: 2x, k: [4, 16]}]
resources:
  model_hosts: 1
  cpus_per_host: 0.5
  cpus_per_pack: 0.75
  host_labels: {penstock/role: model-host}
  pack_labels: {penstock/role: pack}
  lease_seconds: 600
SPEC
export PENSTOCK_HOME=$folder/home PENSTOCK_ROLES="model-host:1 pack:1" PENSTOCK_REQUEUES=1
submit=(sbatch --parsable --nodes=2 --cpus-per-task="$cpus" --gpus-per-node=1 --mem=$((memory / 2)) --time=60)

state() { squeue --noheader --jobs="$1" --format=%T 2>/dev/null || true; }
count() { if [[ -e $output ]]; then grep -c -- "$1" "$output" || true; else echo 0; fi; }

# Waits until a line is in the job's output so often.
wait_for_line() {
  local end=$((SECONDS + patience))
  until (($(count "$1") >= $2)); do
    ((SECONDS < end)) || fail "'$1' was not said $2 time(s) within $patience s"
    [[ -n $(state "$job") ]] || fail "the job ended before it said '$1' $2 time(s)"
    sleep 1
  done
}

wait_for_end() {
  local end=$((SECONDS + patience))
  while [[ -n $(state "$1") && $(state "$1") != COMPLETED && $(state "$1") != FAILED && $(state "$1") != CANCELLED ]]; do
    ((SECONDS < end)) || fail "job $1 did not end within $patience s"
    sleep 1
  done
}

exit_of() { scontrol show job --oneliner "$1" | sed -n 's/.* ExitCode=\([0-9]*\):.*/\1/p'; }
nothing_left() { ! compgen -G "/tmp/pst-$1-*" && [[ ! -e $PENSTOCK_HOME/slurm/$1/token ]] && ! pgrep -f "/tmp/pst-$1-"; }
roles_given() {
  local logs=$PENSTOCK_HOME/slurm/$job
  grep -q '1 GPUs.*role model-host$' "$logs/n1.log" && grep -q '1 GPUs.*role pack$' "$logs/n2.log"
}
# shellcheck disable=SC2009  # the whole of every command line
private_token() { [[ $(stat --format=%a "$token") == 600 ]] && ! ps -e -o args= | grep -qFf "$token"; }
refused_without_token() {
  "$PENSTOCK_PYTHON" - "$1" <<'PYTHON'
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(f"http://{sys.argv[1]}/api/v0/nodes", timeout=30)
except urllib.error.HTTPError as error:
    sys.exit(error.code != 401)
sys.exit("answered without a token")
PYTHON
}

# Submits a job that ends with a message and exit status 2.
refused() {
  say "$1"
  output=$folder/refused.out
  rm -f "$output"
  job=$(sbatch --parsable --nodes=2 --cpus-per-task=1 --mem=100 --output="$output" "$here/penstock.sbatch" "$2")
  wait_for_end "$job"
  tail -n 1 "$output"
  expect "it is refused, exit status 2" test "$(exit_of "$job")" = 2
}

refused "a spec that is not there" nowhere.yaml
sed "s|^storage:.*|storage: $folder/store|" sweep.yaml >local.yaml
refused "two nodes, and a path of one machine in the spec" local.yaml
if [[ -n $quick ]]; then
  say "that is all of --quick"
  exit 0
fi

say "the sweep, on two nodes, in a job whose time limit will come near"
job=$("${submit[@]}" --output="$folder/slurm-%j.out" "$here/penstock.sbatch" sweep.yaml)
output=$folder/slurm-$job.out
wait_for_line "is at its first step" 1
token=$PENSTOCK_HOME/slurm/$job/token
dashboard=$(sed -n 's/.*dashboard \([0-9.:]*\) on n1.*/\1/p' "$output" | tail -n 1)
expect "both nodes are Ray's, each with its role" roles_given
expect "its token is in a file of mode 600, and on no command line" private_token
expect "the dashboard at $dashboard wants the token" refused_without_token "$dashboard"
minutes=$(($(squeue --noheader --jobs="$job" --format=%M | awk -F: '{print (NF > 2 ? $1 * 60 + $2 : $1)}') + 2))
scontrol update JobId="$job" TimeLimit=$minutes
say "its time limit is now $minutes minutes, and Slurm warns it 120 s before"
wait_for_line "requeued" 1
scontrol update JobId="$job" TimeLimit=60
say "it has saved, stopped, and asked Slurm to start it again:"
grep -E 'slurm: (got|asking|requeued|all is down)' "$output"

wait_for_line "is at step" 1
grep -E 'from checkpoints|is at step' "$output"
say "it goes on; now scancel"
cancelled=$SECONDS
scancel "$job"
wait_for_end "$job"
say "everything was down after $((SECONDS - cancelled)) s"
expect "no process, no token and no temporary folder is left" nothing_left "$job"

say "the same command again"
job=$("${submit[@]}" --output="$folder/slurm-%j.out" "$here/penstock.sbatch" sweep.yaml)
output=$folder/slurm-$job.out
wait_for_end "$job"
cat "$output"
expect "it ends with exit status 0" test "$(exit_of "$job")" = 0
expect "it went on from checkpoints" grep -q "from checkpoints" "$output"
expect "no process, no token and no temporary folder is left" nothing_left "$job"
expect "the logs of both nodes are kept" test -s "$PENSTOCK_HOME/slurm/$job/n1-ray-logs.tar.gz" -a -s "$PENSTOCK_HOME/slurm/$job/n2-ray-logs.tar.gz"
say "all of it went as it should"
