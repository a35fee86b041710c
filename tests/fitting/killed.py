"""Trains in a process that kills itself: `killed.py STORE FOLDER STEP`."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fitting.toy import trained

    def kill(event: Any) -> None:
        if event.done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    trained(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
