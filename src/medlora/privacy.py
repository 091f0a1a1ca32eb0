"""Nothing leaves the machine unasked: telemetry of every dependency is off, and offline means no socket.

Call `quiet` before the first import of Transformers, Datasets or TRL: they read these variables at import.
"""

import logging
import os
import warnings

_DEFAULTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TRANSFORMERS_VERBOSITY": "error",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def quiet(offline: bool = False, *, compiler: bool = False) -> None:
    """Turn telemetry and chatter off and, with `offline`, forbid the hub libraries any connection.

    Without `compiler`, torch.compile is off: nothing here uses it, and bitsandbytes would import all of it.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not compiler:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if offline:
        os.environ.update(_OFFLINE)
    for name in ("bitsandbytes", "transformers", "torch.distributed", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|accelerate)\.")


def is_offline() -> bool:
    """True after `quiet(offline=True)`, and where the user set HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
