"""Quantization-robust token-adaptive layer execution: QTALE (Noh, Choi and Kim, arXiv 2602.10431).

The names below are the stable public API. Each is imported when it is first asked for, so that
``import qtale_lib`` is quick and needs no torch:

    >>> import qtale_lib
    >>> model = qtale_lib.add_routers(model, qtale_lib.RouterConfig())
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "RouterConfig": "qtale_lib.adaptive",
    "add_routers": "qtale_lib.adaptive",
    "set_threshold": "qtale_lib.adaptive",
    "set_execution": "qtale_lib.adaptive",
    "record_routes": "qtale_lib.adaptive",
    "save_routed": "qtale_lib.adaptive",
    "load_routed": "qtale_lib.adaptive",
    "quantize": "qtale_lib.quantization",
    "pack": "qtale_lib.quantization.packed",
    "save_packed": "qtale_lib.quantization.packed_files",
    "load_packed": "qtale_lib.quantization.packed_files",
    "StreamedModel": "qtale_lib.streamed_model",
    "quantize_streamed": "qtale_lib.quantization.streaming",
    "export_awq": "qtale_lib.quantization.awq_export",
    "search_threshold": "qtale_lib.calibration",
    "load_profile": "qtale_lib.config",
    "load_task": "qtale_lib.data",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    """Import a public name from the room it lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'qtale_lib' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
