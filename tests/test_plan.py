import subprocess
import sys

import pytest

from raylm import config, plan
from raylm.errors import StorageError


def places(**settings):
    return plan.check_places(config.load({"corpus": {"paths": "x"}, **settings}))


def test_a_dry_run_tells_of_storage_that_cannot_be_written_and_writes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file is no directory to write in") as error:
        places(storage=f"{tmp_path}/file/runs")
    assert error.value.where == "storage"
    assert places(storage=f"{tmp_path}/new/runs", tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"}) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_tells_of_an_mlflow_that_does_not_answer(tmp_path):
    (warning,) = places(storage=str(tmp_path), tracking={"uri": "http://127.0.0.1:9"})
    assert "http://127.0.0.1:9" in warning
    assert warning.endswith("a run would keep its metrics until raylm sync uploads them")


def test_a_plan_begins_without_torch_and_transformers():
    """A wrong setting is told before they are imported, and the only worker of a run imports them meanwhile."""
    program = "import raylm.plan, raylm.train, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
