"""Everything cloudgate raises on purpose, as one small tree.

::

    CloudgateError
    ├── RequestError            exit 2: the request is wrong or finds nothing to work on
    │   ├── ConfigError         a field of a job, profile or option
    │   ├── NoItemsError        the search matched nothing usable
    │   ├── ItemError           an item lacks what the job needs (projection, asset, offset)
    │   ├── WeightsError        a file of weights cannot be used, or not for these bands
    │   └── StoreMismatchError  the store exists and is another one
    └── RunError                exit 1: the run failed; what was written stays
        ├── CatalogError        a catalog did not answer
        ├── ReadError           an asset could not be read, after retries
        ├── TooManyFailuresError more reads failed than the job allows
        ├── NothingClearError   no look is clear anywhere, nothing is published
        ├── StoreError          the store could not be written
        └── StoreBusyError      another run works on the store

A message says what is wrong, the value, and the way out.
"""


class CloudgateError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class RequestError(CloudgateError):
    """The request is wrong or finds nothing to work on; no work was started."""

    exit_code = 2


class ConfigError(RequestError):
    """A field of a job, a profile or an option has a value that cannot be used."""


class NoItemsError(RequestError):
    """The search matched no usable item."""


class ItemError(RequestError):
    """An item lacks what the job needs: projection, asset, mask or a decidable offset."""


class WeightsError(RequestError):
    """A file of weights is damaged, foreign, of another network, or knows other bands than asked for."""


class StoreMismatchError(RequestError):
    """The store exists and belongs to another request."""


class RunError(CloudgateError):
    """The run failed after it started; finished shards are kept."""


class CatalogError(RunError):
    """A catalog could not be reached or answered with an error, after retries."""


class ReadError(RunError):
    """An asset could not be read, after retries. ``transient`` tells whether waiting may help."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class TooManyFailuresError(RunError):
    """More reads failed than ``limits.max_failed_fraction`` allows."""


class NothingClearError(RunError):
    """No look is clear anywhere in the area: there is nothing to publish."""


class StoreError(RunError):
    """The store could not be written (disk full, no permission)."""


class StoreBusyError(RunError):
    """Another run holds the lock of the store."""
