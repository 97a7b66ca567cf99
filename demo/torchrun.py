"""torchrun as it is, but without its traceback after Ctrl-C: the processes that it started have said what they did."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
