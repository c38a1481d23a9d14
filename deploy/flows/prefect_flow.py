"""The same tick as a Prefect flow, one task per area: retries, back-off and state stay in cloudgate's own ledger.

Needs ``pip install prefect``; only cloudgate's public names are used. Serve it with::

    python deploy/flows/prefect_flow.py /path/schedule.yaml
"""

import sys
from typing import Any

from prefect import flow, task

import pipeline


@task
def tick_area(schedule: str, area: str) -> list[dict[str, Any]]:
    """Run what is due in one area; a period that stands as failed fails the task, so that Prefect shows it."""
    report = pipeline.tick(schedule=pipeline.load_schedule(schedule), areas=[area])
    if faults := [*(f"{one['start']}: {one['why']}" for one in report.failed), *report.broken.values()]:
        raise RuntimeError("; ".join(faults))
    return report.built


@flow(name="cloudgate-tick")
def tick(schedule: str) -> list[dict[str, Any]]:
    """One tick over all areas, one after another: each brings up its own cluster."""
    states = [tick_area(schedule, one.area, return_state=True) for one in pipeline.load_schedule(schedule).series]
    return [report for state in states for report in state.result()]


if __name__ == "__main__":
    tick.serve(name="cloudgate-tick", parameters={"schedule": sys.argv[1]}, cron="17 */6 * * *")
