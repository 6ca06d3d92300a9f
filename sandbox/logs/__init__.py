"""Container logs: the relay from the guest's log stream, and the file that it is written to."""
