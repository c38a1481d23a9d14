"""Read access, at read time: in comes an unsigned href and a catalog's ``Auth``, out comes the href to open.

Tokens live in this module's memory only: never in an item, a Dask graph, a log or a store. A Planetary Computer token
lasts about 45 minutes, so it is fetched where the bytes are read, per storage account and container, and renewed when
less than a minute is left. Secrets come from the environment.
"""

import os
import random
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import urlsplit

import requests

from pipeline.errors import ReadError
from pipeline.profiles import Auth

RENEW_S: Final = 60.0
"""A token with less than this left is renewed (the Planetary Computer SDK's own rule), plus a jitter of as much."""
TIMEOUT_S: Final = (10.0, 30.0)
TRIES: Final = 4
_BLOB_HOST: Final = re.compile(r"^([a-z0-9]+)\.blob\.core\.windows\.net$")


@dataclass(frozen=True)
class _Token:
    query: str
    renew_at: float  # time.time() from which it is renewed


class _Tokens:
    """Tokens by address of the token service; one fetch at a time for each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._known: dict[str, _Token] = {}

    def get(self, url: str, *, stale: str | None) -> str:
        """A token; a new one if the known one ends soon or is the ``stale`` one that a server refused."""
        with self._lock:
            gate = self._fetching.setdefault(url, threading.Lock())
        with gate:
            token = self._known.get(url)
            if token is None or time.time() >= token.renew_at or token.query == stale:
                token = self._known[url] = _fetch(url)
            return token.query

    def clear(self) -> None:
        with self._lock:
            self._known.clear()


_tokens = _Tokens()


def forget_tokens() -> None:
    """Forget every token of this process."""
    _tokens.clear()


def _fetch(url: str) -> _Token:
    key = os.environ.get("PC_SDK_SUBSCRIPTION_KEY")
    headers = {"Ocp-Apim-Subscription-Key": key} if key else {}
    problem, transient = "", True
    for attempt in range(TRIES):
        if attempt:
            time.sleep(0.5 * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311 - a jitter
        try:
            answer = requests.get(url, headers=headers, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            problem = type(error).__name__
            continue
        if answer.status_code == 200:
            return _parse(url, answer)
        problem, transient = (
            f"HTTP {answer.status_code}",
            answer.status_code in (408, 429) or answer.status_code >= 500,
        )
        if not transient:
            break
    raise ReadError(
        f"token service {url}: {problem}; check the network, or set PC_SDK_SUBSCRIPTION_KEY if the collection "
        "needs a key",
        transient=transient,
    )


def _parse(url: str, answer: requests.Response) -> _Token:
    try:
        data = answer.json()
        ends = datetime.fromisoformat(str(data["msft:expiry"]))
        query = str(data["token"]).lstrip("?")
    except (ValueError, KeyError, TypeError) as error:
        raise ReadError(
            f"token service {url}: the answer holds no token and msft:expiry; check auth.token_url"
        ) from error
    ends = ends if ends.tzinfo else ends.replace(tzinfo=UTC)
    return _Token(query, ends.timestamp() - RENEW_S * random.uniform(1.0, 2.0))  # noqa: S311 - a jitter


def _token_url(href: str, auth: Auth) -> str | None:
    """Where to fetch the token for a blob, None for an href that needs none (other hosts, signed already)."""
    if auth.kind != "planetary-computer" or not auth.token_url:
        return None
    parts = urlsplit(href)
    host = _BLOB_HOST.match(parts.hostname or "")
    container = parts.path.lstrip("/").split("/", 1)[0]
    if not host or not container or "sig=" in parts.query:
        return None
    return auth.token_url.format(account=host.group(1), container=container)


def sign(href: str, auth: Auth, *, refused: str | None = None) -> str:
    """The href to open now.

    Args:
        href: unsigned location.
        auth: how the catalog lets reads in.
        refused: what this function gave before and the server answered with 403; its token is renewed, once for all
            threads that hold the same one.

    Raises:
        ReadError: if the token service does not answer.
    """
    url = _token_url(href, auth)
    if url is None:
        return href
    mark = "&" if "?" in href else "?"
    stale = refused[len(href) + 1 :] if refused and refused.startswith(href + mark) else None
    return f"{href}{mark}{_tokens.get(url, stale=stale)}"


def auth_settings(auth: Auth) -> dict[str, str]:
    """GDAL settings that let reads in; secrets are taken from the environment of this process.

    ``earthdata``: a bearer token from ``EARTHDATA_TOKEN``, else ``~/.netrc`` (or ``NETRC``) with a cookie jar kept in
    memory. ``s3-keys``: GDAL takes ``AWS_*`` from the environment itself. ``unsigned-s3``: no signature.
    """
    if auth.kind == "unsigned-s3":
        return {"AWS_NO_SIGN_REQUEST": "YES"}
    if auth.kind != "earthdata":
        return {}
    token = os.environ.get("EARTHDATA_TOKEN")
    if token:
        return {"GDAL_HTTP_HEADERS": f"Authorization: Bearer {token}"}
    settings = {"GDAL_HTTP_NETRC": "YES", "GDAL_HTTP_COOKIEFILE": ""}
    netrc = os.environ.get("NETRC")
    return {**settings, "GDAL_HTTP_NETRC_FILE": netrc} if netrc else settings
