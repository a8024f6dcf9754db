"""`storage: s3://...` against a local S3 server, by Arrow's own client and with credentials from the environment."""

from collections.abc import Iterator

import pytest

from penstock.errors import CheckpointError, SweepError
from penstock.storage import Storage

pytest.importorskip("moto", reason="moto is not installed")
from s3_server import client, given_to_this_process, keys, s3_server

BUCKET = "sweeps"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with s3_server(BUCKET) as address, given_to_this_process(address):
        yield address


def test_a_folder_in_a_bucket_counts_only_with_its_manifest(address):
    storage = Storage(f"s3://{BUCKET}/penstock")
    storage.check_writable("storage")
    storage.write("x/a.bin", b"1")
    assert not storage.is_committed("x")
    storage.commit_folder("x", {"a.bin": b"12", "b.bin": b"3"})
    assert storage.read_folder("x") == {"a.bin": b"12", "b.bin": b"3"}
    assert {"penstock/x/a.bin", "penstock/x/b.bin"} <= keys(address, BUCKET)
    client(address).put_object(Bucket=BUCKET, Key="penstock/x/a.bin", Body=b"13")
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        storage.read_folder("x")
    storage.delete("x")
    assert not storage.exists("x") and storage.names("") == []


def test_an_object_whose_writing_fails_is_not_there(address):
    storage = Storage(f"s3://{BUCKET}/penstock").at("spool")
    with pytest.raises(RuntimeError), storage.writing("block") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert not storage.exists("block")
    with storage.writing("block") as stream:
        stream.write(b"whole")
    with storage.reading("block") as stream:
        assert stream.read_at(3, 1) == b"hol"
    assert storage.read("block") == b"whole" and storage.names("") == ["block"]


def test_a_bucket_that_is_not_there_is_named(address):
    with pytest.raises(SweepError, match="no-such-bucket"):
        Storage("s3://no-such-bucket/penstock").check_writable("storage")
