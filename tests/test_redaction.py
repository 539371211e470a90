import pytest

from raylm.redaction import redacted


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("https://me:s3cret@host:5000/path", "https://host:5000/path"),
        ("https://s3cret@host/path", "https://host/path"),
        ("HTTP://me:p@s3cret@host", "HTTP://host"),
        ("postgresql://me:s3cret@host/mlflow", "postgresql://me@host/mlflow"),
        ("postgresql+psycopg2://me:s3cret/part@host/mlflow", "postgresql+psycopg2://me@host/mlflow"),
        ("mysql://me:p@s3cret@host/mlflow", "mysql://me@host/mlflow"),
        ("s3://key:s3cret@bucket/a", "s3://key@bucket/a"),
        ("s3://key:s3/c/ret@bucket/a", "s3://key@bucket/a"),
        ("storage=gs://key:s3/cret+@bucket/a@b", "storage=gs://key@bucket/a@b"),
        ("uri: s3://k:s3cret@b/c, and [s3://k:s3cret@d/e,s3://k:s3cret@f/@g]", "uri: s3://k@b/c, and [s3://k@d/e,s3://k@f/@g]"),
        ("https://host/a.txt?X-Amz-Signature=s3cret&split=train", "https://host/a.txt?X-Amz-Signature=…&split=train"),
        ("https://account.blob/a?sv=1&sig=s3cret", "https://account.blob/a?sv=1&sig=…"),
        ("postgresql://me@host/mlflow?sslmode=require&password=s3cret", "postgresql://me@host/mlflow?sslmode=require&password=…"),
    ],
)  # fmt: skip
def test_no_password_is_left(text, there):
    assert redacted(text) == there
    assert redacted(there) == there


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////tmp/a@b:c/mlflow.db",
        "http://host:8080/data@2024/a.txt",
        "hub://stories?split=train",
        "git@host:project",
        "s3://bucket/me:you@home/a.txt",
        "hdfs://namenode:8020/data@2024/a.txt",
        "databricks",
    ],
)
def test_what_is_no_password_stays(text):
    assert redacted(text) == text


def test_a_tree_keeps_its_shape():
    tree = {"uri": "https://me:s3cret@host", "paths": ["s3://k:s3cret@b"], "pair": ("a", 1.5), "none": None}
    assert redacted(tree) == {"uri": "https://host", "paths": ["s3://k@b"], "pair": ("a", 1.5), "none": None}
