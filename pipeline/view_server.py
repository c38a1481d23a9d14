"""The map page's server: in come stores, out come a hand-written page (``pipeline/page``), tiles and a pixel's looks.

Nothing is fetched from elsewhere, and nothing but this machine is listened to.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from pyproj import CRS, Transformer
from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler, StaticFileHandler

from pipeline import view_pixel, view_tiles
from pipeline.errors import CloudgateError, ConfigError, RequestError
from pipeline.redaction import without_secrets
from pipeline.view_store import ViewStore

LOOPBACK: Final = "127.0.0.1"
PORT: Final = 8765
PAGE: Final = Path(__file__).with_name("page")
NODES: Final = 33
"""Longitudes and latitudes are handed to the page on so many nodes a side; between them it interpolates."""
DRAWING_THREADS: Final = 4
POLICY: Final = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"


class Mosaics:
    """The stores of one page, all in one CRS.

    Raises:
        RequestError: for a store that cannot be shown, or stores in different CRS.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise ConfigError("store: give at least one; `cloudgate demo` makes one to try")
        self.stores = [ViewStore(path) for path in paths]
        first = self.stores[0]
        for other in self.stores[1:]:
            if CRS.from_user_input(other.grid.crs) != CRS.from_user_input(first.grid.crs):
                raise ConfigError(
                    f"store: {other.path} is in {other.grid.crs[:20]} and {first.path} in {first.grid.crs[:20]}; one "
                    "map shows one CRS, so look at them in two pages"
                )
        self._to_lonlat = Transformer.from_crs(first.grid.crs, "EPSG:4326", always_xy=True)
        lefts, bottoms, rights, tops = zip(*(store.grid.bounds for store in self.stores), strict=True)
        self.bounds = (min(lefts), min(bottoms), max(rights), max(tops))

    def store(self, number: str) -> ViewStore:
        """A store by its place in the list."""
        if not number.isdigit() or int(number) >= len(self.stores):
            raise ConfigError(f"store: there is no number {number}, the page shows {len(self.stores)}")
        return self.stores[int(number)]

    def refresh(self) -> None:
        """Open stores again that were written since, so that a reload of the page shows what is new."""
        for number, store in enumerate(self.stores):
            if store.changed():
                self.stores[number] = ViewStore(store.path)

    def facts(self) -> dict[str, Any]:
        """Everything the page must know to begin with."""
        self.refresh()
        return {
            "crs": self.stores[0].grid.crs if len(self.stores[0].grid.crs) < 20 else "own CRS",
            "bounds": self.bounds,
            "lonlat": self._nodes(),
            "stores": [self._facts(number, store) for number, store in enumerate(self.stores)],
        }

    def _facts(self, number: int, store: ViewStore) -> dict[str, Any]:
        return {
            "id": number,
            "title": store.title,
            "name": store.name,
            "bounds": store.grid.bounds,
            "resolution_m": store.grid.resolution_m,
            "shape": store.grid.shape,
            "levels": store.levels,
            "bands": store.bands,
            "token": store.token,
            "notes": store.notes,
            **view_tiles.choices(store),
            "periods": [period.__dict__ for period in store.periods],
        }

    def _nodes(self) -> dict[str, Any]:
        left, bottom, right, top = self.bounds
        x, y = np.meshgrid(np.linspace(left, right, NODES), np.linspace(top, bottom, NODES))
        lon, lat = (np.asarray(v) for v in self._to_lonlat.transform(x, y))
        lon = lon[NODES // 2, NODES // 2] + (lon - lon[NODES // 2, NODES // 2] + 180) % 360 - 180
        return {"nodes": NODES, "lon": lon.round(7).ravel().tolist(), "lat": lat.round(7).ravel().tolist()}

    def place(self, lon: float, lat: float) -> tuple[float, float]:
        """The place of a longitude and latitude in the stores' CRS.

        Raises:
            ConfigError: outside the stores.
        """
        x, y = self._to_lonlat.transform(lon, lat, direction="INVERSE")
        left, bottom, right, top = self.bounds
        if not (left <= x <= right and bottom <= y <= top):
            corners = self._nodes()
            west, east = min(corners["lon"]), max(corners["lon"])
            south, north = min(corners["lat"]), max(corners["lat"])
            raise ConfigError(
                f"place: longitude {lon:g}, latitude {lat:g} lies outside the mosaic, which reaches from {west:.3f} to "
                f"{east:.3f} east and {south:.3f} to {north:.3f} north"
            )
        return float(x), float(y)

    def hash_of(self, text: str) -> str:
        """The end of an address that makes the page begin at ``longitude,latitude``.

        Raises:
            ConfigError: for other text, or a place outside.
        """
        try:
            lon, lat = (float(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(f"at: {text!r} is no place; write longitude and latitude, such as 15.06,46.03") from None
        x, y = self.place(lon, lat)
        return f"#c={x:.0f},{y:.0f}&m={self.stores[0].grid.resolution_m:g}"


# -- the server -------------------------------------------------------------------------------------------------


class _Handler(RequestHandler):
    """Answers that are worked out in a thread; errors raised on purpose become JSON with a sentence."""

    def initialize(self, mosaics: Mosaics, threads: ThreadPoolExecutor, slow: ThreadPoolExecutor) -> None:
        self.mosaics, self.threads, self.slow = mosaics, threads, slow

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")

    async def work[T](self, function: Callable[[], T], *, slow: bool = False) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.slow if slow else self.threads, function)

    def number(self, name: str, default: float | None = None) -> float:
        text = self.get_query_argument(name, "" if default is None else str(default))
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            raise ConfigError(f"{name}: a number is needed, got {text!r}")
        return value

    def log_exception(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, CloudgateError):
            super().log_exception(kind, error, trace)

    def write_error(self, status_code: int, **more: Any) -> None:  # noqa: ARG002 - tornado's
        error = more["exc_info"][1] if "exc_info" in more else None
        said = without_secrets(str(error)) if isinstance(error, CloudgateError) else self._reason
        if isinstance(error, CloudgateError):
            self.set_status(404 if isinstance(error, RequestError) else 502)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"error": said}))

    def png(self, data: bytes) -> None:
        self.set_header("Content-Type", "image/png")
        self.set_header("Cache-Control", "private, max-age=86400")  # the address holds the store's state
        self.finish(data)


class _Facts(_Handler):
    async def get(self) -> None:
        self.finish(await self.work(self.mosaics.facts))


class _Layer(_Handler):
    async def get(self, store: str, slot: str) -> None:
        opened = self.mosaics.store(store)
        period = opened.period(int(slot)).slot
        shown = view_tiles.parse(self.get_query_argument("layer"), opened)
        cut = self.get_query_argument("cut", "1")
        share = None if cut == "fixed" else self.number("cut", 1.0)
        if share is not None and not 0 <= share < 50:
            raise ConfigError(f"cut: {share:g} percent must be at least 0 and below 50")
        self.finish(await self.work(lambda: view_tiles.describe(opened, period, shown, cut=share)))


class _Picture(_Handler):
    """Tiles, and the picture before."""

    def stretch(self) -> tuple[list[float], float]:
        text = self.get_query_argument("range", "")
        try:
            span = [float(edge) for edge in text.split(",") if edge]
        except ValueError as error:
            raise ConfigError(f"range: numbers with commas are needed, got {text!r}") from error
        gamma = self.number("gamma", 1.0)
        if not 0.2 <= gamma <= 5:
            raise ConfigError(f"gamma: {gamma:g} must lie within 0.2 and 5")
        return span, gamma

    async def get(self, store: str, slot: str, level: str, row: str, col: str) -> None:
        opened = self.mosaics.store(store)
        period = opened.period(int(slot)).slot
        shown = view_tiles.parse(self.get_query_argument("layer"), opened)
        span, gamma = self.stretch()
        place = int(level), int(row), int(col)
        self.png(await self.work(lambda: view_tiles.tile(opened, period, place, shown, span, gamma)))


class _Before(_Picture):
    async def get(self, store: str, slot: str, *_more: str) -> None:
        opened = self.mosaics.store(store)
        period = opened.period(int(slot)).slot
        span, gamma = self.stretch()
        self.png(await self.work(lambda: view_tiles.before_png(opened, period, span, gamma)))


class _KeptBefore(_Handler):
    """Whether there is a picture before, and where it lies."""

    async def get(self, store: str, slot: str) -> None:
        opened = self.mosaics.store(store)
        period = opened.period(int(slot)).slot
        self.finish({"before": await self.work(lambda: view_tiles.before_of(opened, period))})


class _Pixel(_Handler):
    async def get(self, store: str) -> None:
        opened = self.mosaics.store(store)
        row, col = view_pixel.pixel_at(opened, self.number("x"), self.number("y"))
        values = await self.work(lambda: view_pixel.composites(opened, row, col))
        self.finish({"row": row, "col": col, "composites": values})


class _Looks(_Handler):
    answer = staticmethod(view_pixel.looks_at)

    async def get(self, store: str, slot: str) -> None:
        opened = self.mosaics.store(store)
        period = opened.period(int(slot)).slot
        row, col = view_pixel.pixel_at(opened, self.number("x"), self.number("y"))
        self.finish(await self.work(lambda: self.answer(opened, period, row, col), slow=True))


class _Shares(_Looks):
    answer = staticmethod(view_pixel.gated_shares)


class _Place(_Handler):
    async def get(self) -> None:
        x, y = self.mosaics.place(self.number("lon"), self.number("lat"))
        self.finish({"x": x, "y": y})


class _Static(StaticFileHandler):
    def set_extra_headers(self, path: str) -> None:  # noqa: ARG002 - tornado's
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("Cache-Control", "no-cache")


class MapServer:
    """The page of some stores on loopback, served from a thread while the context lasts.

    Args:
        stores: paths of finished stores in one CRS.
        port: None takes the usual one or, where that is busy, a free one; 0 takes a free one.

    Raises:
        RequestError: for a store that cannot be shown, or a port that is taken.
    """

    def __init__(self, stores: Sequence[str | Path], port: int | None = None) -> None:
        self.mosaics = Mosaics(stores)
        self._socket = _listen(port)
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="cloudgate-view", daemon=True)
        self._up = threading.Event()
        self._pools = (ThreadPoolExecutor(DRAWING_THREADS), ThreadPoolExecutor(2))

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{LOOPBACK}:{self.port}/"

    def _application(self) -> Application:
        shared = {"mosaics": self.mosaics, "threads": self._pools[0], "slow": self._pools[1]}
        return Application(
            [
                (r"/api/mosaics", _Facts, shared),
                (r"/api/layer/(\d+)/(\d+)", _Layer, shared),
                (r"/api/before/(\d+)/(\d+)", _KeptBefore, shared),
                (r"/api/pixel/(\d+)", _Pixel, shared),
                (r"/api/looks/(\d+)/(\d+)", _Looks, shared),
                (r"/api/shares/(\d+)/(\d+)", _Shares, shared),
                (r"/api/place", _Place, shared),
                (r"/tile/(\d+)/(\d+)/(\d+)/(\d+)/(\d+)\.png", _Picture, shared),
                (r"/before/(\d+)/(\d+)\.png", _Before, shared),
                (r"/(.*)", _Static, {"path": str(PAGE), "default_filename": "index.html"}),
            ],
            log_function=lambda _handler: None,
            compress_response=False,
        )

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        http = HTTPServer(self._application())
        http.add_socket(self._socket)
        self._up.set()
        await self._end.wait()
        http.stop()
        await http.close_all_connections()

    def start(self) -> Self:
        """Begin to answer."""
        self._thread.start()
        self._up.wait()
        return self

    def close(self) -> None:
        """Stop answering and let the port go; harmless when it has stopped."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(timeout=5)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        self._socket.close()

    def wait(self) -> None:
        """Wait until it is stopped (by Ctrl-C)."""
        while self._thread.is_alive():
            self._thread.join(timeout=1)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listen(port: int | None) -> socket.socket:
    if port is not None and not 0 <= port < 65536:
        raise ConfigError(f"port: {port} is none; give one from 1024 to 65535, or 0 for a free one")
    try:
        return socket.create_server((LOOPBACK, PORT if port is None else port))
    except OSError as error:
        if port is None:
            return socket.create_server((LOOPBACK, 0))
        raise ConfigError(
            f"port: {port} cannot be used on {LOOPBACK} ({error.strerror}); give another with --port, or 0 for a free "
            "one"
        ) from error
