"""The HTTP server: HTTP → plan → scheduler → device → image.

errors, settings, schemas   what may be said to the server and what it says back
catalog, budget             loaded models; from a step budget to a plan
scheduler, worker           which images are computed together; the one thread that owns the device
images, negotiation         pixels → bytes; which bytes the client accepts
metrics, middleware, state  what is counted; request ids and body limit; what routes share
app, routes, static, listen the ASGI application, the page, the socket and the drain
client                      the other end; it needs schemas alone
"""
