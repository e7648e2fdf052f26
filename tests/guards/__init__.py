"""What must not change, held by commands, files and documented functions alone.

These tests know no internals, so that they outlive any rewrite of the package unchanged.  What
they compare with was made by commit ff2412f and is kept in ``tests/fixtures/ff2412f``.
"""
