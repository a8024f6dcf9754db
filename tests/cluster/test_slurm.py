"""The Slurm launcher: its own functions as bash runs them, and the whole of it on a real Slurm of this machine."""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "slurm"
SCRIPT = FOLDER / "penstock.sbatch"
TRY = FOLDER / "try.sh"
SLURM = ("munged", "slurmctld", "slurmd", "sbatch")
missing = [name for name in SLURM if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
needs_slurm = pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here: apt-get install slurm-wlm")


def bash(commands, *, cwd=None, **variables):
    """Run commands with the script's functions; nothing of a Slurm job around pytest shows through."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PENSTOCK_"))}
    environment = {**kept, "python": sys.executable, **variables}
    return subprocess.run(
        ["bash", "-c", f'source "{SCRIPT}"; {commands}'],
        capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=environment,
    )  # fmt: skip


def printed(commands, **options):
    done = bash(commands, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(commands, **options):
    """What is said by what ends with the exit status of a user's mistake."""
    done = bash(commands, **options)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("script", [SCRIPT, TRY], ids=lambda path: path.name)
def test_scripts_are_bash_without_complaint(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_slurm_sees_every_directive_and_warns_before_the_sweep_is_killed():
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives and max(directives) < first  # sbatch reads no further than the first command
    warned = int(re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", "\n".join(lines), re.MULTILINE)[1])
    allowed = int(re.search(r"PENSTOCK_STOP_SECONDS:-(\d+)", "\n".join(lines))[1])
    assert allowed + 15 <= warned  # what is left is for Ray's end


def test_a_job_without_a_spec_says_how_one_is_given():
    for arguments, words in [("", "no spec was given"), ("--nodes 2 a.yaml", "option --nodes stands before --")]:
        said = refused(f"read_arguments {arguments}; choose_spec")
        assert words in said and "accepted: sbatch [OPTIONS] penstock.sbatch SPEC" in said
    assert "this is no Slurm job" in refused("main a.yaml")


def test_a_spec_that_cannot_be_read_is_named_with_the_folder(tmp_path):
    said = refused("read_arguments nowhere.yaml; choose_spec", cwd=tmp_path)
    assert "'nowhere.yaml' cannot be read" in said and str(tmp_path) in said


def test_a_task_of_an_array_takes_its_own_spec(tmp_path):
    for name in ("a.yaml", "b b.yaml"):
        (tmp_path / name).touch()
    commands = 'read_arguments a.yaml "b b.yaml" -- --allow-code-change; choose_spec; echo "${run_options[@]}"'
    found = printed(commands, cwd=tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert found.splitlines() == ["b b.yaml", "--allow-code-change"]
    assert "accepted: --array=0-1" in refused(commands, cwd=tmp_path, SLURM_ARRAY_TASK_ID="2")
    assert "2 specs were given to a job that is no array" in refused(commands, cwd=tmp_path)


def test_the_token_is_new_and_its_owners_alone(tmp_path):
    file = tmp_path / "a folder" / "token"
    file.parent.mkdir()
    file.write_text("left by an earlier start")
    file.chmod(0o644)
    tokens = []
    for _ in range(2):
        printed(f'umask 000; make_token "{file}"')
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        tokens.append(file.read_text())
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens) and tokens[0] != tokens[1]


def test_ports_are_free_ones_and_begin_elsewhere_for_every_job():
    first = [int(port) for port in printed("free_ports 3", SLURM_JOB_ID="7").split()]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", first[0]))
        holder.listen()
        second = [int(port) for port in printed("free_ports 3", SLURM_JOB_ID="7").split()]
    third = [int(port) for port in printed("free_ports 3", SLURM_JOB_ID="8").split()]
    assert len(set(first)) == 3 and first[0] not in second and not set(first) & set(third)
    assert all(20000 <= port < 32768 for port in first + second + third)


def test_roles_are_given_to_nodes_in_their_order():
    assert printed("roles_of 2").split() == ["-", "-"]
    assert printed("roles_of 3", PENSTOCK_ROLES="model-host:1 pack:2").split() == ["model-host", "pack", "pack"]
    assert "is of 3 node(s), and the allocation has 4" in refused("roles_of 4", PENSTOCK_ROLES="model-host:1 pack:2")
    for wrong in ("pack", "pack:x", "pa/ck:1", "pack,x:1"):
        assert f"'{wrong}' is not ROLE:COUNT" in refused("roles_of 1", PENSTOCK_ROLES=wrong)


def test_an_allocation_that_ray_cannot_fill_is_refused():
    one, two = 'nodes=(a) groups=(""); check_allocation', 'nodes=(a b) groups=("" ""); check_allocation'
    assert "accepted is 1" in refused(one, SLURM_NTASKS_PER_NODE="8")
    assert "--gpus-per-node" in refused(two, SLURM_GPUS="8")
    printed(one, SLURM_GPUS="8", SLURM_NTASKS_PER_NODE="1")
    mixed = "nodes=(a b c) groups=(0 1 1); check_allocation"
    assert "--ntasks-per-node is 4" in refused(mixed, SLURM_NTASKS_PER_NODE_HET_GROUP_1="4")
    printed(mixed, SLURM_NTASKS_PER_NODE_HET_GROUP_0="1", SLURM_GPUS_PER_NODE_HET_GROUP_1="4")


def test_a_component_of_a_heterogeneous_job_has_its_own_memory():
    variables = {"SLURM_MEM_PER_NODE": "1000", "SLURM_MEM_PER_NODE_HET_GROUP_1": "3000", "SLURM_MEM_PER_CPU": "7"}
    commands = 'env "${without[@]}" "${with[@]}" bash -c "echo \\$SLURM_MEM_PER_NODE \\${SLURM_MEM_PER_CPU:-none}"'
    assert printed(f"variables_of 1; {commands}", **variables).split() == ["3000", "none"]
    assert printed(f"variables_of ''; {commands}", **variables).split() == ["1000", "7"]


def test_memory_is_what_slurm_granted_and_the_store_a_share_of_it():
    total = int(printed("memory_granted"))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < total <= physical
    assert int(printed("memory_granted", SLURM_MEM_PER_NODE="300")) == 300 << 20
    assert int(printed("memory_granted", SLURM_MEM_PER_CPU="50", SLURM_CPUS_ON_NODE="4")) == 200 << 20
    assert int(printed("memory_granted", SLURM_MEM_PER_GPU="100", SLURM_GPUS_ON_NODE="2")) == 200 << 20
    assert int(printed("memory_granted", SLURM_MEM_PER_NODE="0")) == total  # --mem=0 is all of the node
    assert int(printed("store_bytes 1000000000")) == 300_000_000
    assert int(printed("store_bytes 4000000000000")) <= 200_000_000_000


def test_the_named_python_comes_before_the_active_one(tmp_path):
    here = tmp_path / ".venv" / "bin" / "python"
    here.parent.mkdir(parents=True)
    here.symlink_to(sys.executable)
    active = Path(sys.prefix)
    without = {"VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    assert printed("find_python", cwd=tmp_path, **without).strip() == str(here)
    assert printed("find_python", cwd=tmp_path, VIRTUAL_ENV=str(active)).strip() == str(active / "bin" / "python")
    assert printed("find_python", cwd=tmp_path, PENSTOCK_PYTHON="/bin/true").strip() == "/bin/true"
    assert "PENSTOCK_PYTHON '/nowhere/py' is no program" in refused("find_python", PENSTOCK_PYTHON="/nowhere/py")


def test_a_python_without_penstock_is_refused_before_anything_starts():
    said = refused("python=/usr/bin/false; check_python")
    assert "/usr/bin/false does not run Penstock" in said and "PENSTOCK_PYTHON" in said


def test_places_of_a_spec_come_from_the_spec_itself(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("""\
name: small
storage: file:///shared/store
data: {dataset: demo, context_size: 64, spool: s3://bucket/spool}
model: {name: demo}
hook_points: [blocks.1.hook_resid_post]
train: {tokens: 16k, batch_tokens: 256}
saes: [{architecture: topk, d_sae: 2x, k: 4}]
""")
    variables = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "platform"])), "home": str(tmp_path)}
    assert printed(f"places_of {spec}", **variables).split() == ["file:///shared/store", "s3://bucket/spool"]
    spec.write_text(spec.read_text().replace("k: 4", "k: four"))
    done = bash(f"places_of {spec}", **variables)
    assert done.returncode == 1 and str(spec) in done.stderr and "four" in done.stderr


def test_the_end_of_a_tree_takes_what_has_left_its_session_or_hears_nothing(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    tree = f'(setsid "$python" -c "{code}" & exec "$python" -c "{code}") >{tmp_path / "out"} & pid=$!; '
    wait = f"until (($(grep -c up {tmp_path / 'out'}) == 2)); do sleep 0.1; done; children=$(descendants $pid); "
    begun = time.monotonic()
    found = printed(f"{tree}{wait}end_tree $pid 1 2>/dev/null; echo $pid $children")
    pids = [int(pid) for pid in found.split()]
    try:
        assert len(pids) == 2 and time.monotonic() - begun < 30
        deadline = time.monotonic() + 5
        while any(is_running(pid) for pid in pids):
            assert time.monotonic() < deadline, pids
            time.sleep(0.05)
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def try_slurm(*arguments, timeout):
    """Run try.sh; its output. What it started is down afterwards, whatever happened."""
    environment = {**os.environ, "PENSTOCK_PYTHON": sys.executable}
    process = subprocess.Popen(
        [TRY, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        shown, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.terminate()  # it takes Slurm down by itself
            process.wait(timeout=60)
    assert process.returncode == 0, shown
    assert "Slurm is down; exit status 0" in shown
    return shown


@needs_slurm
def test_a_real_slurm_takes_the_script_and_hears_why_a_job_is_refused(tmp_path):
    shown = try_slurm("--quick", tmp_path / "a folder", timeout=240)
    assert "spec 'nowhere.yaml' cannot be read" in shown
    assert re.search(r"store, a path of one machine, and the job has 2 nodes; accepted: a URI", shown)


@needs_slurm
@pytest.mark.slow
def test_a_sweep_on_a_real_slurm_is_stopped_by_its_time_limit_cancelled_and_goes_on(tmp_path):
    shown = try_slurm(tmp_path / "a folder", timeout=3600)
    assert shown.count("ok: no process, no token and no temporary folder is left") == 2
    assert "ok: its token is in a file of mode 600, and on no command line" in shown
    assert "ok: it ends with exit status 0" in shown
