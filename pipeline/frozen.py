"""A finished search: in comes what was found, out comes a JSON file that replays without network, and back.

The file holds no credential: hrefs are signed at read time.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.items import Item
from pipeline.profiles import MaskRule, Profile, load_profile

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        items: usable scenes, in order of time, then id.
        profile: how the catalog speaks.
        profile_ref: the name or path the profile is loaded by.
        profile_why: how it was chosen, in words.
        mask: the rule whose raster every item carries.
        dropped: (item id, why) of what matched the request but is not used.
        source: the catalog's location.
        longitude: the area's centre (degrees, unwrapped), which the solar day of all items is reckoned with.
        notes: facts the user should know.
    """

    items: list[Item]
    profile: Profile
    profile_ref: str
    profile_why: str
    mask: MaskRule
    dropped: list[tuple[str, str]]
    source: str
    longitude: float
    notes: list[str] = field(default_factory=list)


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of what the items are, whatever their order and wherever their files lie.

    Of an href only the file's name counts, so a moved folder or another port is the same input; why an offset
    was decided does not count, the offset does.
    """
    plain = []
    for item in sorted(items, key=lambda item: (item.collection, item.id)):
        data = item.to_dict()
        del data["offset_reason"]
        for asset in data["assets"].values():
            if asset["checksum"] is None:
                del asset["checksum"]
            asset["href"] = asset["href"].partition("?")[0].replace("\\", "/").rpartition("/")[2]
        plain.append(data)
    return hashlib.sha256(_canonical(plain).encode()).hexdigest()


def item_key(item: Item) -> str:
    """Short name of a scene as it was processed: a new baseline is another scene, a moved file is the same."""
    facts = [item.collection, item.id, item.datetime, item.baseline]
    return hashlib.sha256(_canonical(facts).encode()).hexdigest()[:16]


def save_items(result: SearchResult, path: Path | str) -> None:
    """Freeze a search to a JSON file that replays without network. It holds no credential.

    The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(frozen_bytes(result))
    part.replace(path)


def frozen_bytes(result: SearchResult) -> bytes:
    """A frozen search as ``save_items`` writes it."""
    data = {
        "format": "cloudgate-items",
        "version": FORMAT_VERSION,
        "profile": result.profile_ref,
        "profile_why": result.profile_why,
        "mask": result.mask.model_dump(mode="json"),
        "source": result.source,
        "longitude": result.longitude,
        "digest": digest(result.items),
        "notes": result.notes,
        "dropped": result.dropped,
        "items": [item.to_dict() for item in result.items],
    }
    return (_canonical(data, indent=1) + "\n").encode()


def load_items(path: Path | str) -> SearchResult:
    """Read a frozen search back.

    Raises:
        RequestError: if the file is absent, no frozen search, of a newer version, or was changed by hand.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"items: {path} cannot be read ({error}); freeze the search again with `cloudgate search`"
        ) from error
    return from_frozen(data, str(path))


def from_frozen(data: Any, where: str) -> SearchResult:
    """A frozen search from its JSON; ``where`` names it in messages. Raises as ``load_items``."""
    if not isinstance(data, dict) or data.get("format") != "cloudgate-items":
        raise RequestError(f"items: {where} is no frozen search; make one with `cloudgate search`")
    if data.get("version") != FORMAT_VERSION:
        raise RequestError(
            f"items: {where} has version {data.get('version')}, this cloudgate reads {FORMAT_VERSION}; freeze it again"
        )
    try:
        items = [Item.from_dict(item) for item in data["items"]]
        result = SearchResult(
            items=items,
            profile=load_profile(data["profile"]),
            profile_ref=data["profile"],
            profile_why=data["profile_why"],
            mask=MaskRule(**data["mask"]),
            dropped=[(name, why) for name, why in data["dropped"]],
            source=data["source"],
            longitude=data["longitude"],
            notes=list(data["notes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"items: {where} is damaged ({error!r}); freeze the search again") from error
    if digest(items) != data["digest"]:
        raise RequestError(
            f"items: {where} was changed after it was written (its digest differs); freeze the search again"
        )
    return result


def _canonical(data: Any, indent: int | None = None) -> str:
    return json.dumps(data, sort_keys=True, ensure_ascii=False, indent=indent)
