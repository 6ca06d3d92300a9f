"""The edge: gRPC services, configuration, observability, command line."""

import os

# gRPC's fork handlers stop its threads around each child process, and Husk starts many. Read when
# grpc is first imported, so it stands before every module of this package.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
