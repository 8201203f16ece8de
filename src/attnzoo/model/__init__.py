"""The language model around the mixers."""

from attnzoo.model.backbone import LanguageModel, create_model
from attnzoo.model.generate import generate
from attnzoo.model.layout import LayerSpec, parse_layout

__all__ = ["LanguageModel", "LayerSpec", "create_model", "generate", "parse_layout"]
