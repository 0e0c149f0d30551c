"""A real Slurm of two nodes on one machine, for the time of a `with` block.

Everything lives in one private process namespace: when its first process ends, the kernel ends the rest. Each node
has a network and a host name of its own, so that a script that talks to the wrong machine fails here as on a cluster.
Needs root, Debian's slurm-wlm and munge, and the right to make namespaces.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter", "ip")
NETWORK = "10.217.93"
CONF = """
ClusterName=tests
SlurmctldHost=ctl({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The default, 120 s, is how long a requeued job would wait.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=26917
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# A node that somebody took down stays down, although its slurmd answers.
ReturnToService=1
JobRequeue=1
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname=n1 NodeAddr={network}.11 Port=26918 CPUs=8 RealMemory=16000 State=UNKNOWN
NodeName=n2 NodeHostname=n2 NodeAddr={network}.12 Port=26918 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# The first process of the namespace: the controller's machine.
CONTROLLER = """
set -eu
mount --bind {folder}/hosts /etc/hosts
hostname ctl
ip link set lo up
ip link add br0 type bridge
ip addr add {network}.1/24 dev br0
ip link set br0 up
munged --key-file={folder}/munge.key --socket={folder}/munge.socket --pid-file={folder}/munge.pid \
    --log-file={folder}/munge.log --seed-file={folder}/munge.seed
slurmctld -D -c >{folder}/slurmctld.log 2>&1 &
for i in 1 2; do
    unshare --net --uts --mount --propagation private bash {folder}/node.sh $i >{folder}/n$i.log 2>&1 &
    node=$!
    until [ "$(readlink /proc/$node/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    ip link add v$i type veth peer name eth0 netns $node
    ip link set v$i master br0 up
done
sleep {seconds}
"""
NODE = """
set -eu
hostname n$1
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add {network}.1$1/24 dev eth0
ip link set eth0 up
exec slurmd -D -N n$1
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: slurm-wlm munge iproute2)"
    attempt = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--net", "--uts", "true"]
    if subprocess.run(attempt, capture_output=True, timeout=20).returncode:
        return "needs the right to make namespaces"
    return None


class Cluster:
    """Two nodes, n1 and n2, of 8 pretended cores each. seconds: after that long it ends by itself.

    It ends with its user, so that is for a user who is killed. It must be longer than all tests of a module together.
    """

    def __init__(self, seconds: int = 3600) -> None:
        # Unix sockets have short names, so this is not pytest's folder.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        self.seconds = seconds

    def __enter__(self) -> "Cluster":
        folder = self.folder
        for name in ("state", "spool/n1", "spool/n2"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        values = {"folder": folder, "network": NETWORK, "seconds": self.seconds}
        (folder / "slurm.conf").write_text(CONF.format(**values))
        (folder / "node.sh").write_text(NODE.format(**values))
        (folder / "controller.sh").write_text(CONTROLLER.format(**values))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{NETWORK}.1 ctl\n{NETWORK}.11 n1\n{NETWORK}.12 n2\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        spaces = ["--pid", "--fork", "--kill-child=KILL", "--mount", "--propagation", "private", "--mount-proc"]
        self._outer = subprocess.Popen(
            ["unshare", *spaces, "--net", "--uts", "bash", str(folder / "controller.sh")],
            env=os.environ | {"SLURM_CONF": str(folder / "slurm.conf")},
            stdout=(folder / "controller.log").open("w"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 30)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outer.kill()  # the kernel ends everything in the namespace with it
        self._outer.wait(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a client beside the controller; returns its output, both streams."""
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        if not children:
            return ""
        enter = ["nsenter", "--target", children[0], "--pid", "--mount", "--net", "--uts", f"--wd={cwd or Path.cwd()}"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        settings = clean | {"SLURM_CONF": str(self.folder / "slurm.conf")} | (env or {})
        done = subprocess.run([*enter, *command], env=settings, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def state(self, job: str) -> dict[str, str]:
        """JobState, Restarts, ExitCode and whatever else `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition, seconds: float = 900) -> None:
        """Poll until the condition holds; a TimeoutError with the logs if it never does.

        The default is for whatever starts processes: on a busy machine of two cores that takes minutes.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))]
                raise TimeoutError("\n".join([f"not within {seconds} s", *logs]))
            time.sleep(0.5)

    def finish(self, job: str, seconds: float = 900) -> str:
        """Wait until the job is over; returns how it ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE")
        self.wait_for(lambda: self.state(job).get("JobState") in over, seconds)
        return self.state(job)["JobState"]
