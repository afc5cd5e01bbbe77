"""What a program imports before anything else. No program.

Ctrl-C ends it at once, in any state, without a traceback.

OpenMP's threads spin while they wait for each other. Where another program uses the same cores they so keep
the very thread from running that they wait for. Spinning briefly costs nothing on a quiet machine and takes
most of that away: docs/usage.md, "A busy CPU", has the numbers. It has to be set before torch is imported;
what the user's environment says of it stands.
"""

import os
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"
