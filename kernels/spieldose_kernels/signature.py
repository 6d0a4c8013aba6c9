"""The signature of a delta file, which lies beside it: one line of text in NAME.safetensors.sig.

    spieldose delta v1 HEADER FILE SIGNATURE

HEADER is the SHA-256 of what precedes the file's data, FILE that of the whole file, both as 64 hex
digits. SIGNATURE is the Ed25519 signature (RFC 8032), as base64, of the line before it, without the
space between. With the header's digest a server that has read no more can tell who vouches for it.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from spieldose_kernels.delta_header import read_declaration
from spieldose_kernels.errors import UntrustedDelta

SIGNATURE_SUFFIX: Final = ".sig"  # after the delta file's name
MAX_SIGNATURE_BYTES: Final = 1024
LINE: Final = re.compile(
    rb"spieldose delta v1 ([0-9a-f]{64}) ([0-9a-f]{64}) ([A-Za-z0-9+/]{86}==)\s*"
)


@dataclass(frozen=True, slots=True)
class Signature:
    """Hold what was signed, and the proof of it, which nobody has checked yet."""

    header: str  # sha256 of what precedes the file's data, hex
    digest: str  # sha256 of the file, hex
    proof: bytes  # [64]

    @classmethod
    def parse(cls, content: bytes) -> "Signature":
        """Read a signature file's content. Raises UntrustedDelta."""
        line = LINE.fullmatch(content)
        if line is None:
            raise UntrustedDelta("expected a signature by a trusted key, got one nobody can read")
        header, digest, proof = line.groups()
        return cls(header.decode(), digest.decode(), base64.b64decode(proof))

    @classmethod
    def make(cls, file: io.BufferedIOBase, key: Ed25519PrivateKey) -> "Signature":
        """Sign a delta file. Raises DeltaError if its header is no good, OSError."""
        header = read_declaration(file).bytes_read.hexdigest()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(header, digest, key.sign(_message(header, digest)))

    def line(self) -> bytes:
        """Return what the signature file holds."""
        return _message(self.header, self.digest) + b" " + base64.b64encode(self.proof) + b"\n"

    def is_by(self, keys: Iterable[Ed25519PublicKey]) -> bool:
        """Say whether one of these keys made it."""
        message = _message(self.header, self.digest)
        for key in keys:
            try:
                key.verify(self.proof, message)
            except InvalidSignature:
                continue
            return True
        return False


def _message(header: str, digest: str) -> bytes:
    return f"spieldose delta v1 {header} {digest}".encode()
