"""Tests see no settings from outside, reach no network and use one thread a process."""

import os

for name in ("QTALE_DATA_DIR", "QTALE_MODELS_DIR", "QTALE_RESULTS_DIR", "QTALE_FIGURES_DIR"):
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
