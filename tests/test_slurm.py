"""configs/cluster/slurm.sbatch on a Slurm of its own: two nodes, each in namespaces, as those of test_namespaces.py."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_namespaces import RAY, SIZES, Hosts, experiment, possible, running, until

SCRIPT = Path(__file__).parent.parent / "configs" / "cluster" / "slurm.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not possible(), reason="no network namespaces can be made here: it takes root and iproute2"),
    pytest.mark.skipif(
        not all(shutil.which(each, path=PATH) for each in PROGRAMS), reason="Slurm and munge are not installed"
    ),
]

CONFIGURATION = """
ClusterName=raylm
SlurmctldHost={names[0]}({addresses[0]})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
NodeName={names[0]} NodeAddr={addresses[0]} CPUs=1 State=UNKNOWN
NodeName={names[1]} NodeAddr={addresses[1]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Nodes(Hosts):
    """The hosts, of which two are nodes of Slurm; its controller is on the first."""

    daemons = ()

    def boot(self):
        names, addresses = self.names[:2], [self.address(number) for number in range(2)]
        (self.shared / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(map("{} {}\n".format, addresses, names)), encoding="utf-8"
        )
        for name in ("state", "home", *(f"spool-{name}" for name in names)):
            (self.shared / name).mkdir()
        key = self.shared / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.configuration = self.shared / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(place=self.shared, names=names, addresses=addresses), encoding="utf-8"
        )
        files = [f"--{name}-file={self.shared}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        munged = [
            shutil.which("munged", path=PATH),
            "--foreground",
            "--force",
            f"--socket={self.shared}/munge.socket",
            *files,
        ]
        with (self.shared / "daemons.log").open("a") as log:
            to_log = {"stdout": log, "stderr": log}
            self.daemons = [subprocess.Popen(munged, **to_log)]
            until((self.shared / "munge.socket").exists)
            self.daemons.append(self.on(0, "slurmctld", "-D", **to_log))
            self.daemons += [self.on(number, "slurmd", "-D", "-N", names[number], **to_log) for number in range(2)]
        until(lambda: self.asked("sinfo --noheader --format=%T").split() == ["idle"])
        self.asked(f"{RAY} get-auth-token --generate")

    def on(self, number, *command, **how):
        """Start a command on a host, which has processes, a name and /tmp of its own, and the home of all."""
        private = self.shared / f"tmp{number}"
        private.mkdir(exist_ok=True)
        script = 'mount --bind "$1" /tmp && mount --bind "$2" /etc/hosts && hostname "$3" && shift 3 && exec "$@"'
        namespaces = ["--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        inside = ["nsenter", f"--net=/run/netns/{self.names[number]}", "unshare", *namespaces, "sh", "-c", script, "sh"]
        inside += [str(private), f"{self.shared}/hosts", self.names[number]]
        own = {"HOME": f"{self.shared}/home", "SLURM_CONF": str(self.configuration), "PATH": PATH}
        environment = {**os.environ, **own, "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_AUTH_MODE", None)
        return subprocess.Popen([*inside, *map(str, command)], env=environment, start_new_session=True, **how)

    def asked(self, line):
        """What a command prints on the first node, in the shared directory."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return self.on(0, "sh", "-c", f"cd {self.shared} && {line}", **pipes).communicate(timeout=120)[0]

    def unplug(self):
        super().unplug()
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


@pytest.fixture
def nodes():
    with running(Nodes) as made:
        yield made


def test_a_sweep_on_two_nodes_goes_on_when_its_job_is_requeued(nodes, text_directory, tiny):
    """The script as it is but for the place of the storage; the nodes have no GPU, and one CPU."""
    settings = ("tune.num_samples=3", "tune.scheduler=none", "train.save_every_tokens=12800")
    file = experiment(nodes, text_directory, tiny, *SIZES, *settings)
    file.rename(nodes.shared / "sweep.yaml")
    (nodes.shared / ".venv").symlink_to(sys.prefix)
    script = SCRIPT.read_text(encoding="utf-8")
    assert "storage=/shared/raylm" in script
    (nodes.shared / "slurm.sbatch").write_text(script.replace("storage=/shared/raylm", f"storage={nodes.shared}/runs"))

    told = nodes.asked("sbatch --gpus-per-node=0 --cpus-per-task=1 --output=job.out slurm.sbatch")
    job = told.split()[-1]
    place = nodes.shared / "runs" / "words"
    until(lambda: list(place.glob("tune-*/*/checkpoints/*/manifest.json")) or not nodes.asked(f"squeue -h -j {job}"))
    assert not nodes.asked(f"scontrol requeue {job}")
    deadline = time.monotonic() + 900  # Slurm begins it again after two minutes
    while nodes.asked(f"squeue -h -j {job}") and time.monotonic() < deadline:
        time.sleep(2)
    told, state = (nodes.shared / "job.out").read_text(), " ".join(nodes.asked(f"scontrol show job {job}").split())
    assert all(f" {each} " in state for each in ("JobState=COMPLETED", "Restarts=1", "ExitCode=0:0")), told
    assert "resuming" in told
    (run,) = place.glob("tune-*")
    trials = json.loads((run / "result.json").read_text())["trials"]
    assert [(trial["status"], trial["tokens"]) for trial in trials] == [("completed", 256000)] * 3
