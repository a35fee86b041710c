"""What makes a number trustworthy: intervals around it and the fingerprint of what produced it."""

from dreamreader.audit.fingerprint import Fingerprint, fingerprint, hash_weights
from dreamreader.audit.intervals import Interval, bootstrap, wilson

__all__ = ["Fingerprint", "Interval", "bootstrap", "fingerprint", "hash_weights", "wilson"]
