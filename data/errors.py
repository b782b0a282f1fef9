"""The error of data that a run reads."""


class DataError(ValueError):
    """Data that cannot be used; the message names shard and key or file, and what to do."""
