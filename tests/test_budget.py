import pytest

from raylm import budget
from raylm.config import TrainConfig
from raylm.errors import DataError


def plan(block_size=128, num_workers=2, epoch_examples=None, **settings):
    section = TrainConfig(**{"batch_tokens": 2048, "micro_batch_tokens": 512, "max_tokens": 20_480, **settings})
    return budget.compute(section, block_size=block_size, num_workers=num_workers, epoch_examples=epoch_examples)


def test_a_step_is_shared_out_among_workers_and_micro_batches():
    found = plan()
    assert (found.steps, found.examples, found.micro_batch, found.accumulation) == (10, 16, 4, 2)


@pytest.mark.parametrize("block_size", [64, 128, 256, 1024])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_tokens_a_step_and_in_all_do_not_depend_on_block_size_or_workers(block_size, num_workers):
    found = plan(block_size, num_workers)
    assert found.micro_batch * found.accumulation * num_workers * block_size == 2048
    assert found.tokens == 20_480


def test_a_budget_is_rounded_down_to_whole_steps():
    assert plan(max_tokens=4095).steps == 1


def test_epochs_are_counted_in_blocks():
    assert plan(max_tokens=None, num_epochs=2, epoch_examples=80).steps == 10
    assert plan(max_tokens=None, epoch_examples=80).steps == 5


def test_less_than_a_step_of_text_is_still_a_step():
    assert plan(max_tokens=None, epoch_examples=3).steps == 1


def test_no_block_is_an_error_that_names_the_block_size():
    with pytest.raises(DataError, match="blocks.block_size=128"):
        plan(epoch_examples=0)


def test_evaluations_are_counted_in_tokens():
    assert plan(eval_every_tokens=5000).eval_every == 2
    assert plan(save_every_tokens=4096).save_every == 2
    assert plan().eval_every == 1, "a tenth of ten steps"


def test_a_micro_batch_holds_at_least_one_block():
    assert plan(block_size=1024, micro_batch_tokens=1).micro_batch == 1


def test_many_passes_over_a_small_text_are_warned_of_before_training():
    section = TrainConfig(batch_tokens=2048, max_tokens=737_280)
    found = budget.compute(section, block_size=128, num_workers=1, epoch_examples=87)
    (told,) = found.warnings(section)
    assert told.startswith("66 passes over 11,136 tokens of training text: expect overfitting; train.max_tokens=44544 ")
    few = TrainConfig(batch_tokens=2048, max_tokens=44_544)
    assert list(budget.compute(few, block_size=128, num_workers=1, epoch_examples=87).warnings(few)) == []


def test_a_warmup_that_is_longer_than_the_run_is_warned_of():
    section = TrainConfig(batch_tokens=2048, max_tokens=20_480, warmup_steps=10)
    (told,) = budget.compute(section, block_size=128, num_workers=1, epoch_examples=None).warnings(section)
    assert told.startswith("train.warmup_steps=10 is all of the 10 steps")
    half = section.model_copy(update={"warmup_steps": 0.5})
    assert list(budget.compute(half, block_size=128, num_workers=1, epoch_examples=None).warnings(half)) == []
