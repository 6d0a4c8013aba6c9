"""`spieldose sign`: sign delta files, so that a server that trusts the key takes them up."""

import os
from collections.abc import Sequence
from pathlib import Path

import tyro
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from spieldose_kernels.command_line import parse
from spieldose_kernels.errors import DeltaError
from spieldose_kernels.signature import SIGNATURE_SUFFIX, Signature
from spieldose_server.errors import ConfigError


def sign(arguments: Sequence[str]) -> None:
    """Sign delta files with a key, or make one."""
    parse(_sign, arguments, prog="spieldose sign")


def _sign(
    files: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    key: Path | None = None,
    new_key: Path | None = None,
) -> None:
    """Write FILE.sig beside each delta file, or with --new-key make a key.

    Args:
        files: delta files
        key: PEM file of an Ed25519 private key
        new_key: where to write a new one; its public key is printed, for --trusted-keys
    """
    if new_key is not None and key is None and not files:
        print(make_key(new_key), end="")
        return
    if key is None or new_key is not None or not files:
        raise ConfigError("expected delta files and --key, or --new-key alone")
    private = read_key(key)
    for file in files:
        print(sign_file(file, private))


def make_key(path: Path) -> str:
    """Write a new private key, for its owner only; return its public key, as PEM.

    Raises ConfigError if there is a file already.
    """
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
    except OSError as error:
        raise ConfigError(f"expected to write a new key, got: {error}") from error
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return public.decode()


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key. Raises ConfigError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        # TypeError: a password protects it
        raise ConfigError(f"{path}: expected a private key as PEM, got: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: expected an Ed25519 key, got another kind")
    return key


def sign_file(path: Path, key: Ed25519PrivateKey) -> Path:
    """Write a delta file's signature beside it, in one step. Raises ConfigError."""
    beside = path.with_name(path.name + SIGNATURE_SUFFIX)
    temporary = beside.with_name(f".{beside.name}.{os.getpid()}.tmp")
    try:
        with open(path, "rb") as file:
            signature = Signature.make(file, key)
        temporary.write_bytes(signature.line())
        os.replace(temporary, beside)
    except (DeltaError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path}: expected a delta file to sign, got: {error}") from error
    return beside
