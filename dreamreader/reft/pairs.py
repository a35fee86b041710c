"""Kept for its name: the module is `dreamreader.recording.pairs`."""

from dreamreader.recording.pairs import Pairs as Pairs
from dreamreader.recording.pairs import check_pairs as check_pairs
from dreamreader.recording.pairs import pairs_of_calls as pairs_of_calls
from dreamreader.recording.pairs import record_pairs as record_pairs
