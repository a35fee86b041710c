"""Embedded models: small text-to-image pipelines of real diffusers classes, trained on scenes."""

from dreamreader.zoo.catalog import MODELS as MODELS
from dreamreader.zoo.catalog import SETTINGS as SETTINGS
from dreamreader.zoo.catalog import WEIGHTS as WEIGHTS
from dreamreader.zoo.catalog import list_models as list_models
from dreamreader.zoo.catalog import settings as settings
from dreamreader.zoo.subject import load as load
from dreamreader.zoo.subject import load_pipeline as load_pipeline
