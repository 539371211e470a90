"""A model's directory -> MLflow's logged models, and its registry.

This is mlflow.transformers.log_model with a client instead of MLflow's global state, which belongs to the user. It also
names the packages that the model needs, because MLflow would find them out by loading it again and over the network.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raylm import storage

NAME = "model"
CHAMPION = "champion"
REQUIREMENTS = ("transformers", "torch", "accelerate")
ADAPTER_CONFIG = "adapter_config.json"


class InvalidModel(Exception):
    """MLflow cannot load the model."""


def log(client: Any, run_id: str, directory: str, record: Mapping[str, Any]) -> None:
    """Log the model of a record in a run's journal, and register it if the record says so, unless that was done before.

    A model that was removed is skipped.
    """
    with tempfile.TemporaryDirectory() as scratch:
        local = _local_directory(f"{directory}/{record['model']}", scratch)
        if local is None:
            return
        model = _logged_model(client, run_id) or _log(client, run_id, local, record["step"], Path(scratch, "logged"))
    if record["register"] is not None:
        _register(client, run_id, model, record["register"])


def _local_directory(path: str, scratch: str) -> str | None:
    """A model's directory on this machine, downloaded to `scratch` if need be; None if it does not exist."""
    if storage.is_remote(path):
        local = Path(scratch, NAME)
        local.mkdir()
        for name in storage.sizes(path):
            storage.download(f"{path}/{name}", local / name)
        path = str(local)
    return path if any(os.path.exists(f"{path}/{name}") for name in ("config.json", ADAPTER_CONFIG)) else None


def _logged_model(client: Any, run_id: str) -> Any:
    """The run's model in MLflow; None if it has none. One whose logging was interrupted is deleted."""
    experiment_id = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
        if str(model.status) == "READY":
            return model
        client.delete_logged_model(model.model_id)
    return None


def _log(client: Any, run_id: str, directory: str, step: int, local: Path) -> Any:
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    run = client.get_run(run_id)
    model = client.create_logged_model(run.info.experiment_id, NAME, source_run_id=run_id, params=run.data.params)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    metrics = [
        Metric(key, point.value, point.timestamp, point.step, model_id=model.model_id, run_id=run_id)
        for key in run.data.metrics
        for point in client.get_metric_history(run_id, key)
        if point.step == step or key.startswith("best/")
    ]
    client.log_batch(run_id, metrics=metrics)
    description = Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id)
    try:
        _save(directory, local, description)
    except Exception as error:
        client.delete_logged_model(model.model_id)
        raise InvalidModel(f"{directory}: {error}") from error
    client.log_model_artifacts(model.model_id, str(local))
    return client.finalize_logged_model(model.model_id, "READY")


def _save(directory: str, local: Path, description: Any) -> None:
    """Save the model as MLflow stores it: loaded, because from a directory MLflow 3.17 fails with transformers 5.23.

    Of an adapter MLflow stores the adapter and the name of its base model.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)  # it warns that there is no card on the Hub
    if os.path.exists(f"{directory}/config.json"):
        architectures = json.loads(Path(directory, "config.json").read_bytes()).get("architectures") or [""]
        task = "fill-mask" if architectures[0].endswith("ForMaskedLM") else "text-generation"
        pipeline = transformers.pipeline(task, model=directory, device="cpu")
        _save_pipeline(pipeline, local, description, REQUIREMENTS)
    else:
        _save_adapter(directory, local, description)
    (local / "LICENSE.txt").unlink(missing_ok=True)  # it says to look for the directory on the Hub


def _save_adapter(directory: str, local: Path, description: Any) -> None:
    import transformers
    from peft import AutoPeftModel, AutoPeftModelForCausalLM  # raylm[peft], with which the adapter was trained

    logging.getLogger("transformers.pipelines.base").setLevel(logging.CRITICAL)  # it does not know peft's classes
    settings = json.loads(Path(directory, ADAPTER_CONFIG).read_bytes())
    if settings.get("trainable_token_indices"):
        raise ValueError(
            "MLflow loads a base model as it is, without rows for added tokens; export model.lora.export=merged or both"
        )
    base = settings["base_model_name_or_path"]
    is_causal = settings.get("task_type") == "CAUSAL_LM"  # of masked models peft has no type
    network = (AutoPeftModelForCausalLM if is_causal else AutoPeftModel).from_pretrained(directory)
    pipeline = transformers.pipeline(
        "text-generation" if is_causal else "fill-mask",
        model=network,
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        device="cpu",
    )
    # MLflow takes a directory alone, for a Hub id that of this machine's cache, but it can load from an id as well.
    file = transformers.utils.cached_file(base, "config.json", revision=settings.get("revision"))
    _save_pipeline(pipeline, local, description, (*REQUIREMENTS, "peft"), base_model_path=os.path.dirname(file))
    description.flavors["transformers"]["local_base_model_path"] = base
    description.save(str(local / "MLmodel"))


def _save_pipeline(pipeline: Any, local: Path, description: Any, packages: tuple[str, ...], **options: Any) -> None:
    import mlflow.transformers

    requirements = [f"{name}=={version(name).partition('+')[0]}" for name in packages]
    mlflow.transformers.save_model(
        pipeline, str(local), task=pipeline.task, mlflow_model=description, pip_requirements=requirements, **options
    )


def _register(client: Any, run_id: str, model: Any, name: str) -> None:
    """Register the model as a version of `name`, and make it the champion unless there is a newer version."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    if not any(version.run_id == run_id for version in versions):
        # By its location: for models:/… MLflow 3.17 asks the server of its global state.
        versions.append(client.create_model_version(name, model.artifact_location, run_id, model_id=model.model_id))
    newest = max(versions, key=lambda version: int(version.version))
    if newest.run_id == run_id:
        client.set_registered_model_alias(name, CHAMPION, newest.version)
