"""Telling others: in come hooks and a JSON report, out go programs started without a shell, or posts to an address."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests

from pipeline.schedule import Hook

TRIES = 3


def call(hooks: Sequence[Hook], report: Mapping[str, Any]) -> list[str]:
    """Call hooks one after another; a hook that fails harms nothing.

    Args:
        hooks: what to call.
        report: JSON values; standard input of a command, body of a post.

    Returns:
        One line per hook that failed; an address is named by its host only, since it may hold a secret.
    """
    body = json.dumps(report, default=str).encode()
    faults = []
    for hook in hooks:
        fault = _run(hook, body) if hook.command else _post(hook, body)
        if fault:
            faults.append(fault)
    return faults


def _run(hook: Hook, body: bytes) -> str | None:
    assert hook.command
    name = f"hook {hook.command[0]}"
    try:
        done = subprocess.run(list(hook.command), input=body, capture_output=True, timeout=hook.timeout_s, check=False)
    except OSError as error:
        return f"{name}: cannot be started: {error}; give a program that exists, as a list of arguments"
    except subprocess.TimeoutExpired:
        return f"{name}: took longer than {hook.timeout_s:g} s and was ended; raise timeout_s"
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"{name}: exit {done.returncode}" + (f": {said[-1][:200]}" if said else "")
    return None


def _post(hook: Hook, body: bytes) -> str | None:
    assert hook.webhook
    name = f"hook to {urlsplit(hook.webhook).hostname}"
    fault = ""
    for _ in range(TRIES):
        try:
            answer = requests.post(
                hook.webhook,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=hook.timeout_s,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            fault = type(error).__name__  # its text holds the address
            continue
        if answer.status_code < 300:
            return None
        fault = f"status {answer.status_code}"
        if answer.status_code < 500 and answer.status_code != 429:
            break
    return f"{name}: {fault}"
