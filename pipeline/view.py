"""The map page: in come stores, out comes a page that shows them; ``explore`` puts it into a notebook."""

import contextlib
import html
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pipeline import view_pixel, view_tiles
from pipeline.errors import ConfigError
from pipeline.view_server import MapServer
from pipeline.view_store import ViewStore

if TYPE_CHECKING:
    import pandas as pd


def serve(
    stores: Sequence[str | Path],
    *,
    port: int | None = None,
    at: str | None = None,
    browser: bool = True,
    ready: Callable[[str, bool], None],
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        stores: paths of finished stores in one CRS.
        port: as ``MapServer`` takes it.
        at: ``longitude,latitude`` to begin at.
        browser: whether to open one.
        ready: hears the address, and whether a browser took it.

    Raises:
        RequestError: for a store that cannot be shown, a taken port, or a place outside.
    """
    with MapServer(stores, port) as server:
        url = server.url + (server.mosaics.hash_of(at) if at else "")
        ready(url, browser and open_browser(url))
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


def open_browser(url: str) -> bool:
    """Open a page in a graphical browser; False where there is none."""
    shown = sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    try:
        return shown and webbrowser.open(url)
    except webbrowser.Error:
        return False


# -- in a notebook --------------------------------------------------------------------------------------------------


class Explorer:
    """The map page in a notebook, and its answers as values; see ``explore``."""

    def __init__(self, server: MapServer, height_px: int, url: str | None) -> None:
        self._server, self._height = server, height_px
        self.url = url.replace("{port}", str(server.port)) if url else _reachable(server)

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{html.escape(self.url)}" title="Map of the mosaic" '
            f'style="width:100%;height:{self._height}px;border:1px solid #8884;border-radius:8px"></iframe>'
        )

    def picture(self, layer: str = "", *, store: int = 0, period: int = -1, cut: float = 1.0) -> Image.Image:
        """The whole mosaic as one image of at most 1024 px a side, transparent where there is no data.

        Args:
            layer: ``rgb:red,green,blue`` (default: as near to true colour as the bands allow), ``index:ndvi``,
                ``source_date``, ``clear_count``, ``flags``, ``uncertainty:red``.
            store: which of the stores.
            period: index among the finished periods.
            cut: percent to cut off at either end of the stretch.

        Raises:
            ConfigError: for a layer or period that is not there.
        """
        opened = self._server.mosaics.store(str(store))
        slot = _slot(opened, period)
        shown = view_tiles.parse(layer or view_tiles.default_layer(opened), opened)
        return view_tiles.whole(opened, slot, shown, cut=cut)

    def series(self, *, lon: float, lat: float, store: int = 0, period: int = -1) -> "pd.DataFrame":
        """All looks of one pixel, read from the sources, one row each in order of time.

        Columns: ``state`` (clear, cloud, shadow, changed: marked by the temporal check, rejected: the whole
        acquisition, unread), one per band (reflectance, NaN unread), ``share`` in the composite (NaN where the method
        has none; of a learned method what the gate takes from single looks, less than one in all, and its model runs
        for some seconds); indexed by date.

        Raises:
            ConfigError: for a place outside. RunError: if no source can be read.
        """
        import pandas as pd  # the page itself starts without it

        opened = self._server.mosaics.store(str(store))
        place = view_pixel.pixel_at(opened, *self._server.mosaics.place(lon, lat))
        slot = _slot(opened, period)
        told = view_pixel.looks_at(opened, slot, *place)
        rows = [{**look, **look["values"]} for look in told["looks"]]
        if told["gated"]:
            gate = view_pixel.gated_shares(opened, slot, *place)
            absent = float("nan") if gate["said"] else 0.0  # not known is not nothing
            rows = [{**row, "share": gate["shares"].get(row["id"], absent)} for row in rows]
        table = pd.DataFrame(rows, columns=["date", "state", *opened.bands, "share"])
        table["date"] = pd.to_datetime(table["date"])
        return table.set_index("date").astype(dict.fromkeys([*opened.bands, "share"], float))

    def close(self) -> None:
        """Stop the page's server; it also ends with the notebook's kernel."""
        self._server.close()


def _slot(store: ViewStore, period: int) -> int:
    count = len(store.periods)
    if not -count <= period < count:
        raise ConfigError(
            f"period: {period} is not there; {store.path} has {count} finished periods (0 to {count - 1})"
        )
    return store.periods[period].slot


def _reachable(server: MapServer) -> str:
    """The address a notebook's browser reaches: through JupyterHub's proxy where there is a hub."""
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    return f"{prefix.rstrip('/')}/proxy/{server.port}/" if prefix else server.url


def explore(
    *, store: str | Path | Sequence[str | Path], height_px: int = 640, port: int = 0, url: str | None = None
) -> Explorer:
    """The map page of ``cloudgate view`` in a notebook cell; returns at once, the page is served from a thread.

    Args:
        store: path of a finished mosaic, or several in one CRS to compare.
        height_px: of the frame.
        port: on loopback; 0 takes a free one.
        url: where the browser reaches that port, with ``{port}`` in it, for notebooks behind a proxy that is not
            JupyterHub's.

    Returns:
        ``Explorer``: shows itself as the map; ``picture()`` and ``series(lon=, lat=)`` give the same as values;
        ``close()`` stops it.

    Raises:
        RequestError: for a store that cannot be shown, or a port that is taken.
    """
    paths = [store] if isinstance(store, str | Path) else list(store)
    return Explorer(MapServer(paths, port).start(), height_px, url)
