"""Who sends what: workload files, and the sources that produce their requests.

A source is one module of this package with an attribute `SOURCE`, a `Source` model; modules whose names start
with `_` are not sources.
"""

from steersman.runtime.workload._fit import fit_quantiles
from steersman.runtime.workload._source import Files, Source, Split, Stream, Tags
from steersman.runtime.workload._workload import Workload, WorkloadTenant, load_workload

__all__ = [
    "Files",
    "Source",
    "Split",
    "Stream",
    "Tags",
    "Workload",
    "WorkloadTenant",
    "fit_quantiles",
    "load_workload",
]
