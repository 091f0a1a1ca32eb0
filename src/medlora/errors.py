"""One exception tree. A message names the file, line or field, and the way out; the class gives the exit code."""


class MedloraError(Exception):
    """Base of every error a user can cause or mend."""

    exit_code = 1


class RecipeError(MedloraError):
    """A recipe or an override that says something impossible."""

    exit_code = 2


class DataError(MedloraError):
    """Data that cannot be read or cannot be trained on."""

    exit_code = 3


class ModelError(MedloraError):
    """A base model or an adapter that cannot be loaded, or that do not fit each other."""

    exit_code = 4


class AssetError(MedloraError):
    """The embedded base could not be fetched, checked or stored."""

    exit_code = 5


class RunError(MedloraError):
    """A run folder in the way, or a run that cannot be resumed."""

    exit_code = 6
