"""The far side of a mirror, any place that fsspec reaches: files there are whole or absent, and read back once."""

import contextlib
import errno
import hashlib
import io
import posixpath
import re
import socket
import uuid
from collections.abc import Iterable
from typing import IO, Any

import fsspec
from fsspec.registry import known_implementations

from dtrain.tracking.secrets import redact

_BLOCK_BYTES = 32 * 2**20  # of a file on its way: the parts of S3, of which there are at most 10,000
_STORES_OF_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "adl", "az"}  # whose files are there once closed
_SECONDS = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": _SECONDS}, "s3a": {"config_kwargs": _SECONDS}, "file": {"auto_mkdir": True},
}  # fmt: skip
_EXTRAS = {"s3": "mirror", "s3a": "mirror", "gs": "gcs", "gcs": "gcs"}  # of dtrain
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}-")
_WHO = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role say who you are",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`, says who you are",
}
_REFUSED = re.compile(r"credential|access.?denied|forbidden|signature|invalid.?(access|token|bucket)|\b40[13]\b", re.I)


class MirrorError(Exception):
    """What is wrong with a mirror, in one line; a mistake of the user's, or a store that does not answer."""

    def __init__(self, text: str, is_mistake: bool) -> None:
        super().__init__(text)
        self.is_mistake = is_mistake


class MirrorStore:
    """The files under one address. Names are relative to it, with slashes.

    Raises MirrorError where fsspec knows no such scheme, or its package is missing.
    """

    def __init__(self, address: str) -> None:
        scheme, sign, _ = address.partition("://")
        self.scheme = scheme if sign else "file"
        try:
            self._files, root = fsspec.url_to_fs(
                address, use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(self.scheme, {})
            )
        except (ImportError, ValueError) as error:
            raise MirrorError(_why_not_usable(self.scheme, error), is_mistake=True) from error
        self._root = str(root).rstrip("/")
        self._has_objects = self.scheme in _STORES_OF_OBJECTS

    def sizes(self) -> dict[str, int]:
        """All files by name, in bytes, but for those that are being written."""
        return {name: size for name, size in self._all_sizes().items() if not _is_temporary(name)}

    def _all_sizes(self) -> dict[str, int]:
        return {name[len(self._root) + 1 :]: int(info["size"] or 0) for name, info in self._all().items()}

    def _all(self) -> dict[str, dict[str, Any]]:
        try:
            return dict(self._files.find(self._root, detail=True))
        except FileNotFoundError:
            if self.scheme == "file":
                return {}
            raise

    def read(self, name: str) -> bytes:
        """A small file's contents; b'' where it is not there."""
        try:
            return bytes(self._files.cat_file(self._at(name)))
        except FileNotFoundError:
            return b""

    def download(self, name: str, to: IO[bytes]) -> None:
        """Copy a file of any size here."""
        with self._files.open(self._at(name), "rb") as source:
            while part := source.read(_BLOCK_BYTES):
                to.write(part)

    def upload(self, name: str, source: IO[bytes], size: int) -> str:
        """Copy the first `size` bytes of a file there, and compare what is read back with them; returns their SHA-256.

        The file is there when it is whole. OSError: the source is shorter, or what was read back differs.
        """
        target = self._at(name)
        place = target if self._has_objects else f"{posixpath.dirname(target)}/{_temporary(target)}"
        if not self._has_objects:
            self._files.makedirs(posixpath.dirname(target), exist_ok=True)
        sent = self._write(place, source, size)
        if self._digest(place) != sent:
            with contextlib.suppress(Exception):
                self._files.rm_file(place)
            raise OSError(errno.EIO, "what was read back after the upload is not what was sent", name)
        if place != target:
            self._files.mv(place, target)
        return sent

    def _write(self, place: str, source: IO[bytes], size: int) -> str:
        digest, left = hashlib.sha256(), size
        far = self._files.open(place, "wb", block_size=_BLOCK_BYTES)
        try:
            while left:
                if not (part := source.read(min(left, _BLOCK_BYTES))):
                    raise OSError(errno.EIO, "became shorter during its upload", getattr(source, "name", place))
                digest.update(part)
                far.write(part)
                left -= len(part)
            far.close()
        except BaseException:
            self._discard(place, far)
            raise
        return digest.hexdigest()

    def _discard(self, place: str, far: Any) -> None:
        """Leave nothing of a file that was not written to its end: to close it would make it one."""
        with contextlib.suppress(Exception):
            if self._has_objects:
                far.discard()
                far.closed = True
            else:
                far.close()
                self._files.rm_file(place)

    def _digest(self, place: str) -> str:
        digest = hashlib.sha256()
        with self._files.open(place, "rb") as source:
            while part := source.read(_BLOCK_BYTES):
                digest.update(part)
        return digest.hexdigest()

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, in this order where several are named, and folders that become empty by it."""
        names = list(names)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))
        if not self._has_objects:
            for folder in sorted({posixpath.dirname(name) for name in names} - {""}, key=len, reverse=True):
                with contextlib.suppress(OSError):
                    self._files.rmdir(self._at(folder))

    def probe(self) -> None:
        """Write, read and remove a small file."""
        name = f".dtrain-{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self.upload(name, io.BytesIO(b"dtrain"), 6)
        self.remove([name])

    def forget_uploads(self) -> None:
        """Clear away what a process that was killed had begun to write; by who writes the mirror alone.

        Of S3 these are uploads in parts: it keeps, and charges for, the parts.
        """
        if not self._has_objects:
            self.remove(name for name in self._all_sizes() if _is_temporary(name))
        if self.scheme not in ("s3", "s3a"):
            return
        bucket, _, prefix = self._root.partition("/")
        with contextlib.suppress(Exception):  # not everybody may list them
            for begun in self._files.list_multipart_uploads(bucket):
                if begun["Key"].startswith(f"{prefix}/" if prefix else ""):
                    self._files.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"]
                    )

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def error(self, error: BaseException) -> MirrorError:
        """What an error of the store means, with what may help."""
        if isinstance(error, MirrorError):
            return error
        text = " ".join(str(error).split()) or type(error).__name__
        causes = [error, error.__cause__, error.__context__]
        if any(
            isinstance(cause, PermissionError) or _REFUSED.search(_without_names(cause)) for cause in causes if cause
        ):
            cure = _WHO.get({"s3a": "s3", "gcs": "gs"}.get(self.scheme, self.scheme))
            return MirrorError(f"{redact(text)}{f'; {cure}' if cure else ''}", is_mistake=True)
        if isinstance(error, FileNotFoundError | NotADirectoryError | FileExistsError):
            what = f"bucket {self._root.partition('/')[0]!r}: " if self._has_objects else ""
            return MirrorError(f"{what}{redact(text)}", is_mistake=True)
        if isinstance(error, NotImplementedError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            return MirrorError(f"cannot be written: {redact(text)}", is_mistake=True)
        return MirrorError(redact(text), is_mistake=False)


def _is_temporary(name: str) -> bool:
    return _TEMPORARY.match(posixpath.basename(name)) is not None


def _without_names(error: BaseException) -> str:
    """An error's text without addresses and paths: a bucket may be called `signatures`, and a port may be 9401."""
    return re.sub(r"\S*/\S*", "", str(error))


def _temporary(target: str) -> str:
    return f".{uuid.uuid4().hex[:12]}-{posixpath.basename(target)}"


def _why_not_usable(scheme: str, error: BaseException) -> str:
    if scheme not in known_implementations:
        return f"{scheme!r} is not a scheme of fsspec's"
    if isinstance(error, ImportError):
        extra = (
            f"pip install 'dtrain[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else known_implementations[scheme]["err"]
        )
        return f"{scheme}:// needs a package that is not installed ({error}): {extra}"
    return redact(str(error))
