"""One module for each group of paths; what they share is in `server.state`."""
