"""Every exception that this project raises on purpose.

    DDError
    ├── InvalidRequestError (ValueError)   the caller asked for something that does not exist
    │   └── InvalidPlanError               a plan that no token layout or budget allows
    ├── BundleError                        what is on disk cannot be served
    │   ├── BundleNotFoundError
    │   ├── ManifestError                  the manifest is missing, malformed or of another version
    │   ├── HashMismatchError              a file is not the one that the manifest names
    │   ├── WeightsError                   keys or shapes differ from what the architecture needs
    │   └── EncoderError                   a text encoder that lies outside the bundle cannot be had
    ├── HubError                           a published file could not be had
    │   ├── HubUnreachableError            no answer, a broken one, or told to stay offline; and not cached
    │   ├── HubAccessError                 a token is missing or may not read this
    │   └── HubFileMissingError            no such repository, revision or file
    ├── StorageError                       a disk is full
    ├── NotANumberError                    a model's output holds what is not a number
    └── RecipeError (ValueError)           an unknown recipe, or one that contradicts itself

`param` names the offending field in the caller's own vocabulary, so that a server can put it
into its reply without parsing the message.
"""

from __future__ import annotations


class DDError(Exception):
    """Root of every deliberate error."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(DDError, ValueError):
    """The caller asked for something that does not exist; the message lists what does."""


class InvalidPlanError(InvalidRequestError):
    """Segments that overlap, leave a gap or leave the layout, or a budget nothing fits into."""


class BundleError(DDError):
    """A model bundle that cannot be used."""


class BundleNotFoundError(BundleError):
    """No such bundle: neither a built-in name nor a folder with a manifest."""


class ManifestError(BundleError):
    """`manifest.json` is missing, is not valid, or speaks of another format version."""


class HashMismatchError(BundleError):
    """A file's SHA-256 is not the one in the manifest: truncated, damaged or exchanged."""


class WeightsError(BundleError):
    """A state dict whose keys or shapes differ from those of the architecture."""


class EncoderError(BundleError):
    """The text encoder that a bundle names, and does not hold, cannot be loaded."""


class HubError(DDError):
    """A published file could not be had from the hub."""


class HubUnreachableError(HubError):
    """The hub gives no answer or a broken one, or is not to be asked; and the file is not cached."""


class HubAccessError(HubError):
    """The hub refuses: a token is missing, or it may not read this repository."""


class HubFileMissingError(HubError):
    """The hub has no such repository, revision or file."""


class StorageError(DDError):
    """A disk has no room; the message says how much is needed and how much is free."""


class NotANumberError(DDError):
    """A model's output holds what is not a number: there is no picture."""


class RecipeError(DDError, ValueError):
    """An unknown recipe name, or settings that contradict each other."""


def reason(error: Exception) -> str:
    """Say why a file could not be read, for a message that names the file already."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
