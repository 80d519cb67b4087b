"""The paper's measurements, row by row: ``gradclust study list | run R3 R6 | report``.

One file a row (``r01_linear_regression.py`` ...) declares data, model, trajectory, estimators and pass criteria; the
runner executes them as units of (row, variant, seed), each written to its own file when it ends.
"""

from .row import Check, Row, Variant, all_rows, check
from .runner import run_rows
from .table import Table
from .trajectory import Trajectory
from .unit import Diverged, Options, Unit

__all__ = ["Check", "Diverged", "Options", "Row", "Table", "Trajectory", "Unit", "Variant", "all_rows", "check"]
__all__ += ["run_rows"]
