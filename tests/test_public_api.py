"""The public API: every name is there, called as documented, and the package itself is quick to import."""

import inspect
import subprocess
import sys

import pytest

import qtale_lib

PARAMETERS = {
    "RouterConfig": ["hidden", "always_run_layers", "always_run_tokens"],
    "add_routers": ["model", "config"],
    "set_threshold": ["model", "theta"],
    "set_execution": ["model", "mode"],
    "record_routes": ["model"],
    "save_routed": ["model", "directory"],
    "load_routed": ["directory"],
    "quantize": ["model", "tokenizer", "texts", "method", "bits", "group_size"],
    "pack": ["model"],
    "save_packed": ["model", "directory", "tokenizer"],
    "load_packed": ["directory", "device"],
    "StreamedModel": ["directory", "device"],
    "quantize_streamed": ["streamed", "directory", "tokenizer", "texts", "method", "bits", "group_size"],
    "export_awq": ["model", "directory", "tokenizer"],
    "search_threshold": ["objective"],
    "load_profile": ["name_or_path"],
    "load_task": ["name", "split", "data_dir", "data", "alpaca"],
}


def test_the_api_is_these_names():
    assert set(qtale_lib.__all__) == {"__version__", *PARAMETERS}
    assert set(qtale_lib.__all__) <= set(dir(qtale_lib))


@pytest.mark.parametrize(("name", "leading"), PARAMETERS.items())
def test_each_name_is_there_with_its_parameters(name, leading):
    parameters = list(inspect.signature(getattr(qtale_lib, name)).parameters)
    assert parameters[: len(leading)] == leading
    assert inspect.getdoc(getattr(qtale_lib, name))


def test_quantize_defaults_to_the_papers_setting():
    defaults = {n: p.default for n, p in inspect.signature(qtale_lib.quantize).parameters.items()}
    assert (defaults["method"], defaults["bits"], defaults["group_size"]) == ("awq", 4, 128)


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="add_router"):
        _ = qtale_lib.add_router


def test_importing_the_package_and_reading_a_profile_needs_no_torch():
    code = (
        "import sys; from qtale_lib import load_profile; load_profile('tiny'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
