"""Kept for its name: the module is `dreamreader.recording.calls`."""

from dreamreader.recording.calls import Calls as Calls
from dreamreader.recording.calls import record_calls as record_calls
from dreamreader.recording.calls import row_seeds as row_seeds
