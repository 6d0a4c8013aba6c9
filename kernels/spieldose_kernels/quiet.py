"""Keep the libraries' start-up chatter off a command's screen."""

import logging
import os


def quiet_libraries() -> None:
    """Silence progress bars and advice; call it before bitsandbytes or transformers is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it advises a CPU kernel from the hub
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
