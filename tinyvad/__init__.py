"""tinyvad: visual anomaly detection that is proven to fit, and to run bit for bit, on the chip it was built for.

    import tinyvad
    model = tinyvad.load("build")
    model.predict("part.png").pred_label

Everything heavy is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyvad.errors import CheckFailed, InputError, TinyvadError
from tinyvad.version import __version__

if TYPE_CHECKING:
    from tinyvad.build import fit
    from tinyvad.model import Model, Prediction, load

__all__ = ["CheckFailed", "InputError", "Model", "Prediction", "TinyvadError", "__version__", "fit", "load"]

_LAZY = {"load": "tinyvad.model", "Model": "tinyvad.model", "Prediction": "tinyvad.model", "fit": "tinyvad.build"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tinyvad' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
