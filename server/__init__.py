"""The HTTP server: a request → its plan → the scheduler → a device → images.

A request reads top-down: `api.generate`, `generation.request`, `generation.runner`, `devices.pool`,
`scheduling.scheduler`, `devices.process`.
"""
