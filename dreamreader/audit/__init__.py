"""The fingerprint of what produced a number."""

from dreamreader.audit.fingerprint import Fingerprint, fingerprint
from dreamreader.audit.subject import hash_weights

__all__ = ["Fingerprint", "fingerprint", "hash_weights"]
