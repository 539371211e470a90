"""What a run logs of what its settings mean."""

import pytest

from raylm import budget, model, summary, tokens, tracking
from raylm import plan as plans
from raylm.pipeline import stores


@pytest.fixture(scope="module")
def logged(ray_cluster, tiny, tmp_path_factory):
    """Settings -> the figures of a run that has started with them, and the parameters of its model."""

    def log(*settings):
        experiment = tiny(*settings)
        store, _ = stores.prepare(plans.resolve_tokens(experiment))
        directory = str(tmp_path_factory.mktemp("run"))
        run = tracking.start(experiment.tracking, experiment="tiny", name="run", tags={}, directory=directory)
        opened = tokens.open_store(store.path)
        summary.log_size(run, experiment, opened, budget.for_store(experiment, opened))
        found = model.config_of(experiment, len(opened.tokenizer))
        return run.figures(), model.parameters(found, masked=experiment.objective.is_masked)

    return log


def test_what_settings_mean_by_hand(logged):
    figures, counts = logged("train.learning_rate=1e-2", "train.weight_decay=0.1")
    a_layer = 12 * 16**2 + 13 * 16 + 2 * 16  # the last are those of the norm behind it
    assert counts.without_embeddings == a_layer
    rows, positions = counts.output_head // 16, 32
    assert figures == {
        "tokens_per_parameter": pytest.approx(2560 / (a_layer + (rows + positions) * 16), rel=1e-3),
        "tokens_per_parameter_without_embeddings": pytest.approx(2560 / a_layer, rel=1e-3),
        "weight_decay_timescale": 256 / (1e-2 * 0.1 * 2560),
        "training_flops": pytest.approx(2560 * (6 * (a_layer + rows * 16) + 12 * 16 * 32), rel=1e-3),
        "evaluation_seconds": None,
        "saving_seconds": None,
        "peak_memory_bytes": None,
        "mfu": None,
    }


@pytest.mark.parametrize(
    ("optimizer", "decay", "has_one"),
    [
        ("muon", 0.1, True),
        ("adamw_torch", 0.1, True),
        ("adamw", 0, False),
        ("adafactor", 0.1, False),
        ("sgd", 0.1, False),
    ],
)
def test_a_timescale_is_told_where_weight_decay_is_decoupled(logged, optimizer, decay, has_one):
    figures, _ = logged(f"train.optimizer={optimizer}", f"train.weight_decay={decay}")
    assert (figures["weight_decay_timescale"] is not None) == has_one


def test_training_low_rank_updates_takes_fewer_operations(logged):
    whole, counts = logged()
    pytest.importorskip("peft", reason="needs peft: pip install raylm[peft]")
    updates, _ = logged("model.lora={}")
    saved = whole["training_flops"] - updates["training_flops"]
    assert saved == pytest.approx(2 * 2560 * counts.multiplied, rel=1e-2)
