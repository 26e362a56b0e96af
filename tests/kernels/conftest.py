from __future__ import annotations

import os

# Triton decides when a kernel is decorated whether it is interpreted or compiled: interpreted tests need a process of
# their own, started with TRITON_INTERPRET=1.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]
