"""What raylm uses of other libraries without their promise that it stays as it is: private names, hooks, words.

After an upgrade each of them that is gone, renamed or called otherwise is one red test with its name and the files that
use it. Without, nothing fails: the Trainer does not call a hook that has another name, and a training is wrong.

The tables are complete, which is tested too: what raylm takes newly of this kind must be added to them.
"""

import ast
import importlib
import inspect
import mmap
import pkgutil
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

import raylm

SOURCES = {file: file.read_text(encoding="utf-8") for file in sorted(Path(raylm.__file__).parent.rglob("*.py"))}

# Names ---------------------------------------------------------------------------------------------------------------

SIGNATURES = {
    # Ray: the cluster
    "ray._private.accelerators.nvidia_gpu.NvidiaGPUAcceleratorManager.get_current_node_accelerator_type": "()",
    "ray._private.accelerators.nvidia_gpu.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators": "()",
    "ray._private.authentication.authentication_token_generator.generate_new_authentication_token": "()",
    "ray._private.authentication.authentication_token_setup.maybe_enable_token_auth_if_token_available": (
        "(warn_if_disabled=True)"
    ),
    "ray._private.log.PlainRayHandler.emit": "(self, record)",
    "ray._private.services.find_node_ids": "()",
    "ray._private.services.get_ray_address_from_environment": "(addr, temp_dir)",
    "ray._private.services.resolve_ip_for_localhost": "(host)",
    "ray._private.node.Node.get_logs_dir_path": "(self)",
    "ray._private.state.GlobalState._connect_and_get_accessor": "(self)",
    "ray._common.utils.get_default_system_temp_dir": "()",
    "ray._private.utils.get_dashboard_dependency_error": "()",
    "ray._private.utils.get_entrypoint_name": "()",
    "ray._private.utils.set_sigterm_handler": "(sigterm_handler)",
    "ray._private.worker.print_to_stdstream": "(data, ignore_prefix)",
    "ray._raylet.AuthenticationTokenLoader.has_token": "(self, ignore_auth_mode=False)",
    "ray._raylet.GlobalStateAccessor.get_actor_table": None,
    "ray._raylet.GlobalStateAccessor.get_placement_group_table": None,
    "ray._raylet.InnerGcsClient.get_all_node_info": None,
    # Ray Tune
    "ray.tune.execution.tune_controller.TuneController._schedule_trial_save": "(self, trial, result=None)",
    "ray.tune.execution.tune_controller.TuneController.get_trials": "(self)",
    "ray.tune.execution.tune_controller.TuneController.search_alg": None,
    "ray.tune.execution.tune_controller.TuneController.stop_trial": "(self, trial)",
    "ray.tune.experiment.Trial": (
        "(trainable_name, *, config=None, trial_id=None, storage=None, evaluated_params=None, experiment_tag='', "
        "placement_group_factory=None, stopping_criterion=None, checkpoint_config=None, export_formats=None, "
        "restore_path=None, trial_name_creator=None, trial_dirname_creator=None, log_to_file=None, max_failures=0, "
        "stub=False, _setup_default_resource=True)"
    ),
    "ray.tune.experiment.Trial.get_error": "(self)",
    "ray.tune.experiment.Trial.init_local_path": "(self)",
    "ray.tune.experiment.Trial.latest_checkpoint_result": None,
    "ray.tune.experiment.Trial.set_config": "(self, config)",
    "ray.tune.experiment.Trial.set_status": "(self, status)",
    "ray.tune.experiment.Trial.update_last_result": "(self, result)",
    "ray.tune.search.search_algorithm.SearchAlgorithm._finished": None,
    "ray.tune.search.variant_generator.generate_variants": (
        "(unresolved_spec, constant_grid_search=False, random_state=None)"
    ),
    # Ray Train
    "ray.core.generated.gcs_pb2.ActorTableData.FromString": None,
    "ray.core.generated.gcs_pb2.PlacementGroupTableData.FromString": None,
    "ray.train.ControllerError": "(controller_failure)",
    "ray.train.WorkerGroupError": "(error_message, worker_failures)",
    "ray.train._internal.utils.get_address_and_port": "()",
    "ray.train.torch.config.TorchConfigContextManager": None,
    "ray.train.torch.config._set_torch_distributed_env_vars": "()",
    "ray.train.torch.config._setup_torch_process_group": (
        "(backend, world_rank, world_size, init_method, timeout_s=1800)"
    ),
    "ray.train.torch.config._shutdown_torch": "(destroy_process_group=False)",
    "ray.train.v2._internal.exceptions.WorkerGroupStartupFailedError": None,
    "ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError": "(num_workers)",
    "ray.train.v2._internal.exceptions.WorkerHealthCheckFailedError": "(message, failure)",
    "ray.train.v2._internal.exceptions.WorkerHealthCheckTimeoutError": "(message)",
    # transformers
    "transformers.PreTrainedConfig._attn_implementation": None,
    "transformers.PreTrainedModel._keys_to_ignore_on_save": None,
    "transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask": "(self, input_ids, attention_mask)",
    "transformers.Trainer._load_rng_state": "(self, checkpoint)",
    "transformers.core_model_loading.revert_weight_conversion": "(model, state_dict)",
    "transformers.Trainer.get_optimizer_cls_and_kwargs": "(args, model=None)",
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING": None,
    "transformers.utils.chat_template_utils.render_jinja_template": "(conversations, tools=None, documents=None, "
    "chat_template=None, return_assistant_tokens_mask=False, continue_final_message=False, "
    "add_generation_prompt=False, **kwargs)",
    # torch
    "torch.cpu.get_capabilities": "()",
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state": "(self)",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._init_mp_dtypes": "(self)",
    "torch.nn.LinearCrossEntropyOptions": None,
    "torch.nn.functional.linear_cross_entropy": (
        "(input, linear_weight, target, *, linear_bias=None, weight=None, reduction='mean', ignore_index=None, "
        "label_smoothing=0.0, options=None)"
    ),
    # others
    "datasets.DatasetBuilder.cache_dir": None,
    "datasets.config.HF_DATASETS_CACHE": None,
    "datasets.config.HF_HUB_OFFLINE": None,
    "fsspec.AbstractFileSystem._strip_protocol": "(path)",
    "fsspec.utils.glob_translate": "(pat)",
    "huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT": None,
    "huggingface_hub.constants.is_offline_mode": "()",
    "peft.tuners.lora.LoraLayer": None,
    "peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer": "(self)",
}
"""Dotted name -> how it is called; None of what is not called, or has no signature that Python knows."""

REBOUND = {
    "ray._private.ray_constants.ENABLE_RAY_CLUSTER": ["ray._private.services"],
    "ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV": ["ray._private.worker"],
    "ray._private.utils.get_dashboard_dependency_error": ["ray._private.services"],
    "ray._private.utils.get_entrypoint_name": ["ray._private.worker"],
    "ray._private.utils.set_sigterm_handler": ["ray._private.worker"],
    "ray._private.worker.print_to_stdstream": ["ray._private.worker"],
    "ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE": ["ray.tune.execution.class_cache._ActorClassCache.get"],
    "huggingface_hub.constants.HF_HUB_OFFLINE": ["huggingface_hub.constants.is_offline_mode"],
}
"""What raylm puts something else in the place of -> where the library must look it up afterwards."""

ASSIGNED = {
    "accelerate.state.AcceleratorState": ["distributed_type"],
    "ray._private.worker": ["_global_node"],
    "ray._private.state": ["state"],
    "ray.tune.experiment.Trial": ["config", "status", "trial_id", "last_result"],
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam": ["all_gather_outputs", "_unsharded_param"],
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": ["fsdp_params", "mp_policy"],
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState": ["_fsdp_param_groups", "_mp_policy"],
    "torch.nn.Module": ["_parameters", "_buffers"],
    "transformers.PreTrainedModel": ["all_tied_weights_keys"],
    "transformers.Trainer": ["_tr_loss", "_globalstep_last_logged", "is_fsdp_enabled"],
    "transformers.TrainingArguments": ["fsdp_plugin_args", "hf_deepspeed_config"],
}
"""Attributes that a class gives its objects, or a module itself, when they are made."""

READ = {
    "torch.optim.Optimizer": {"torch.optim.adam.Adam.step": ["grad_scale", "found_inf"]},
    "accelerate.state.AcceleratorState": {"accelerate.Accelerator": ["fsdp_plugin", "distributed_type"]},
    "torch.distributed.fsdp.MixedPrecisionPolicy": {
        "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": ["mp_policy"]
    },
}
"""Attributes that raylm sets on objects of a class -> where the library must read them."""

WORDS = {
    # variables, by the modules that read them
    "RAY_AIR_NEW_OUTPUT": "ray.tune.experimental.output",
    "RAY_API_SERVER_ADDRESS": "ray._private.ray_constants",
    "RAY_AUTH_MODE": "ray._raylet",
    "RAY_AUTH_TOKEN": "ray._raylet",
    "RAY_AUTH_TOKEN_PATH": "ray._raylet",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": "ray._private.runtime_env.constants",
    "RAY_JOB_STOP_WAIT_TIME_S": "ray.dashboard.modules.job.job_supervisor",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "ray.train.v2._internal.constants",
    "RAY_USE_TLS": "ray._raylet",
    "RAY_prestart_worker_first_driver": "ray._raylet",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "ray.tune.utils.callback",
    "TUNE_DISABLE_SIGINT_HANDLER": "ray.tune.tune",
    "TUNE_GLOBAL_CHECKPOINT_S": "ray.tune.execution.tune_controller",
    "TUNE_MAX_PENDING_TRIALS_PG": "ray.tune.execution.tune_controller",
    "MLFLOW_DISABLE_TELEMETRY": "mlflow.environment_variables",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "mlflow.environment_variables",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "mlflow.environment_variables",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "mlflow.environment_variables",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "mlflow.environment_variables",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "transformers.utils.logging",
    # what errors, tables and files say
    "TrainController": "ray.train.v2._internal.execution.controller.controller",
    "RayTrainWorker": "ray.train.v2._internal.execution.worker_group.worker",
    "actor_init_failed": "ray.exceptions",
    "preempted": "ray.exceptions",
    "ray.io/node-group": "ray._raylet",
    "accelerator_type:": "ray._common.utils",
    "ray_bootstrap_config.yaml": "ray.autoscaler._private.commands",
    "custom code": "transformers.dynamic_module_utils",
    "pass a": "transformers.trainer_optimizer",
    "job_submission_id": "ray.dashboard.modules.job.common",
}
"""A word of another library's that raylm goes by -> the module that has it."""

PUBLIC = {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"}
"""Variables that are documented, and looked up for the user."""

# Hooks ---------------------------------------------------------------------------------------------------------------

TRAINER = "transformers.Trainer"
SETUP = "ray.train.v2._internal.callbacks.backend_setup.BackendSetupCallback"
CONTROLLER = "ray.tune.execution.tune_controller.TuneController"
DCP = "torch.distributed.checkpoint"

HOOKS = {
    TRAINER: {
        "_clip_grad_norm": ("(self, model)", f"{TRAINER}._run_epoch"),
        "_get_grad_norm": ("(self, model, grad_norm=None)", f"{TRAINER}._run_epoch"),
        "_get_num_items_in_batch": ("(self, batch_samples, device)", f"{TRAINER}.get_batch_samples"),
        "_get_train_sampler": ("(self, train_dataset=None)", f"{TRAINER}.get_train_dataloader"),
        "_load_from_checkpoint": ("(self, resume_from_checkpoint, model=None)", f"{TRAINER}.train"),
        "_load_optimizer_and_scheduler": ("(self, checkpoint)", f"{TRAINER}._prepare_for_training"),
        "_save": ("(self, output_dir=None, state_dict=None)", f"{TRAINER}.save_model"),
        "_save_checkpoint": ("(self, model, trial)", f"{TRAINER}._maybe_log_save_evaluate"),
        "_save_optimizer_and_scheduler": ("(self, output_dir)", f"{TRAINER}._save_checkpoint"),
        "compute_loss": (
            "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
            f"{TRAINER}.training_step",
        ),
        "create_optimizer": ("(self, model=None)", f"{TRAINER}.create_optimizer_and_scheduler"),
        "create_accelerator_and_postprocess": ("(self)", f"{TRAINER}.__init__"),
        "evaluate": ("(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')", f"{TRAINER}._evaluate"),
        "get_batch_samples": ("(self, epoch_iterator, num_batches, device)", f"{TRAINER}._run_epoch"),
        "loss_is_scaled_for_ga": (None, f"{TRAINER}.training_step"),
        "save_model": ("(self, output_dir=None, _internal_call=False)", f"{TRAINER}._save_checkpoint"),
        "training_step": ("(self, model, inputs, num_items_in_batch=None)", f"{TRAINER}._run_epoch"),
    },
    f"{DCP}.FileSystemReader": {"_slice_file": ("(self, file, sinfo)", f"{DCP}.filesystem.FileSystemReader.read_data")},
    f"{DCP}.StorageReader": {"read_metadata": ("(self, *args, **kwargs)", f"{DCP}.state_dict_loader._load_state_dict")},
    f"{DCP}.LoadPlanner": {"load_bytes": ("(self, read_item, value)", f"{DCP}.filesystem.FileSystemReader.read_data")},
    f"{DCP}.filesystem.FileSystemBase": {
        "concat_path": ("(self, path, suffix)", f"{DCP}.filesystem.FileSystemReader.read_data"),
        "create_stream": ("(self, path, mode)", f"{DCP}.filesystem.FileSystemReader.read_data"),
    },
    "transformers.TrainerCallback": {
        "on_log": ("(self, args, state, control, **kwargs)", f"{TRAINER}.log"),
        "on_save": ("(self, args, state, control, **kwargs)", f"{TRAINER}._maybe_log_save_evaluate"),
        "on_step_end": ("(self, args, state, control, **kwargs)", f"{TRAINER}._run_epoch"),
        "on_train_begin": ("(self, args, state, control, **kwargs)", f"{TRAINER}._inner_training_loop"),
    },
    "torch.optim.Optimizer": {"step": ("(self, closure=None)", f"{TRAINER}._run_epoch")},
    "transformers.generation.streamers.BaseStreamer": {
        "end": ("(self)", "transformers.generation.utils"),
        "put": ("(self, value)", "transformers.generation.utils"),
    },
    "ray.train.backend.Backend": {
        "on_shutdown": ("(self, worker_group, backend_config)", f"{SETUP}.before_execution_group_shutdown"),
        "on_start": ("(self, worker_group, backend_config)", f"{SETUP}.after_execution_group_start"),
        "share_cuda_visible_devices": (None, "ray.train.v2._internal.callbacks.accelerators"),
    },
    "ray.train.backend.BackendConfig": {
        "backend_cls": (None, f"{SETUP}.__init__"),
        "train_func_context": (None, "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer"),
    },
    "ray.tune.Callback": {
        "on_step_end": ("(self, iteration, trials, **info)", f"{CONTROLLER}.step"),
        "on_trial_complete": ("(self, iteration, trials, trial, **info)", f"{CONTROLLER}.stop_trial"),
        "on_trial_error": ("(self, iteration, trials, trial, **info)", f"{CONTROLLER}._process_trial_failure"),
        "on_trial_result": ("(self, iteration, trials, trial, result, **info)", f"{CONTROLLER}._process_trial_result"),
        "on_trial_start": ("(self, iteration, trials, trial, **info)", f"{CONTROLLER}._actor_started"),
    },
    "ray.tune.progress_reporter.TrialProgressCallback": {
        "_print": ("(self, msg)", "ray.tune.progress_reporter.TrialProgressCallback.on_trial_complete"),
    },
    "ray.tune.schedulers.TrialScheduler": {
        "choose_trial_to_run": ("(self, tune_controller)", f"{CONTROLLER}._maybe_add_actors"),
        "debug_string": ("(self)", CONTROLLER),
        "metric": (None, CONTROLLER),
        "on_trial_add": ("(self, tune_controller, trial)", f"{CONTROLLER}.add_trial"),
        "on_trial_complete": ("(self, tune_controller, trial, result)", f"{CONTROLLER}.stop_trial"),
        "on_trial_error": ("(self, tune_controller, trial)", f"{CONTROLLER}._process_trial_failure"),
        "on_trial_remove": ("(self, tune_controller, trial)", f"{CONTROLLER}.stop_trial"),
        "on_trial_result": ("(self, tune_controller, trial, result)", f"{CONTROLLER}._process_trial_result"),
        "set_search_properties": ("(self, metric, mode, **spec)", "ray.tune.tune.run"),
        "supports_buffered_results": (None, "ray.tune.tune.run"),
    },
    "ray.tune.search.search_algorithm.SearchAlgorithm": {
        "add_configurations": ("(self, experiments)", "ray.tune.tune.run"),
        "is_finished": ("(self)", f"{CONTROLLER}.is_finished"),
        "next_trial": ("(self)", f"{CONTROLLER}._update_trial_queue"),
        "on_trial_complete": ("(self, trial_id, result=None, error=False)", f"{CONTROLLER}.stop_trial"),
        "on_trial_result": ("(self, trial_id, result)", f"{CONTROLLER}._process_trial_result"),
        "set_search_properties": ("(self, metric, mode, config, **spec)", "ray.tune.tune.run"),
        "total_samples": (None, "ray.tune.tune.run"),
    },
    "ray.tune.Stopper": {
        "stop_all": ("(self)", f"{CONTROLLER}._stop_experiment_if_needed"),
    },
}
"""Class -> what raylm overrides of it: how it is called, and where. raylm's own must be called there, or is in vain."""

SIDE_CALLS = {
    "_schedule_trial_save": "ray.tune.schedulers.pbt.PopulationBasedTraining",
    "warn_if_padding_and_no_attention_mask": "transformers.models.gpt2.modeling_gpt2.GPT2Model.forward",
}
"""What raylm puts in the place of a method of an object it is given -> where that must be called."""

# How it is looked up -------------------------------------------------------------------------------------------------


def resolved(name):
    """What a dotted name stands for."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AttributeError(f"no module {parts[0]}")


def signature(callable_):
    """As it is called: without types, which change and do no harm."""
    found = inspect.signature(callable_)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def users(word):
    """The files of raylm in which a word stands."""
    return [str(file) for file, text in SOURCES.items() if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]


@cache
def tree(name):
    return ast.parse(textwrap.dedent(inspect.getsource(resolved(name))))


def mentioned(name):
    """The names and attributes that the source of a module, a class or a function reads or calls."""
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load)
    }


def assigned(name):
    """The names and attributes that the source of a module or a class gives a value."""
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store)
    }


def pairs(table):
    return [pytest.param(name, each, id=f"{name}.{each}") for name, every in table.items() for each in every]


# The tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_name_is_there_and_called_as_before(name):
    used = users(name.rpartition(".")[2])
    try:
        found = resolved(name)
    except AttributeError as error:
        pytest.fail(f"{name} is gone ({error}); it is used in {', '.join(used)}", pytrace=False)
    if SIGNATURES[name] is not None:
        assert signature(found) == SIGNATURES[name], f"{name} is used in {', '.join(used)}"


@pytest.mark.parametrize(("base", "hook"), pairs(HOOKS))
def test_a_hook_is_called_as_before_by_the_same_caller(base, hook):
    called, caller = HOOKS[base][hook]
    used = ", ".join(users(hook))
    assert hasattr(resolved(base), hook), f"{base}.{hook} is gone; it is overridden in {used}, where nobody calls it"
    if called is not None:
        assert signature(getattr(resolved(base), hook)) == called, f"{base}.{hook} is overridden in {used}"
    assert hook in mentioned(caller), f"{caller} does not call {hook} any more, which is overridden in {used}"


@pytest.mark.parametrize("name", SIDE_CALLS)
def test_what_is_put_in_the_place_of_a_method_is_called(name):
    assert name in mentioned(SIDE_CALLS[name]), f"{SIDE_CALLS[name]} does not call {name}: {', '.join(users(name))}"


@pytest.mark.parametrize(("name", "reader"), pairs(REBOUND))
def test_what_is_replaced_is_looked_up_where_it_was_replaced(name, reader):
    module, _, last = name.rpartition(".")
    used = ", ".join(users(last))
    assert hasattr(resolved(module), last), f"{name} is gone; it is replaced in {used}"
    assert last in mentioned(reader), f"{reader} does not look up {last} any more, which is replaced in {used}"
    copies = [
        node.lineno
        for node in ast.walk(ast.parse(Path(sys.modules[module_of(reader)].__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == module and last in {alias.name for alias in node.names}
    ]
    assert copies == [], f"{reader} has a copy of {name}, which is replaced in {used}"


def module_of(name):
    """The module that a dotted name is of, which is loaded."""
    found = resolved(name)
    return getattr(found, "__module__", None) or found.__name__


@pytest.mark.parametrize(("name", "attribute"), pairs(ASSIGNED))
def test_an_attribute_is_there(name, attribute):
    assert attribute in assigned(name) or hasattr(resolved(name), attribute), (
        f"{name} has no {attribute} any more, which is used in {', '.join(users(attribute))}"
    )


@pytest.mark.parametrize(
    ("reader", "attribute"),
    [param for found in READ.values() for param in pairs(found)],
)
def test_an_attribute_that_is_set_is_read(reader, attribute):
    assert attribute in mentioned(reader) | literals(reader), (
        f"{reader} does not read {attribute} any more, which is set in {', '.join(users(attribute))}"
    )


def literals(name):
    """The texts in a source: of getattr(self, "found_inf", None)."""
    return {node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_in_the_module_that_goes_by_it(word):
    # In C++ Ray puts RAY_ before the name of each of its settings.
    looked_for = word.removeprefix("RAY_") if WORDS[word] == "ray._raylet" else word
    with (
        open(resolved(WORDS[word]).__file__, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
    ):
        assert text.find(looked_for.encode()) >= 0, f"{WORDS[word]} has no {word}; used in {', '.join(users(word))}"


# Nothing is missing, nothing is left over ----------------------------------------------------------------------------


def test_all_that_is_listed_is_used():
    listed = [
        *(name.rpartition(".")[2] for name in [*SIGNATURES, *REBOUND]),
        *(attribute for table in (ASSIGNED, HOOKS) for names in table.values() for attribute in names),
        *(attribute for found in READ.values() for names in found.values() for attribute in names),
        *WORDS,
        *SIDE_CALLS,
    ]
    indirect = {"ControllerError", "WorkerGroupError", "WorkerHealthCheckFailedError", "LoraLayer"}
    assert [name for name in listed if name not in indirect and not users(name)] == []


def known():
    """Every part of every name in the tables."""
    names = [*SIGNATURES, *REBOUND, *HOOKS, *ASSIGNED]
    names += [name for table in (HOOKS, ASSIGNED) for every in table.values() for name in every]
    return {part for name in names for part in name.split(".")}


def test_every_private_name_of_another_library_is_listed():
    own = {
        name
        for text in SOURCES.values()
        for node in ast.walk(ast.parse(text))
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [node.attr]
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
            else [node.id]
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            else []
        )
    }
    of_python = {"_asdict", "_replace", "_fields", "_exit", "_run_exitfuncs"}
    found = set()
    for file, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.ImportFrom) and not node.module.startswith("raylm"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
                names = [node.attr]
            found |= {
                f"{file.name}:{node.lineno} {name}"
                for name in names
                if re.match("_(?!_)", name) and name not in own | of_python | known()
            }
    assert found == set()


@cache
def classes():
    """raylm's classes that are made of another library's."""
    for module in pkgutil.walk_packages(raylm.__path__, "raylm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    every = {
        each
        for name, module in sys.modules.items()
        if name.startswith("raylm.")
        for each in vars(module).values()
        if inspect.isclass(each) and each.__module__.startswith("raylm.")
    }
    return sorted(every, key=lambda each: each.__qualname__)


def test_every_hook_that_is_overridden_is_listed():
    listed = {(resolved(base), hook) for base, hooks in HOOKS.items() for hook in hooks}
    found = {
        (base, name)
        for each in classes()
        for base in each.__mro__
        for name in vars(each).keys() & vars(base).keys()
        if base.__module__.split(".")[0] in {"ray", "transformers", "torch", "mlflow", "peft"}
        and not name.startswith(("__", "_abc_"))
    }
    inherited = {(base, name) for base, name in found if any((above, name) in listed for above in base.__mro__)}
    assert found - inherited == set()
    assert listed - found == set(), "overridden nowhere any more"
