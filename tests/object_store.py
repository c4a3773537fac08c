"""A server that speaks S3, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import fsspec
import pytest


@contextlib.contextmanager
def serve_s3(bucket: str) -> Iterator[dict[str, str]]:
    """Serve an empty bucket; give the options with which fsspec reaches it."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
             "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        options = {"endpoint_url": f"http://{host}:{port}"}
        fsspec.filesystem("s3", **options).mkdir(bucket)
        yield options
    server.stop()
