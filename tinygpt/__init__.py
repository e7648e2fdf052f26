"""tinygpt: from text to a scaling law with error bars."""

__version__ = "0.1.0"
