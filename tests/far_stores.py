"""A real S3 server on this machine, moto's, that can be killed and started again; and what lies in it."""

import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from ports import free_port

KEY, SECRET = "AKIATESTTESTTEST", "a-secret-key-of-s3-1234567890"
BUCKET = "trainings"


class S3Server:
    """The server with one bucket. It keeps all in memory: after `kill` and `start` everything there is gone."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.env = {"AWS_ENDPOINT_URL": self.uri, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        self._log = folder / "moto.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 200
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert self._process.poll() is None and time.monotonic() < end, self._log.read_text()
                time.sleep(0.05)
        self.client().create_bucket(Bucket=BUCKET)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(200)

    def client(self) -> Any:
        import boto3

        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        return boto3.client("s3", endpoint_url=self.uri, region_name="us-east-1", **keys)

    def files(self, prefix: str) -> dict[str, bytes]:
        """All objects below a prefix, by their names behind it, read by another client than dtrain's."""
        client, found = self.client(), {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
            for entry in page.get("Contents", ()):
                with suppress(client.exceptions.NoSuchKey):  # removed meanwhile
                    body = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
                    found[entry["Key"].removeprefix(f"{prefix}/")] = body
        return found
