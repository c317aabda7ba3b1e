"""Modules that the fork server imports once, so that a device process starts in milliseconds.

Nothing else imports this: it takes seconds.
"""

import gc

import torch._dynamo  # noqa: F401 - what building a module on the meta device imports

import server.devices.process  # noqa: F401

# What is imported lives as long as the process. The collector would read all of it each time, and in a device
# process copy every page of it at first: a quarter of a second for each model that is loaded.
gc.collect()
gc.freeze()
