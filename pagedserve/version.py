"""The version, alone in a file so that the build and `pagedserve version` read one truth."""

__version__ = "0.1.0"
