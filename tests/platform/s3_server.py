"""A local S3 (moto's), over HTTP on this machine's loopback."""

import contextlib
import os
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "a-key-of-s3", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """The address of an S3 with one empty bucket. It takes any credentials, and wants some."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        client(address).create_bucket(Bucket=bucket)
        yield address
    finally:
        server.stop()


def client(address: str):
    return boto3.client(
        "s3", endpoint_url=address, region_name=KEYS["AWS_DEFAULT_REGION"],
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


def keys(address: str, bucket: str) -> set[str]:
    """What the bucket holds, up to a thousand."""
    return {entry["Key"] for entry in client(address).list_objects_v2(Bucket=bucket).get("Contents", [])}


@contextlib.contextmanager
def given_to_this_process(address: str) -> Iterator[None]:
    """The S3's address and credentials in the environment, which is where Arrow looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": address}).items():
            patch.setenv(name, value)
        yield
