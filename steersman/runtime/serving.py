"""A trained policy for serving: its ONNX graph under ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.observation import WIDTH

# First bytes of what people put in the place of a graph by mistake, and what to call it.
_PICKLES = {bytes([0x80, protocol]) for protocol in range(2, 6)}
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive or a torch checkpoint",
    b"\x93NUMPY": "a numpy array",
    b"GGUF": "a GGUF model",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a git-lfs pointer",
    b"{": "JSON",
    b"<": "HTML or XML",
}


def refuse_other_formats(graph: bytes, where: str) -> None:
    """Look at the first bytes of a file that should hold an ONNX graph, before anything parses it.

    Raises:
        UserError: they are a pickle's, another known format's, or no ONNX model's.
    """
    remedy = "put back the policy.onnx that `steersman train` exported"
    if graph[:2] in _PICKLES or graph[:4] in (b"(dp0", b"(lp0"):
        raise UserError(f"{where}: a Python pickle, which is never loaded because it can run code; {remedy}")
    for magic, name in _OTHER_FORMATS.items():
        if graph.startswith(magic):
            raise UserError(f"{where}: {name}, not an ONNX graph; {remedy}")
    # A serialised ONNX model begins with field 1 (tag 0x08), the IR version.
    if len(graph) < 2 or graph[0] != 0x08 or not 3 <= graph[1] < 0x80:
        raise UserError(f"{where}: {'empty' if not graph else 'not an ONNX graph'}; {remedy}")


class OnnxPolicy:
    """A `Policy` that scores with an ONNX graph on one CPU thread.

    Not safe for calls from several threads at once: the memory of its scores is reused.
    """

    def __init__(self, name: str, graph: bytes, where: str) -> None:
        """graph: input `rows` float32 (candidates, WIDTH), output `scores` float32 (candidates,).

        Raises:
            UserError: ONNX Runtime refuses the graph, or it has other inputs or outputs; names `where`.
        """
        import onnxruntime

        self.name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # what it would print is in the exception
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            message = " ".join(str(error).split())
            raise UserError(f"{where}: ONNX Runtime cannot load it ({message}); export the policy again") from None
        ports = [
            [(port.name, port.type, port.shape[1:]) for port in self._session.get_inputs()],
            [(port.name, port.type, port.shape[1:]) for port in self._session.get_outputs()],
        ]
        if ports != [[("rows", "tensor(float)", [WIDTH])], [("scores", "tensor(float)", [])]]:
            raise UserError(
                f"{where}: its inputs and outputs are {ports}, but a policy takes float rows "
                f"(candidates, {WIDTH}) and gives float scores (candidates,); export the policy again"
            )
        self._rows = np.zeros((0, WIDTH), np.float32)
        self._scores = np.zeros(0, np.float32)
        self._binding: Any = None

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Scores float64 (C,) of `rows` float32 (C, WIDTH). The mask is for the caller to apply.

        Cheapest with the same array, filled anew, at every call.
        """
        if rows is not self._rows:
            self._bind(rows)
        self._session.run_with_iobinding(self._binding)
        return self._scores.astype(np.float64)

    def _bind(self, rows: np.ndarray) -> None:
        """Tie the graph to the memory of `rows`: cheaper than handing over arrays at each call."""
        self._rows = np.ascontiguousarray(rows, np.float32)
        self._scores = np.zeros(len(rows), np.float32)
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("rows", self._rows)
        self._binding.bind_output("scores", "cpu", 0, np.float32, self._scores.shape, self._scores.ctypes.data)
