"""Files of object stores and web servers, through fsspec: listing, and reading that tries again.

Credentials are never part of a recipe: every store's library finds them by itself (environment,
its own files, the machine's role). A transfer that breaks is taken up again at the byte where it
broke; what fails several times in a row without a byte in between stops the run, and the file is
named.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import AfterValidator

from puna.core.errors import PunaError, explain_environment_error
from puna.core.progress import say

T = TypeVar("T")

ATTEMPTS = 6
"""Failures in a row after which a transfer is given up (ours)."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_BUFFER_BYTES = 1 << 20
_WEB_BLOCK_BYTES, _LEAST_BLOCK_BYTES = 4 << 20, 1 << 14
_EXTRAS = {
    "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"),
    "hf": ("huggingface_hub", "hf"), "http": ("aiohttp", "http"), "https": ("aiohttp", "http"),
}  # fmt: skip
WEB = ("http://", "https://")
_SECRET_WORDS = ("key", "secret", "token", "password", "credential", "authorization", "cookie")
_NO_SECRETS = (None, "", "anon", "cloud", "google_default", False, True)
_PASSING_STATUSES = (408, 425, 429)
_LIBRARIES = ("aiohttp", "botocore", "gcsfs", "google", "httpcore", "httpx", "requests", "urllib3")
_STAMP_KEYS = (
    "ETag", "etag", "blob_id", "LastModified", "last_modified", "Last-Modified", "mtime", "updated",
)  # fmt: skip


def is_remote(location: str) -> bool:
    """Tell whether a path is a URL."""
    return "://" in location


def refuse_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Return storage options, none of which may hold a secret: they are recorded with the run.

    Raises:
        ValueError: The name of an option, at any depth, tells that it does.
    """
    for name, value in options.items():
        if isinstance(value, dict):
            refuse_secrets(value)
        elif value not in _NO_SECRETS and any(word in name.lower() for word in _SECRET_WORDS):
            raise ValueError(
                f"{name!r} is a secret, and the recipe is recorded with the run; give it to the "
                "store's library (AWS_ACCESS_KEY_ID, HF_TOKEN, GOOGLE_APPLICATION_CREDENTIALS, "
                "~/.aws/credentials, ~/.netrc ...)"
            )
    return options


StorageOptions = Annotated[dict[str, Any], AfterValidator(refuse_secrets)]
"""Options of a store that hold no secret."""


def open_store(location: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it.

    Raises:
        PunaError: The store is unknown, or its package is not installed.
    """
    import fsspec

    protocol = location.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        package, extra = _EXTRAS.get(protocol, ("", ""))
        if package:
            raise PunaError(f"{location}: {protocol}:// needs the package {package}",
                            f"pip install 'puna[{extra}]'") from error  # fmt: skip
        raise PunaError(f"{location}: {error}", "install the package of that store") from error
    except (ValueError, TypeError) as error:
        fix = "check the URL and `storage_options` of this source"
        raise PunaError(f"{location}: {error}", fix) from error


def list_remote(location: str, options: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Yield URL, size and stamp of a file, or of all files below a folder, ordered by URL.

    A web server has no folders: a URL that ends in ``/`` is a page whose links are the files.

    Raises:
        PunaError: The store cannot be read.
    """
    fs, inner = open_store(location, options)
    protocol = location.partition("://")[0]

    def find() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        if location.startswith(WEB) and not location.endswith("/"):
            return {inner: fs.info(inner)}
        found = fs.find(inner, detail=True)
        found = {name: info or fs.info(name) for name, info in found.items()}
        return {name: info for name, info in found.items() if info.get("type") != "directory"}

    try:
        found = retrying(find, location)
    except FileNotFoundError:
        return
    for name, info in sorted(found.items()):
        stamp = next((str(info[key]) for key in _STAMP_KEYS if info.get(key)), "")
        if protocol == "file":
            url = f"file://{name}"
        else:
            url = name if "://" in name else f"{protocol}://{name.lstrip('/')}"
        yield url, int(info.get("size") or 0), stamp


def open_remote(location: str, options: dict[str, Any]) -> BinaryIO:
    """Open a URL for reading; the file can be sought in, whatever the store.

    Raises:
        PunaError: The file is gone or may not be read, or the store cannot be reached.
    """
    fs, inner = open_store(location, options)
    return io.BufferedReader(_RemoteFile(fs, inner, location), _BUFFER_BYTES)


def retrying(action: Callable[[], T], location: str) -> T:
    """Do something with a store; when it fails for reasons that may pass, wait and try again.

    Args:
        action: What to do.
        location: Named in messages.

    Raises:
        PunaError: It failed too often, or for a reason that does not pass.
        FileNotFoundError: There is no such file.
    """
    failures = 0
    while True:
        try:
            return action()
        except PunaError:
            raise
        except Exception as found:  # every store's library has classes of its own
            error = _reason(found)
            if isinstance(error, FileNotFoundError):
                raise error from found
            failures += 1
            if failures >= ATTEMPTS or not may_pass(error):
                raise _given_up(error, location, failures) from error
            pause_s = min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S)
            say(f"  {location}: {error!r}; trying again in {pause_s:g} s")
            time.sleep(pause_s)


def _reason(error: Exception) -> Exception:
    """Return what a "not found" stands for: fsspec says so of every failure of a web server."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return error if getattr(cause, "status", None) in (404, 410) else cause
    return error


def may_pass(error: Exception) -> bool:
    """Tell whether trying again may help: broken connections, busy servers, not refusals."""
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    status = getattr(error, "status", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING_STATUSES
    if explain_environment_error(error) is not None or "Credentials" in type(error).__name__:
        return False
    root = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | EOFError) or root in _LIBRARIES


def _given_up(error: Exception, location: str, failures: int) -> PunaError:
    explained = explain_environment_error(error, location)
    if explained is not None:
        return explained
    tries = f" ({failures} attempts)" if failures > 1 else ""
    return PunaError(
        f"{location}: {error!r}{tries}",
        "check the URL, the connection and the credentials in the environment, then run again: "
        "what is finished is kept",
    )


class _RemoteFile(io.RawIOBase):
    """A file of a store that goes on where a transfer broke.

    A web server that cannot send a part of a file is read from the start, and from a local copy
    as soon as something seeks.
    """

    def __init__(self, fs: Any, path: str, location: str) -> None:
        super().__init__()
        self._fs, self._path, self._location = fs, path, location
        self._at = 0
        self._file: Any | None = None
        self._is_stream = False
        self._block_bytes = _WEB_BLOCK_BYTES
        self._copy: BinaryIO | None = None
        self._size: int | None = None
        self._stamp: str | None = None
        retrying(self._open, location)

    def _open(self) -> Any:
        """Open the file at the place where reading goes on, and return it.

        Raises:
            PunaError: It is not the file any more that it was.
        """
        self._drop()
        info = self._fs.info(self._path)
        size = info.get("size")
        stamp = next((str(info[key]) for key in _STAMP_KEYS if info.get(key)), "")
        if self._stamp is not None and (size, stamp) != (self._size, self._stamp):
            raise PunaError(f"{self._location} was changed while it was read",
                            "run again when nothing writes to it")  # fmt: skip
        self._size, self._stamp = size, stamp
        self._file = file = self._fs.open(self._path, "rb", **self._how())
        if not self._is_stream:
            file.seek(self._at)
        to_skip = self._at if self._is_stream else 0
        while to_skip:
            skipped = len(file.read(min(to_skip, _BUFFER_BYTES)))
            if not skipped:
                raise EOFError("the transfer ended too early")
            to_skip -= skipped
        return file

    def _how(self) -> dict[str, Any]:
        """Return options of opening: how much is asked for at once."""
        if not self._location.startswith(WEB):
            return {}
        self._is_stream = self._is_stream or not self._size
        # A server may be allowed to compress on the way, and then its sizes are wrong.
        headers = {**self._fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        return {"block_size": 0 if self._is_stream else self._block_bytes, "headers": headers}

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, n_bytes: int) -> bytes:
        try:
            file = self._file if self._file is not None else self._open()
            data = file.read(min(n_bytes, self._block_bytes))
            if not data and self._size is not None and self._at < self._size:
                raise EOFError(f"the transfer ended at byte {self._at:,} of {self._size:,}")
        except ValueError as error:
            if self._is_stream or not self._location.startswith(WEB):
                raise
            self._drop()
            self._is_stream = True  # fsspec: "the server doesn't support range requests"
            raise EOFError("the server cannot send a part of the file") from error
        except Exception:
            self._drop()
            self._block_bytes = max(_LEAST_BLOCK_BYTES, self._block_bytes // 4)
            raise
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size."""
        if self._copy is not None:
            return self._copy.readinto(buffer)  # type: ignore[attr-defined]
        try:
            data = retrying(lambda: self._read(len(buffer)), self._location)
        except FileNotFoundError as error:
            raise _given_up(error, self._location, 1) from error
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def tell(self) -> int:
        """Return the place in the file."""
        return self._at if self._copy is None else self._copy.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the file."""
        if self._copy is None and whence != io.SEEK_END:
            target = offset + (self._at if whence == io.SEEK_CUR else 0)
            if target == self._at:
                return target
        if self._copy is None and (self._is_stream or self._size is None):
            self._make_copy()
        if self._copy is not None:
            return self._copy.seek(offset, whence)
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        self._at = max(0, start + offset)
        if self._file is not None:
            self._file.seek(self._at)
        return self._at

    def _make_copy(self) -> None:
        """Bring the whole file here."""
        place = self._at
        self._at = 0
        self._drop()
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the file
        try:
            while data := retrying(lambda: self._read(_BUFFER_BYTES), self._location):
                copy.write(data)
        except OSError as error:
            copy.close()
            raise _given_up(error, self._location, 1) from error
        self._drop()
        copy.seek(place)
        self._copy = copy

    def close(self) -> None:
        """Close the file and its copy."""
        if not self.closed:
            self._drop()
            if self._copy is not None:
                self._copy.close()
        super().close()
