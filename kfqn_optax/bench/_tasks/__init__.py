"""The problems of ``suite``, ``profile`` and ``sweep``: one file for each family."""
