"""Errors of bad input data: what was given, what is allowed, what to do."""


class DataError(ValueError):
    """Input data or an argument about it cannot be used."""


class CorpusError(DataError):
    """The running interpreter's standard library cannot serve as a corpus."""


class LoaderStateError(DataError):
    """A saved loader state belongs to other data or other settings."""
