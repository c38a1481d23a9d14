"""Runs jobs, each in a process of its own, and ends each with SIGKILL when it is about to mark its second task.

    python killed.py REQUEST.json     # {"slot": 0, "jobs": [fields of a job, ...]}

Each job is forked from here, so that the imports are paid for once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import small_region

from pipeline import grid, planning
from pipeline.jobfile import job_from_dict
from pipeline.mosaic import build
from pipeline.records import RunFolder


def run(fields: dict, slot: int, told: int) -> None:
    marks, mark = [0], RunFolder.mark

    def stopping(self, *args, **more):
        if marks[0]:
            os.write(told, b"x")
            signal.pause()
        marks[0] += 1
        mark(self, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "mark", stopping)
        patch.setattr(planning, "TASK_PX", 16)
        patch.setattr(grid, "OVERVIEW_PX", 64)
        build(job=job_from_dict(fields), client=small_region.InlineClient(patch), slots=[slot])


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    for fields in asked["jobs"]:
        hears, told = os.pipe()
        child = os.fork()
        if not child:
            os.close(hears)
            try:
                run(fields, asked["slot"], told)
            finally:
                os._exit(1)
        os.close(told)
        assert os.read(hears, 1) == b"x", f"the job ended by itself: {fields['output']}"
        os.close(hears)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
