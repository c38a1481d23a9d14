"""What must not be told: in comes text for a message, a log, a record or a graph, out comes the same without secrets.

A secret is the value of an environment variable whose name tells so, a query string, or what stands before the ``@`` of
an address. Signatures and tokens are put into addresses where bytes are read (``pipeline.signing``) and live nowhere
else.
"""

import json
import os
import re
from typing import Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

_NAME: Final = re.compile(r"KEY|SECRET|TOKEN|PASS|HEADER|USERPWD|AUTH|CREDENTIAL|COOKIE|BEARER", re.IGNORECASE)
_PARAMETER: Final = re.compile(r"sig|token|key|pass|secret|credential|auth", re.IGNORECASE)
# Neither pattern takes a quote or a backslash, so that a line of JSON stays one.
_QUERY: Final = re.compile(r"(?<=[^\s?'\"])\?[^\s'\"\\]*=[^\s'\"\\]*")
_USER: Final = re.compile(r"(?<=://)[^/@\s'\"\\]+(?=@)")
_SHORTEST: Final = 6
"""Values of fewer characters are words (``yes``, ``basic``) that stand in any text."""


def tells_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return bool(_NAME.search(name))


def redact(text: str) -> str:
    """Text whose addresses have lost their query strings, user names and passwords."""
    return _USER.sub("", _QUERY.sub("", text))


def without_secrets(text: str) -> str:
    """Text, also a line of JSON, redacted and without the values of this process's secret variables."""
    text = redact(text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and tells_secret(name):
            text = text.replace(value, "***").replace(json.dumps(value)[1:-1], "***")
    return text


def without_credentials(href: str) -> str:
    """The same URL without user name, password and signed query; other queries stay, they name what is read."""
    if "://" not in href:
        return href
    parts = urlsplit(href)
    signed = any(_PARAMETER.search(key) for key, _ in parse_qsl(parts.query, keep_blank_values=True))
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "" if signed else parts.query, parts.fragment))
