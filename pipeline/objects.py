"""Small objects by name, on disk or in a bucket: in come bytes and a name, out come bytes; whole or not at all.

Run records, the lock and the ledger of a store live in such a folder, ``<store>.run``. ``swap`` is compare-and-swap
(exclusive create and If-Match), so two writers never overwrite each other unseen. Buckets are spoken to with obstore
(extra ``s3``): it knows conditional writes, retries and time-outs by itself, and zarr uses the same library.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

from pipeline.errors import ConfigError, StoreError

TIMEOUT: Final = timedelta(seconds=60)
"""One request to an object store."""
RETRY_TIMEOUT: Final = timedelta(minutes=2)
"""All tries of one request to an object store: a server that restarts is waited for so long."""


class Objects(Protocol):
    """A folder of small objects.

    ``where`` names it in messages. Every method raises ``StoreError`` where the place cannot be reached, is full or is
    not ours to write.
    """

    where: str

    def get(self, name: str) -> tuple[bytes, str] | None:
        """An object's bytes and its version tag, None where there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Write an object whole: readers see the old one or the new one."""

    def swap(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Write only if the object still has ``tag`` (None: is absent); the new tag, or None if it was changed."""

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with ``prefix``, sorted; part files of killed writers are not among them."""

    def remove(self, name: str) -> None:
        """Remove an object; harmless where there is none."""

    def clear(self, prefix: str) -> None:
        """Remove all whose names begin with ``prefix``, part files too."""


def in_bucket(where: str) -> bool:
    """Whether a place lies in a bucket, not on disk.

    Raises:
        ConfigError: for another kind of URL.
    """
    scheme, separator, _ = where.partition("://")
    if separator and scheme != "s3":
        raise ConfigError(
            f"output.store: {scheme}:// is no kind of store; write a path, s3://BUCKET/NAME.zarr, icechunk:PATH or "
            "icechunk:s3://BUCKET/NAME"
        )
    return bool(separator)


def objects_at(where: str) -> Objects:
    """The folder of objects at a path or at ``s3://bucket/prefix``."""
    return BucketObjects(where) if in_bucket(where) else FileObjects(Path(where))


class FileObjects:
    """Files of one folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)

    def get(self, name: str) -> tuple[bytes, str] | None:
        """See ``Objects``; the tag is a digest of the bytes."""
        try:
            data = (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise store_error(f"read {self.path / name}", error) from error
        return data, _tag(data)

    def put(self, name: str, data: bytes) -> None:
        """See ``Objects``."""
        write_whole(self.path / name, data)

    def swap(self, name: str, data: bytes, tag: str | None) -> str | None:
        """See ``Objects``; writers on this machine take turns."""
        with self._turn():
            now = self.get(name)
            if (now[1] if now else None) != tag:
                return None
            self.put(name, data)
        return _tag(data)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path / ".turn", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise store_error(f"write in {self.path}", error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def names(self, prefix: str = "") -> list[str]:
        """See ``Objects``."""
        folder = self.path / prefix.rpartition("/")[0]
        found = (p.relative_to(self.path).as_posix() for p in folder.rglob("*") if p.is_file())
        return sorted(n for n in found if n.startswith(prefix) and not n.endswith(".partial") and n != ".turn")

    def remove(self, name: str) -> None:
        """See ``Objects``."""
        with suppress(FileNotFoundError, NotADirectoryError):
            (self.path / name).unlink()

    def clear(self, prefix: str) -> None:
        """See ``Objects``."""
        for path in sorted(self.path.glob(prefix.removesuffix("/") + ("" if prefix.endswith("/") else "*"))):
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise store_error(f"remove {path}", error) from error


class BucketObjects:
    """Objects under a prefix of a bucket; the tag is the object's ETag."""

    def __init__(self, url: str) -> None:
        self.where, self._store = url, s3_store(url)

    def get(self, name: str) -> tuple[bytes, str] | None:
        """See ``Objects``."""
        try:
            answer = self._store.get(name)
            return bytes(answer.bytes()), str(answer.meta["e_tag"])
        except FileNotFoundError:
            return None
        except store_faults() as error:
            raise store_error(f"read {self.where}/{name}", error) from error

    def put(self, name: str, data: bytes) -> None:
        """See ``Objects``."""
        try:
            self._store.put(name, data)
        except store_faults() as error:
            raise store_error(f"write {self.where}/{name}", error) from error

    def swap(self, name: str, data: bytes, tag: str | None) -> str | None:
        """See ``Objects``."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            answer = self._store.put(name, data, mode="create" if tag is None else {"e_tag": tag})
        except (AlreadyExistsError, PreconditionError):
            return None
        except FileNotFoundError as error:
            if tag is None:  # a new object is refused so only where there is no bucket
                raise store_error(f"write {self.where}/{name}", error) from error
            return None
        except store_faults() as error:
            raise store_error(f"write {self.where}/{name}", error) from error
        return str(answer["e_tag"])

    def names(self, prefix: str = "") -> list[str]:
        """See ``Objects``."""
        try:
            # Listing goes by whole folders; the rest of the prefix is ours to match.
            found = [meta["path"] for page in self._store.list(prefix.rpartition("/")[0] or None) for meta in page]
        except store_faults() as error:
            raise store_error(f"list {self.where}", error) from error
        return sorted(name for name in found if name.startswith(prefix))

    def remove(self, name: str) -> None:
        """See ``Objects``."""
        try:
            self._store.delete(name)
        except FileNotFoundError:
            return
        except store_faults() as error:
            raise store_error(f"remove {self.where}/{name}", error) from error

    def clear(self, prefix: str) -> None:
        """See ``Objects``."""
        if not (names := self.names(prefix)):
            return
        try:
            self._store.delete(names)  # by the thousand
        except store_faults() as error:
            raise store_error(f"remove {self.where}/{prefix}", error) from error


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part.

    Raises:
        StoreError: disk full or no permission.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise store_error(f"write {path}", error) from error


# -- buckets ----------------------------------------------------------------------------------------------------


def need(extra: str, error: ImportError) -> ConfigError:
    """What to say where an optional library is not installed."""
    return ConfigError(f"{error.name} is not installed; install it with: pip install 'cloudgate[{extra}]'")


@lru_cache(maxsize=64)
def s3_store(url: str) -> Any:
    """An ``obstore.store.S3Store`` for ``s3://bucket/prefix``.

    Credentials come from this process's environment, a profile (``AWS_PROFILE``) or the machine's role, as boto3 finds
    them; the endpoint from ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or the profile. Nothing of it travels.

    Raises:
        ConfigError: extra ``s3`` is not installed, or no bucket is named. StoreError: no credentials are found.
    """
    try:
        import botocore.session
        from obstore.auth.boto3 import Boto3CredentialProvider
        from obstore.store import S3Store
    except ImportError as error:
        raise need("s3", error) from error
    bucket, prefix = split_s3(url)
    endpoint, region = s3_place()
    unsigned = s3_unsigned()
    provider = None
    if not unsigned:
        try:
            provider = Boto3CredentialProvider(botocore.session.get_session())
        except ValueError as error:
            raise _no_credentials(url) from error
    more: dict[str, Any] = {"endpoint": endpoint} if endpoint else {"virtual_hosted_style_request": True}
    return S3Store(
        bucket,
        prefix=prefix,
        region=region,
        skip_signature=unsigned,
        credential_provider=provider,
        client_options={"allow_http": True, "timeout": TIMEOUT, "connect_timeout": timedelta(seconds=10)},
        retry_config={"max_retries": 12, "retry_timeout": RETRY_TIMEOUT},
        **more,
    )


def split_s3(url: str) -> tuple[str, str]:
    """(bucket, prefix) of ``s3://bucket/prefix``.

    Raises:
        ConfigError: without either, or where the bucket's name holds more than a name (it is not repeated: such a URL
            may hold a password).
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if re.search(r"[^\w.-]", bucket):
        raise ConfigError("output.store: the name of the bucket holds other signs than letters, digits, . _ and -")
    if not bucket or not prefix.strip("/"):
        raise ConfigError(f"output.store: {url} needs a bucket and a name: s3://BUCKET/NAME.zarr")
    return bucket, prefix.strip("/")


def s3_unsigned() -> bool:
    """Whether requests are not to be signed."""
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1")


def s3_keys() -> tuple[str, str, str | None]:
    """This process's (access key, secret, session token) as they are now.

    Raises:
        ConfigError: extra ``s3`` is not installed. StoreError: no credentials are found.
    """
    try:
        import botocore.session
    except ImportError as error:
        raise need("s3", error) from error
    found = botocore.session.get_session().get_credentials()
    if found is None:
        raise _no_credentials("s3")
    keys = found.get_frozen_credentials()
    return keys.access_key, keys.secret_key, keys.token


def _no_credentials(where: str) -> StoreError:
    return StoreError(
        f"{where}: no credentials are found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    )


def s3_place() -> tuple[str | None, str]:
    """(endpoint, None for Amazon's own; region) from the environment or the profile."""
    try:
        import botocore.session
    except ImportError as error:
        raise need("s3", error) from error
    session = botocore.session.get_session()
    try:
        profile = session.get_scoped_config()
    except Exception as error:
        raise ConfigError(f"AWS_PROFILE: {error}; name a profile that exists, or unset it") from error
    named = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = next((os.environ[n] for n in named if os.environ.get(n)), None) or profile.get("endpoint_url")
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    return endpoint, region


def store_faults() -> tuple[type[BaseException], ...]:
    """What the store libraries raise when a place cannot be read or written."""
    faults: list[type[BaseException]] = [OSError]
    with suppress(ImportError):
        from obstore.exceptions import BaseError

        faults.append(BaseError)
    with suppress(ImportError):
        from icechunk import IcechunkError

        faults.append(IcechunkError)
    return tuple(faults)


@contextmanager
def telling(doing: str) -> Iterator[None]:
    """Any fault of a store within the block as one clear sentence.

    Raises:
        StoreError: see ``store_error``.
    """
    try:
        yield
    except store_faults() as error:
        raise store_error(doing, error) from error


def store_error(doing: str, error: BaseException) -> StoreError:
    """One clear sentence for any fault of a store: what, why, the way out."""
    said = f"{type(error).__name__}: {error}"
    # The first paragraph: what follows is the library's own call stack.
    plain = " ".join(str(error).partition("\n\n")[0].split())[:300] or type(error).__name__
    words = said.lower()
    if any(sign in words for sign in ("permissiondenied", "unauthenticated", "accessdenied", "forbidden", " 403")):
        way = "the credentials do not allow it; check AWS_ACCESS_KEY_ID, AWS_PROFILE and the bucket's policy"
    elif "nosuchbucket" in words:
        way = "there is no such bucket; create it, or check the name and AWS_ENDPOINT_URL"
    elif isinstance(error, OSError):
        way = "free space or check permissions"
    else:
        way = "check that the store can be reached (AWS_ENDPOINT_URL)"
    return StoreError(
        f"cannot {doing}: {plain}; {way}, then run the same command again: it goes on after the last finished shard"
    )
