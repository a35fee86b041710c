"""Word heat maps: where in the picture the attention to a word of the prompt was."""

from dreamreader.attention.collect import WordMap, word_maps
from dreamreader.attention.maps import WordMaps
from dreamreader.attention.scores import iou, pointing

__all__ = ["WordMap", "WordMaps", "iou", "pointing", "word_maps"]
