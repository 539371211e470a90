"""One Ray for all tests that need one, on this machine, ended by handle; no network, no tracking unless asked for."""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.pop("RAY_ADDRESS", None)

from pathlib import Path

import pytest

from raylm import config, console
from raylm import plan as plans
from raylm.pipeline import stores

S3 = socket.create_server(("127.0.0.1", 0), backlog=0)
"""Where the S3 server of test_storage.py will be: its port is taken from the beginning, for whatever starts with this
environment."""
S3_KEY = "AKIAloopback"
os.environ.update(
    AWS_ACCESS_KEY_ID=S3_KEY,
    AWS_SECRET_ACCESS_KEY="of nobody",
    AWS_ENDPOINT_URL=f"http://127.0.0.1:{S3.getsockname()[1]}",
    AWS_EC2_METADATA_DISABLED="true",
)

TOKEN = "hf_canaryCanaryCanaryCanaryCanaryCana"
"""A secret of nobody, which must never be seen where it was not put."""

WORDS = "the cat sat on a mat and saw one dog run far to sea".split()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """MLflow sets for good what raylm takes for the user's wish, once it is used in this process."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def messages():
    """What raylm says stands on stderr, as in a command."""
    console.show_messages()


@pytest.fixture
def mounted():
    """(options of a tmpfs) -> (a directory, the beginning of a command that has such a file system mounted there)."""
    with tempfile.TemporaryDirectory(prefix="tmpfs-", dir="/tmp") as directory:  # short enough for Ray's sockets

        def begin(options):
            mapped = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
            script = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
            command = ["unshare", *mapped, "--mount", "bash", "-c", script, "bash", options, directory]
            try:
                subprocess.run([*command, "true"], capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("nothing can be mounted here")
            return directory, command

        yield begin


@pytest.fixture(scope="session")
def ray_cluster():
    """Connected to a Ray of two CPUs that was started for the tests; raylm.cluster.Resources of one worker."""
    import ray

    from raylm import cluster
    from raylm.local_worker import WORKER_ENVIRONMENT

    os.environ.update(cluster.DRIVER_ENVIRONMENT)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    yield cluster.resources(config.ClusterConfig(), ray.cluster_resources())
    ray.shutdown()


@pytest.fixture(scope="session")
def free_port():
    """() -> a port of the loopback address that nobody listens to, each time another."""
    import socket

    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return find


def one_by_one(function, numbered):
    """What tokens.write._each does with Ray's tasks, in this process."""
    return (function(*item) for item in numbered)


@pytest.fixture(scope="module")
def one_thread():
    """torch has one thread: tensors as small as those of the tests are quicker so."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory) -> Path:
    """60 small files of words: enough for a tokenizer, a few hundred blocks and a validation split."""
    directory = tmp_path_factory.mktemp("text")
    for number in range(60):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(200)]
        (directory / f"{number:02}.txt").write_text(" ".join(words) + f" {number}\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def tiny(text_directory, tmp_path_factory):
    """settings -> an experiment of a model of 1 layer that trains in a second; one storage for the session."""
    storage = tmp_path_factory.mktemp("storage")
    file = storage / "tiny.yaml"
    file.write_text(
        f"""
name: tiny
storage: {storage}
corpus: {{paths: {text_directory}, validation_fraction: 0.2}}
tokenizer: {{train: {{vocab_size: 300}}}}
blocks: {{block_size: 32}}
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}}}}
train: {{learning_rate: 2e-2, batch_tokens: 256, max_tokens: 2560, eval_every_tokens: 512, precision: float32}}
cluster: {{cpus_per_worker: 1}}
tracking: {{uri: null}}
tune: {{space: {{train.learning_rate: {{choice: [2e-2]}}}}}}
"""
    )

    def make(*settings: str) -> config.Experiment:
        return config.load(file, settings)

    return make


# A command -----------------------------------------------------------------------------------------------------------

HEAVY = ["raylm.training", "ray.tune", "ray.data", "mlflow", "datasets"]
"""What the verbs import between them: 10 s of CPU time, where the rest of a command's start is 0.3 s."""


class Started:
    """A command that runs, and what subprocess.Popen has of it."""

    def __init__(self, process, arguments, stdout: Path, stderr: Path):
        self.process, self.arguments, self.stdout, self.stderr = process, arguments, stdout, stderr
        self.kill, self.terminate = process.kill, process.terminate

    def wait(self) -> subprocess.CompletedProcess[str]:
        self.process.join(280)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, 280, self.stdout.read_bytes(), self.stderr.read_bytes())
        texts = (file.read_text(encoding="utf-8") for file in (self.stdout, self.stderr))
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *texts)


@pytest.fixture(scope="session")
def start_command(tmp_path_factory):
    """(verb, *argv, cwd=...) -> Started: `raylm VERB ...` in a process of its own.

    It is forked off one that has imported HEAVY and done nothing else.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(HEAVY)
    outputs = tmp_path_factory.mktemp("outputs")
    numbers = itertools.count()

    def start(verb: str, *argv: object, cwd: Path | None = None) -> Started:
        stdout, stderr = (outputs / f"{next(numbers)}-{name}" for name in ("stdout", "stderr"))
        arguments = [f"raylm.{verb}", *map(str, argv)]
        # Ray, once it is used in this process, sets how its own clusters are reached: none of a command's business.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        process = processes.Process(target=be_command, args=(arguments, cwd or Path.cwd(), environment, stdout, stderr))
        process.start()
        return Started(process, arguments, stdout, stderr)

    return start


@pytest.fixture(scope="session")
def command(start_command):
    """(verb, *argv, cwd=...) -> the exit code, stdout and stderr of `raylm VERB ...`, as subprocess.run tells them."""
    return lambda verb, *argv, cwd=None: start_command(verb, *argv, cwd=cwd).wait()


def be_command(arguments: list[str], cwd: Path, environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # or it is that of the test by which the fork server was started
    for descriptor, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = arguments
    importlib.import_module(arguments[0]).main()


# MLflow's server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(root: Path, port: int, *options: str, **environment: str):
    """`mlflow server` as its users start it, with its database in root, 10 s on a quiet machine. Gives its address."""
    stores = ["--backend-store-uri", f"sqlite:///{root}/mlflow.db", *options]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *stores],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address):
    """Wait until a server does."""
    while True:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(address, timeout=5).close()
        time.sleep(0.2)


# A model -------------------------------------------------------------------------------------------------------------

PLAIN = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""The files of `trained_directory` without what raylm and the Trainer add."""

MANIFEST = {
    "format": 3,
    "fingerprint": "f",
    "tokenizer": {"frames": {"auto": [0, 0]}, "vocab_size": 260},
    "ledger": {"documents": 4, "bytes": 1234, "filtered: min_chars": 1, "kept": 3, "kept bytes": 1200},
    "train": {"documents": 2, "tokens": 500, "bytes": 1000, "unknown_tokens": 0, "shards": []},
    "validation": {"documents": 1, "tokens": 100, "bytes": 200, "unknown_tokens": 0, "shards": []},
}


@pytest.fixture(scope="session")
def trained_directory(tmp_path_factory) -> Path:
    """A directory with a tiny GPT-2 in it as the Trainer and raylm leave it, with secrets and places in its experiment,
    beside the manifest of its token store; never changed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from raylm import checkpoint, tokenizer

    home = tmp_path_factory.mktemp("home")
    directory, store = home / "checkpoint", home / "tokens" / "f"
    sizes = {"vocab_size": 260, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(directory)
    tokenizer.train(["a b c"], config.TrainedTokenizer(vocab_size=260)).save_pretrained(directory)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (directory / name).write_text("of the training")
    sources = [
        {"name": f"{home}/notes/**/*.md", "documents": 2, "tokens": 400, "bytes": 800},
        {"name": "hub://stories?split=train", "documents": 1, "tokens": 200, "bytes": 400},
    ]
    store.mkdir(parents=True)
    (store / "manifest.json").write_text(json.dumps({**MANIFEST, "sources": sources}))
    experiment = config.load(
        None,
        [
            "name=tiny",
            f"storage={home}/runs",
            f"corpus.paths=['{home}/notes/**/*.md', 'hub://stories?split=train']",
            f"eval.paths=['s3://key:{TOKEN}@bucket/held/out.txt']",
            f"tracking.uri=https://user:{TOKEN}@mlflow.example",
            "tracking.experiment=/Users/me@example/words",
            "cluster.address=ray://10.0.0.7:10001",
            f"train.arguments={{hub_token: {TOKEN}, logging_first_step: true, deepspeed: {home}/zero.json}}",
            "model.config={model_type: gpt2, n_layer: 1, n_head: 1, n_embd: 8}",
        ],
    )
    record = {"step": 7, "tokens": 3584, "perplexity": 12.25, "bits_per_byte": 1.5, "store": str(store)}
    checkpoint.describe(directory, experiment, record)
    return directory


@pytest.fixture(scope="session")
def lora_directory(trained_directory, tmp_path_factory) -> Path:
    """A checkpoint of `trained_directory` finetuned with LoRA, to be exported as an adapter; never changed."""
    import torch

    from raylm import checkpoint, lora, model

    directory = tmp_path_factory.mktemp("lora") / "step_00000007"
    directory.mkdir()
    given = checkpoint.load(trained_directory)
    settings = {"r": 2, "modules_to_save": ["ln_f"], "export": "adapter"}
    section = config.ModelConfig(path=str(trained_directory), lora=settings)
    network = model.build(section, given.tokenizer, block_size=8)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += torch.full_like(weight, 0.5)
    network.save_pretrained(directory, state_dict=lora.merged_state_dict(network))
    lora.save_updates(network, directory)
    given.tokenizer.save_pretrained(directory)
    experiment = config.override(
        checkpoint.read_experiment(trained_directory),
        {"model.config": None, "model.path": str(trained_directory), "model.lora": settings},
    )
    checkpoint.describe(directory, experiment, given.record)
    return directory


def copied(directory, to, names=None):
    """A copy of a directory's files, or of some, that a test may change."""
    to.mkdir()
    for file in directory.iterdir():
        if names is None or file.name in names:
            (to / file.name).write_bytes(file.read_bytes())
    return to


class Here:
    """A loop.Session in the test's own process, where a worker group takes 10 s to begin."""

    rank = 0
    world_size = 1

    def report(self, metrics):
        pass

    def lost_nodes(self):
        return []


class OfGroup(Here):
    """A session in a process of `worker_processes`."""

    def __init__(self):
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def be_worker(job: bytes, rank: int, size: int, port: int, outcome: Path) -> None:
    import torch

    from raylm import training

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    tempfile.tempdir = None
    torch.set_num_threads(1)
    if size > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    found = training.train_loop_per_worker(pickle.loads(job))
    if rank == 0:
        outcome.write_bytes(pickle.dumps(found))
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def worker_processes(tmp_path_factory, free_port):
    """(job, size, session) -> the outcome of its training by `size` workers, which are processes without Ray: they are
    there in a second. None if one of them was killed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(HEAVY)
    outcomes, numbers = tmp_path_factory.mktemp("outcomes"), itertools.count()

    def run(job, size: int, session: type = OfGroup):
        import dataclasses

        from ray import cloudpickle

        file, port = outcomes / str(next(numbers)), free_port()
        experiment = config.override(job.experiment, {"cluster.num_workers": size})
        task = cloudpickle.dumps(dataclasses.replace(job, experiment=experiment, session=session))
        group = [processes.Process(target=be_worker, args=(task, rank, size, port, file)) for rank in range(size)]
        for process in group:
            process.start()
        while any(process.is_alive() for process in group):
            multiprocessing.connection.wait([process.sentinel for process in group if process.is_alive()])
            if any(process.exitcode for process in group):  # the others would wait for it
                for process in group:
                    process.kill()
        found = pickle.loads(file.read_bytes()) if file.exists() else None
        if found is not None and found.error is not None:
            raise found.error
        return found

    return run


@pytest.fixture(scope="session")
def new_job():
    """experiment -> its training in a directory of its own, as a task for `worker_processes`; without Ray."""
    from raylm import budget, runs, tracking, training
    from raylm.tokens import write

    def make(experiment: config.Experiment):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "_each", one_by_one)
            store, _ = stores.prepare(plans.resolve_tokens(experiment))
        begun = runs.start_or_resume(experiment, "train", os.path.basename(store.path), "never")
        tracked = tracking.start(
            experiment.tracking, experiment=experiment.name, name=begun.name, tags={}, directory=begun.directory
        )
        return training.TrainTask(experiment, store.path, budget.for_store(experiment, store), tracked, begun.directory)

    return make


@pytest.fixture(scope="session")
def train_run(ray_cluster):
    """(experiment, session) -> (outcome, job) of a training run in a directory of its own.

    Without a session one worker trains in this process, several in a group of Ray's. `go_on(job, experiment)` is the
    outcome of going on with that run.
    """
    import dataclasses

    import ray

    from raylm import budget, cluster, runs, tracking, training
    from raylm.training import launch

    def fit(job: training.TrainTask):
        if job.session is not Here:
            return launch.fit(job, cluster.resources(job.experiment.cluster, ray.cluster_resources()))
        return launch.with_smaller_batches(job, lambda: training.train_loop_per_worker(job))

    def run(experiment: config.Experiment, session: type | None = None, channel=None):
        store, _ = stores.prepare(plans.resolve_tokens(experiment))
        begun = runs.start_or_resume(experiment, "train", os.path.basename(store.path), "never")
        tracked = tracking.start(
            experiment.tracking, experiment=experiment.name, name=begun.name, tags={}, directory=begun.directory
        )
        sets = stores.prepare_evaluation_sets(plans.resolve(experiment), store)
        session = session or (Here if experiment.cluster.most_workers == 1 else training.RayTrainSession)
        job = training.TrainTask(
            experiment,
            store.path,
            budget.for_store(experiment, store),
            tracked,
            begun.directory,
            session,
            channel,
            sets,
        )
        return fit(job), job

    def go_on(job, experiment, channel=None):
        session = Here if experiment.cluster.most_workers == 1 else training.RayTrainSession
        return fit(dataclasses.replace(job, experiment=experiment, channel=channel, session=session))

    run.go_on = go_on
    return run
