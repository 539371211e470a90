"""One Ray for all tests that need one, on this machine, ended by handle; no network, no tracking unless asked for."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.pop("RAY_ADDRESS", None)

from pathlib import Path

import pytest

from raylm import config

WORDS = "the cat sat on a mat and saw one dog run far to sea".split()


@pytest.fixture(scope="session")
def ray_cluster():
    """Connected to a Ray of two CPUs that was started for the tests; raylm.cluster.Resources of one worker."""
    import ray

    from raylm import cluster

    os.environ.update(cluster.DRIVER_ENVIRONMENT)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": cluster.WORKER_ENVIRONMENT},
    )
    yield cluster.resources(config.ClusterConfig(), ray.cluster_resources())
    ray.shutdown()


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
train: {{learning_rate: 2e-2, batch_tokens: 256, max_tokens: 2560, eval_every_tokens: 512}}
tracking: {{uri: null}}
tune: {{space: {{train.learning_rate: {{choice: [2e-2]}}}}}}
"""
    )

    def make(*settings: str) -> config.Experiment:
        return config.load(file, settings)

    return make
