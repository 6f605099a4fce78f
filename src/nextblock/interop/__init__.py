"""Reading and writing other formats: `load` detects a file's format, `convert` writes another."""

from nextblock.interop.init_from import create_model, initialize
from nextblock.interop.load import load, load_classifier, load_model, open_encoder
from nextblock.interop.teacher import attach_teacher

__all__ = [
    "attach_teacher",
    "create_model",
    "initialize",
    "load",
    "load_classifier",
    "load_model",
    "open_encoder",
]
