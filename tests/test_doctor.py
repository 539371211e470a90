"""What raylm doctor finds on this machine, and what it mends."""

import re
import stat
import time

import pytest
from conftest import mlflow_server

from raylm import config, diagnosis
from raylm.diagnosis import Finding


def found(findings, what):
    return next(finding for finding in findings if finding.what == what)


def test_a_token_that_others_can_read_is_bad_and_mended_on_request(tmp_path, monkeypatch):
    token = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert [finding.verdict for finding in diagnosis.token(fix=False)] == ["note"], "there is none"
    token.write_text("secret")
    token.chmod(0o644)
    (finding,) = diagnosis.token(fix=False)
    assert finding == Finding("ray token", "bad", f"{token}, mode 0644", "others can read it: --fix, or chmod 600")
    assert [finding.verdict for finding in diagnosis.token(fix=True)] == ["good"]
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == "secret"


def test_libraries_are_held_against_what_raylm_asks_for(monkeypatch):
    assert found(diagnosis.libraries(), "libraries").verdict == "good"
    real = diagnosis.importlib.metadata.version

    def version(name):
        if name == "peft":
            raise diagnosis.importlib.metadata.PackageNotFoundError
        return "1.0" if name == "transformers" else real(name)

    monkeypatch.setattr(diagnosis.importlib.metadata, "version", version)
    findings = list(diagnosis.libraries())
    assert found(findings, "libraries").verdict == "bad"
    assert re.search(r"transformers 1\.0, wanted .*>=5", found(findings, "libraries").found)
    assert found(findings, "extras") == Finding("extras", "note", "not installed: peft", "pip install 'raylm[peft]'")


@pytest.mark.parametrize(
    ("settings", "what", "verdict"),
    [
        (["tracking.uri=http://127.0.0.1:9"], "mlflow", "bad"),
        (["tracking.uri=null"], "mlflow", "note"),
        (["tracking.uri=sqlite:///x.db"], "mlflow", "good"),
        (["tracking.uri=sqlite:///x.db", "cluster.address=10.0.0.1:6379"], "mlflow", "bad"),
    ],
)
def test_tracking(settings, what, verdict):
    findings = list(diagnosis.tracking_of(config.load(None, settings)))
    assert found(findings, what).verdict == verdict


@pytest.mark.slow
def test_a_server_of_mlflow_is_asked_as_runs_ask_it(tmp_path, free_port):
    """Not for its health, which it tells anybody: by a name that it does not know it refuses all else."""
    port = free_port()
    experiment = config.load(None, [f"tracking.uri=http://127.0.0.1:{port}"])

    def asked(allowed):
        with mlflow_server(tmp_path, port, "--allowed-hosts", allowed):
            for _ in range(60):
                (finding,) = diagnosis.tracking_of(experiment)
                if "cannot be reached" not in finding.found:
                    break
                time.sleep(1)  # nobody answers at first
            return finding

    refused = asked("mlflow.example")
    assert refused.verdict == "bad"
    assert "answers 'Invalid Host header'" in refused.found
    said, _, way_out = refused.found.rpartition(" ")
    assert said.endswith("start it with --allowed-hosts")
    assert asked(way_out) == Finding("mlflow", "good", f"http://127.0.0.1:{port}")


def test_the_screen_has_everything_and_the_exit_code_tells_of_the_worst(command, tmp_path, monkeypatch):
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    result = command("doctor", f"storage={tmp_path}/runs", "cluster.cpus_per_worker=64", cwd=tmp_path)
    assert result.returncode == 2
    assert "secret" not in result.stdout + result.stderr
    for what in ("python", "cpus", "memory", "libraries", "ray token", "cluster.num_workers", "storage", "mlflow"):
        assert what in result.stdout
    assert "1 x 64 needs 64 CPUs" in result.stdout.replace("\n", " ")
    assert [file.name for file in tmp_path.iterdir()] == ["auth_token"], "it leaves nothing"
