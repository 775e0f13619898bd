"""The ``specmemo`` command."""
