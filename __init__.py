"""taxolens: what does a vision model know about the tree of things?"""

__version__ = "0.1.0"
