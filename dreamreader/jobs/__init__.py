"""What all jobs have in common: the folder that they go on in, and the fingerprint of a result."""

from dreamreader.jobs.fingerprint import Fingerprint, fingerprint
from dreamreader.jobs.subject import hash_weights

__all__ = ["Fingerprint", "fingerprint", "hash_weights"]
