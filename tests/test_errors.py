import pickle

import pytest

from raylm import errors

EXIT_CODES = {
    errors.RaylmError: 1,
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.TrainingError: 4,
    errors.Diverged: 4,
    errors.OutOfMemory: 4,
    errors.WorkerFailed: 4,
    errors.StorageError: 5,
    errors.StorageUnavailable: 5,
    errors.StorageFull: 5,
    errors.Interrupted: 75,
}


def test_every_error_has_its_exit_code():
    ours = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
    assert {kind: kind.exit_code for kind in ours} == EXIT_CODES


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", ["train.seed", None])
def test_errors_travel_between_processes(kind, where):
    error = pickle.loads(pickle.dumps(kind("train.seed must be at least 0, got -1", where)))
    assert type(error) is kind
    assert (error.message, error.where) == ("train.seed must be at least 0, got -1", where)
    assert str(error) == "train.seed must be at least 0, got -1"
    assert error.exit_code == EXIT_CODES[kind]


def test_an_interruption_is_not_taken_for_an_error_of_a_library():
    assert not issubclass(errors.Interrupted, Exception)
