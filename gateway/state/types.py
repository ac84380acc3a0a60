"""What can go wrong with a state store."""


class StateError(Exception):
    """The store could not be read or written."""


class BatchRefused(StateError):
    """What was to be written is what no store can hold: there is no use in trying again."""
