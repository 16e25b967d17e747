"""The child process of an embedded replica: xllamacpp's server, until its parent goes away.

    python -m steersman.runtime.replica._llama_server OPTIONS

OPTIONS is a JSON object of attributes of `xllamacpp.CommonParams`, `threads`, and the `alias` by which
clients know the model. When the server listens, one line with its URL goes to standard output. End of file on
standard input ends the process: a parent holds that pipe, so that no child outlives it, however it died.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        return
    options = json.loads(sys.argv[1])
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.pop("model")
    params.model_alias = {options.pop("alias")}
    threads = options.pop("threads")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    for key in ("cache_type_k", "cache_type_v"):
        setattr(params, key, getattr(xllamacpp.ggml_type, "GGML_TYPE_" + options.pop(key).upper()))
    for key, value in options.items():
        setattr(params, key, value)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # the engine's own shutdown waits for running requests


if __name__ == "__main__":
    main()
