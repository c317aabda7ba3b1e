"""Modules that the fork server imports once, so that a device process starts in milliseconds.

Nothing else imports this: it takes seconds.
"""

import torch._dynamo  # noqa: F401 - what building a module on the meta device imports

import server.devices.process  # noqa: F401
